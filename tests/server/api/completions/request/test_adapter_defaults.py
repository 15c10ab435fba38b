"""Generation defaults and context of an adapter's version in requests: request, then adapter, then server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loramux_adapters.artifact.generation_defaults import GENERATION_FILE
from support.fakes_api import BASE_NAME, CONTEXT, VERSION, Server, make_server, record_of

pytestmark = pytest.mark.anyio
OTHER = "0b" * 32


@pytest.fixture
def server(tmp_path: Path) -> Server:
    server = make_server(tmp_path)
    server.store.known["parrot"] = record_of("parrot", OTHER)
    server.engine.replies |= {"parrot": b"Arr, matey", "pirate+parrot": b"Arr, matey"}
    return server


def says(server: Server, version: str = VERSION, **fields: Any) -> None:
    directory = server.store.root / version
    directory.mkdir(exist_ok=True)
    (directory / GENERATION_FILE).write_text(json.dumps(fields))


async def asked(server: Server, **body: Any) -> Any:
    """What the engine is asked for."""
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    body = {"model": "pirate", **body} if "adapters" not in body else {"model": BASE_NAME, **body}
    reply = await server.post(path, body)
    assert reply.status_code == 200, reply.text
    return server.engine.sequences[-1].params


MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize("text", [{"prompt": "hi"}, {"messages": MESSAGES}])
async def test_what_a_request_leaves_unsaid_is_the_adapters(server: Server, text: dict[str, Any]) -> None:
    says(server, temperature=0.25, top_p=0.5, top_k=7, min_p=0.1, max_new_tokens=3)
    params = await asked(server, **text)
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.25, 0.5, 7, 0.1)
    assert params.max_tokens == 3
    params = await asked(server, **text, temperature=None, max_tokens=None)  # null says nothing
    assert (params.temperature, params.max_tokens) == (0.25, 3)


@pytest.mark.parametrize("text", [{"prompt": "hi"}, {"messages": MESSAGES}])
async def test_what_a_request_says_counts(server: Server, text: dict[str, Any]) -> None:
    says(server, temperature=0.25, top_k=7, max_new_tokens=3)
    params = await asked(server, **text, temperature=1, top_k=-1, max_tokens=5)
    assert (params.temperature, params.top_k, params.max_tokens) == (1.0, 0, 5)


async def test_as_many_as_fit_is_said_too(server: Server) -> None:
    says(server, max_new_tokens=3)
    params = await asked(server, messages=MESSAGES, max_tokens=-1)
    assert params.max_tokens > 50
    params = await asked(server, messages=MESSAGES, max_completion_tokens=4)
    assert params.max_tokens == 4


async def test_the_base_and_other_adapters_keep_the_servers(server: Server) -> None:
    says(server, temperature=0.25)
    for model in (BASE_NAME, "parrot"):
        assert (await asked(server, model=model, prompt="hi")).temperature == 1.0


async def test_stop_strings_end_a_reply_unless_the_request_has_its_own(server: Server) -> None:
    says(server, stop_strings=[","])

    async def text(**body: Any) -> str:
        reply = await server.post("/v1/completions", {"model": "pirate", "prompt": "hi", **body})
        return str(reply.json()["choices"][0]["text"])

    assert await text() == "Arr"
    assert await text(stop=None) == "Arr"
    assert await text(stop=["mat"]) == "Arr, "
    assert await text(stop=[]) == "Arr, matey"


async def test_a_default_length_takes_what_room_there_is(server: Server) -> None:
    says(server, max_new_tokens=1000)
    params = await asked(server, prompt="x" * (CONTEXT - 10))
    assert params.max_tokens == 10


async def test_a_prompt_beyond_the_adapters_context_is_refused_and_names_it(server: Server) -> None:
    says(server, max_length=32)
    reply = await server.post("/v1/completions", {"model": "pirate", "prompt": "x" * 32})
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["code"] == "context_length_exceeded" and error["param"] == "prompt"
    assert error["message"].startswith("the context of the adapter pirate holds 32 tokens and the prompt alone has 32")
    reply = await server.post("/v1/completions", {"model": "pirate", "prompt": "x" * 20, "max_tokens": 13})
    assert reply.status_code == 400 and "the adapter pirate holds 32 tokens" in reply.json()["error"]["message"]
    assert (await asked(server, prompt="x" * 20, max_tokens=12)).max_tokens == 12
    assert (await asked(server, messages=MESSAGES)).max_tokens < 32
    assert (await asked(server, model=BASE_NAME, prompt="x" * 32)).max_tokens == 16


async def test_a_context_beyond_the_bases_changes_nothing(server: Server) -> None:
    says(server, max_length=10 * CONTEXT)
    reply = await server.post("/v1/completions", {"model": "pirate", "prompt": "x" * CONTEXT})
    assert reply.json()["error"]["message"].startswith(f"the context holds {CONTEXT} tokens")


async def test_of_a_sum_only_what_all_agree_on_is_applied(server: Server) -> None:
    both: dict[str, Any] = {"adapters": [{"name": "pirate"}, {"name": "parrot"}], "prompt": "hi"}
    says(server, temperature=0.25, top_k=7, max_length=64)
    params = await asked(server, **both)
    assert (params.temperature, params.top_k) == (1.0, 0)
    says(server, OTHER, temperature=0.25, top_k=8, max_length=48)
    params = await asked(server, **both)
    assert (params.temperature, params.top_k) == (0.25, 0)
    reply = await server.post("/v1/completions", {"model": BASE_NAME, **both, "prompt": "x" * 50})
    assert reply.status_code == 400 and "the adapter parrot holds 48" in reply.json()["error"]["message"]


async def test_damaged_defaults_fail_the_request_and_give_the_lease_back(server: Server) -> None:
    says(server, temperature=0.25)
    (server.store.root / VERSION / GENERATION_FILE).write_text("{")
    reply = await server.post("/v1/completions", {"model": "pirate", "prompt": "hi"})
    assert reply.status_code == 500 and reply.json()["error"]["code"] == "adapter_corrupt"
    assert server.store.leased == 0


async def test_an_adapter_shows_what_it_says(server: Server) -> None:
    says(server, temperature=0.25, stop_strings=["END"], max_length=64)
    async with server.client() as client:
        shown = (await client.get("/v1/adapters/pirate")).json()
        listed = (await client.get("/v1/adapters")).json()["data"]
        models = {model["id"]: model["max_model_len"] for model in (await client.get("/v1/models")).json()["data"]}
        one = (await client.get("/v1/models/pirate")).json()
    assert shown["generation_defaults"] == {"temperature": 0.25, "stop": ["END"]} and shown["context"] == 64
    assert [each["context"] for each in listed] == [64, None]
    assert models == {BASE_NAME: CONTEXT, "pirate": 64, "parrot": CONTEXT} and one["max_model_len"] == 64
