"""Vectors of texts from a server on a late device: as a CPU has them, alone and in company, by graphs and launches."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from e2e.emulated.conftest import Place
from loramux_adapters.device.cpu import CpuDevice
from loramux_server.base.loader import load_base_model
from loramux_server.engine.local_engine import LocalEngine
from loramux_server.engine.scheduling.sequence import Pooling
from support.emulated_server import EmulatedServer

TEXTS = ["a", "of", "a text of more tokens than one step takes", "four"]
POOLINGS: list[Pooling] = ["last", "mean"]


def vectors(server: EmulatedServer, model: str, pooling: str, texts: list[str]) -> list[list[float]]:
    body = {"model": model, "input": texts, "pooling": pooling, "normalize": False}
    with server.client() as client:
        response = client.post("/v1/embeddings", json=body)
    assert response.status_code == 200, response.text
    return [one["embedding"] for one in response.json()["data"]]


def reply(server: EmulatedServer, **more: Any) -> dict[str, Any]:
    body = {"model": "sixteen", "prompt": "Once", "max_tokens": 12, "ignore_eos": True, "logprobs": 2, **more}
    with server.client() as client:
        response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice


@pytest.fixture(scope="module")
def alone(server: EmulatedServer) -> dict[tuple[str, str], list[list[float]]]:
    """Each text by a request of its own."""
    return {
        (model, pooling): [vectors(server, model, pooling, [text])[0] for text in TEXTS]
        for model in ("tiny", "sixteen")
        for pooling in POOLINGS
    }


def test_they_are_near_those_of_a_cpu(
    server: EmulatedServer, place: Place, alone: dict[tuple[str, str], list[list[float]]]
) -> None:
    cache = place.files / "cpu-cache"
    base = load_base_model(str(place.base), device=CpuDevice(), cache_dir=cache, report=lambda line: None)
    engine = LocalEngine.open(base, rows=4, tokens=1024, max_rank=16, check=False)
    adapter = engine.load(place.adapter("sixteen", rank=16, seed=16))
    prompts = [base.tokenizer(text).input_ids for text in TEXTS]
    for pooling in POOLINGS:
        expected = {"tiny": engine.embed(prompts, None, pooling), "sixteen": engine.embed(prompts, adapter, pooling)}
        for model, theirs in expected.items():
            for mine, vector in zip(alone[model, pooling], theirs, strict=True):
                assert np.linalg.norm(mine - vector) < 0.02 * np.linalg.norm(vector)
        changed = np.array(expected["tiny"]) - np.array(expected["sixteen"])
        assert np.linalg.norm(changed, axis=1).min() > 1, "the adapter changes nothing"


def test_a_text_of_one_token_is_read_by_a_graph(server: EmulatedServer) -> None:
    begin = len(server.device.started)
    vectors(server, "sixteen", "last", ["a"])
    assert ("replay", "") in server.device.started[begin:]


@pytest.mark.parametrize("others", [{"temperature": 0.9, "seed": 3}, {"temperature": 0, "presence_penalty": 0.5}])
def test_vectors_and_replies_are_the_same_bits_side_by_side(
    server: EmulatedServer, alone: dict[tuple[str, str], list[list[float]]], others: dict[str, Any]
) -> None:
    said = reply(server, **others)
    with ThreadPoolExecutor(6) as pool:
        talks = [pool.submit(reply, server, **others) for _ in range(2)]
        found = {key: pool.submit(vectors, server, *key, TEXTS) for key in alone}
        assert {key: each.result() for key, each in found.items()} == alone
        assert [talk.result() for talk in talks] == [said, said]
