"""A prompt that begins like an earlier one is not computed again, and the reply is the same, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.real_adapters import ADAPTERS
from support.real_server import BASE, RealServer, running_server

SYSTEM = " ".join(f"Rule {number}: answer question {number % 7} in {number % 5 + 1} words." for number in range(20))


@pytest.fixture(scope="module")
def without_cache(tmp_path_factory: pytest.TempPathFactory, adapter_dirs: dict[str, Path]) -> Iterator[RealServer]:
    store = tmp_path_factory.mktemp("store")
    with running_server(store, "--device-memory-mib", "256", "--prefix-cache-mib", "0") as running:
        for name in ADAPTERS[:2]:
            assert running.upload(name, adapter_dirs[name]).status_code == 201
        yield running


def ask(server: RealServer, prompt: str, **fields: Any) -> tuple[dict[str, Any], int]:
    """The choice, and how many tokens of the prompt were found."""
    body = {"model": BASE, "prompt": prompt, "max_tokens": 12, "temperature": 0, "logprobs": 3, **fields}
    with server.client() as client:
        response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    usage = response.json()["usage"]
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice, usage["prompt_tokens_details"]["cached_tokens"]


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"model": ADAPTERS[0]},
        {"adapters": [{"name": ADAPTERS[0], "scale": 0.5}, {"name": ADAPTERS[1], "scale": -0.25}]},
        {"model": ADAPTERS[1], "temperature": 0.8, "seed": 3},
    ],
    ids=["base", "adapter", "composed", "sampled"],
)
def test_replies_are_equal_with_the_cache_and_without_it(
    server: RealServer, without_cache: RealServer, model: dict[str, Any]
) -> None:
    first, second = f"{SYSTEM}\nQuestion: why?{model}", f"{SYSTEM}\nQuestion: who is there?{model}"
    ask(server, first, **model)
    again, found = ask(server, first, **model)
    other, shared = ask(server, second, **model)
    talk = second + other["text"]
    longer, reply_too = ask(server, talk, **model)

    assert 16 <= shared <= found < reply_too and found % 16 == shared % 16 == 0
    for prompt, cached in ((first, again), (second, other), (talk, longer)):
        assert ask(without_cache, prompt, **model) == (cached, 0)


def test_a_replaced_adapter_finds_nothing_of_the_version_before(
    server: RealServer, adapter_dirs: dict[str, Path]
) -> None:
    prompt = f"{SYSTEM}\nReplaced?"
    for name in (ADAPTERS[2], ADAPTERS[3]):
        server.upload("replaced-while-cached", adapter_dirs[name])
        fresh, found = ask(server, prompt, model="replaced-while-cached")
        assert found == 0
        assert ask(server, prompt, model=name)[0] == fresh == ask(server, prompt, model="replaced-while-cached")[0]
    with server.client() as client:
        client.delete("/v1/adapters/replaced-while-cached")
