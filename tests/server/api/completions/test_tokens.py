"""/tokenize and /detokenize in vLLM's shapes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from support.fakes_api import BASE_NAME, CONTEXT, Server, make_server

MESSAGES = [{"role": "user", "content": "x"}]


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return make_server(tmp_path)


@pytest.mark.anyio
@pytest.mark.parametrize("model", [None, BASE_NAME, "pirate", f"{BASE_NAME}:pirate"])
async def test_a_text_is_told_as_tokens_whatever_model_is_asked(server: Server, model: str | None) -> None:
    reply = await server.post("/tokenize", {"model": model, "prompt": "hé"})
    assert reply.json() == {"count": 3, "max_model_len": CONTEXT, "tokens": [104, 195, 169], "token_strs": None}
    assert server.store.leased == 0


@pytest.mark.anyio
async def test_tokens_are_shown_as_text_where_that_is_asked_for(server: Server) -> None:
    reply = await server.post("/tokenize", {"prompt": "hé", "return_token_strs": True, "add_special_tokens": True})
    assert reply.json()["token_strs"] == ["h", "bytes:\\xc3", "bytes:\\xa9"]


@pytest.mark.anyio
async def test_a_conversation_is_told_as_the_template_writes_it(server: Server) -> None:
    body = {"messages": MESSAGES, "add_generation_prompt": None, "chat_template_kwargs": {}, "tools": None}
    tokens = (await server.post("/tokenize", body)).json()["tokens"]
    assert bytes(tokens) == b"user:x\nassistant:"
    assert (await server.post("/detokenize", {"tokens": tokens})).json() == {"prompt": "user:x\nassistant:"}


@pytest.mark.anyio
async def test_what_is_not_a_token_or_no_model_is_refused(server: Server) -> None:
    cases: list[tuple[str, dict[str, Any], int, str]] = [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": ["x"]}, 400, "prompt"),
        ("/tokenize", {"prompt": "x" * 10_000}, 400, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": MESSAGES}, 400, "prompt"),
        ("/tokenize", {"prompt": "x", "add_special_tokens": 0}, 400, "add_special_tokens"),
        ("/tokenize", {"messages": MESSAGES, "continue_final_message": True}, 400, "continue_final_message"),
        ("/tokenize", {"messages": MESSAGES, "chat_template": "{{ 1 }}"}, 400, "chat_template"),
        ("/tokenize", {"model": "../x", "prompt": "x"}, 404, "model"),
        ("/detokenize", {"tokens": [258]}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens"),
        ("/detokenize", {"tokens": "x"}, 400, "tokens"),
        ("/detokenize", {"tokens": [1] * 200_000}, 400, "values"),
    ]
    for path, body, status, param in cases:
        error = (await server.post(path, body)).json()["error"]
        assert param in f"{error['param']} {error['message']}"
        assert (await server.post(path, body)).status_code == status
    assert (await server.post("/tokenize", {"model": "nobody", "prompt": "x"})).status_code == 404
    assert (await server.post("/detokenize", {"tokens": []})).json() == {"prompt": ""}


@pytest.mark.anyio
async def test_tokens_are_made_off_the_event_loop(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def off_loop(*args: object, **options: object) -> list[int]:
        with pytest.raises(RuntimeError):
            asyncio.get_running_loop()
        return [1]

    for name in ("encode", "encode_chat"):
        monkeypatch.setattr(server.tokenizer, name, off_loop)
    for body in ({"prompt": "x"}, {"messages": MESSAGES}):
        assert (await server.post("/tokenize", body)).json()["tokens"] == [1]
        body["model"] = BASE_NAME
        path = "/v1/completions" if "prompt" in body else "/v1/chat/completions"
        assert (await server.post(path, body)).status_code == 200
