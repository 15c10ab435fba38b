"""Replies of /v1/completions, whole or streamed, as values that can be compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx

from support.real_server import HttpServer

VERSION = "x-loramux-adapter-version"


@dataclass(frozen=True)
class Reply:
    """All that a reply says about its tokens. `is_done`: it was whole, or its stream ended with [DONE]."""

    text: str
    finish_reason: str | None
    tokens: tuple[str, ...]
    logprobs: tuple[float, ...]
    is_done: bool = True


@dataclass(frozen=True)
class Answer:
    """A reply and the version it says it was made with."""

    version: str
    reply: Reply


def whole(server: HttpServer, body: dict[str, Any]) -> Answer:
    with server.client() as client:
        response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    logprobs = choice["logprobs"]
    tokens, values = tuple(logprobs["tokens"]), tuple(logprobs["token_logprobs"])
    return Answer(response.headers[VERSION], Reply(choice["text"], choice["finish_reason"], tokens, values))


def streamed(
    server: HttpServer, body: dict[str, Any], on_first: Callable[[httpx.Response], None] = lambda response: None
) -> Answer:
    """`on_first` is called when the first event is there and the others are still to come."""
    text, finish_reason, is_done = "", None, False
    tokens: list[str] = []
    values: list[float] = []
    called = False
    with server.client() as client, client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        assert response.status_code == 200, response.read().decode()
        for line in response.iter_lines():
            if not called:
                called = True
                on_first(response)
            data = line.removeprefix("data: ")
            assert not is_done or not data, "something came after [DONE]"
            if data == "[DONE]":
                is_done = True
            elif data:
                event = json.loads(data)
                assert "error" not in event, event
                (choice,) = event["choices"]
                text += choice["text"]
                finish_reason = choice["finish_reason"] or finish_reason
                if choice["logprobs"]:
                    tokens += choice["logprobs"]["tokens"]
                    values += choice["logprobs"]["token_logprobs"]
        return Answer(response.headers[VERSION], Reply(text, finish_reason, tuple(tokens), tuple(values), is_done))
