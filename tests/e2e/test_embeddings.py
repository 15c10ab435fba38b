"""Vectors of texts over HTTP: what the engine says in process, beside other requests, through OpenAI's client."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openai
import pytest

from loramux_adapters.device.cpu import CpuDevice
from loramux_server.base.loader import load_base_model
from loramux_server.base.source import EMBEDDED_NAME
from loramux_server.engine.local_engine import LocalEngine
from loramux_server.engine.scheduling.sequence import Pooling
from support.real_adapters import ADAPTERS
from support.real_server import BASE, RealServer

TEXTS = ["a cat sat on the mat", "the market fell sharply today", "Ein Hund läuft.", "x", "word " * 150]


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_vectors_are_those_of_the_engine_whoever_else_is_served(
    server: RealServer, embedded_cache: Path, adapter_dirs: dict[str, Path], pooling: Pooling
) -> None:
    base = load_base_model(EMBEDDED_NAME, device=CpuDevice(), cache_dir=embedded_cache, report=print)
    engine = LocalEngine.open(base, rows=4, tokens=4096, max_rank=16, check=False)
    adapter = engine.load(adapter_dirs[ADAPTERS[1]])
    prompts = [base.tokenizer(text).input_ids for text in TEXTS]
    expected = {
        BASE: engine.embed(prompts, None, pooling),
        ADAPTERS[1]: engine.embed(prompts, adapter, pooling),
    }
    with openai.OpenAI(api_key="unused", base_url=f"{server.url}/v1", max_retries=0, timeout=120) as client:

        def embed(model: str) -> list[list[float]]:
            body = {"pooling": pooling, "normalize": False}
            reply = client.embeddings.create(model=model, input=TEXTS, extra_body=body)
            return [one.embedding for one in reply.data]

        def talk(model: str) -> str:
            return client.completions.create(model=model, prompt="Once", max_tokens=20).choices[0].text

        with ThreadPoolExecutor(8) as pool:
            others = [pool.submit(talk, model) for model in ADAPTERS[:6]]
            found = {model: pool.submit(embed, model) for model in expected}
            for model, vectors in expected.items():
                told = found[model].result()
                assert [np.float32(one).tolist() for one in vectors] == told
            assert all(other.result() for other in others)
