"""A server of a mixture of experts with attention sinks on a late device: its modules one by one, on our kernels."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from support.adapter_files import write_adapter
from support.emulated import EmulatedDevice
from support.emulated_server import EmulatedServer, emulated_server, settings
from support.tiny_models import save_tiny_model

ASKED: list[dict[str, Any]] = [
    {"model": "tiny", "prompt": "a"},
    {"model": "attention", "prompt": "A prompt of more tokens than a step"},
    {"model": "tiny", "prompt": "drawn", "temperature": 0.9, "seed": 4, "top_p": 0.9},
    {"model": "attention", "prompt": "held", "presence_penalty": 0.7, "allowed_token_ids": list(range(40, 90))},
]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmulatedServer]:
    root = tmp_path_factory.mktemp("mixture")
    base = save_tiny_model(root / "base", "gpt_oss", num_hidden_layers=2, initializer_range=0.1)
    config = settings(base, root / "store", cache_dir=root / "cache")
    with emulated_server(EmulatedDevice(kernels="triton"), config) as server:
        response = server.upload("attention", adapter(root))
        assert response.status_code == 201, response.text
        yield server


def adapter(root: Path) -> Path:
    shapes = {"q_proj": (64, 64), "k_proj": (64, 32), "v_proj": (64, 32), "o_proj": (64, 64)}
    linears = {f"model.layers.{layer}.self_attn.{name}": shape for layer in range(2) for name, shape in shapes.items()}
    return write_adapter(root / "adapter", linears, rank=8, std_b=0.3)


def told(server: EmulatedServer, body: dict[str, Any]) -> dict[str, Any]:
    asked = {"temperature": 0, **body, "max_tokens": 4, "logprobs": 2, "ignore_eos": True}
    with server.client() as client:
        response = client.post("/v1/completions", json=asked)
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice


def test_it_says_what_it_runs_on_and_that_rows_have_their_bits(mixture: EmulatedServer) -> None:
    assert mixture.said("run module by module") and mixture.said("attention Triton")
    assert mixture.said("a reply is the same, bit for bit") and not mixture.said("NO kernels of our own")


def test_requests_in_one_batch_are_told_what_each_is_alone(mixture: EmulatedServer) -> None:
    alone = [told(mixture, body) for body in ASKED]
    assert len({str(choice["logprobs"]["token_logprobs"]) for choice in alone}) == len(ASKED)
    with ThreadPoolExecutor(len(ASKED)) as pool:
        assert list(pool.map(lambda body: told(mixture, body), ASKED)) == alone
