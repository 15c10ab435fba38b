"""Where a reply ends, what it says of that, and what of its end shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support.fakes_api import BASE_NAME, Server, make_server
from support.raw_call import events_of

COMPLETIONS = "/v1/completions"


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return make_server(tmp_path)


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": BASE_NAME, "prompt": "Say"} | fields


async def choice_of(server: Server, **fields: Any) -> dict[str, Any]:
    """The same whole and streamed."""
    reply = await server.post(COMPLETIONS, completion(**fields))
    assert reply.status_code == 200, reply.text
    choice: dict[str, Any] = reply.json()["choices"][0]
    chunks = [
        event["choices"][0]
        for event in events_of(await server.post(COMPLETIONS, completion(**fields, stream=True)))[:-1]
    ]
    assert "".join(chunk["text"] for chunk in chunks) == choice["text"]
    assert [chunk.get("stop_reason") for chunk in chunks] == [*[None] * (len(chunks) - 1), choice["stop_reason"]]
    assert chunks[-1]["finish_reason"] == choice["finish_reason"]
    return choice


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("fields", "text", "finish", "reason"),
    [
        ({}, "Hello world", "stop", None),
        ({"max_tokens": 5}, "Hello", "length", None),
        ({"stop": ["zz", "o w"]}, "Hell", "stop", "o w"),
        ({"stop": "o w", "include_stop_str_in_output": True}, "Hello w", "stop", "o w"),
        ({"stop": "world", "max_tokens": 11}, "Hello ", "stop", "world"),
        ({"stop_token_ids": [ord("o")]}, "Hell", "stop", ord("o")),
        ({"stop_token_ids": [ord("o")], "include_stop_str_in_output": True}, "Hello", "stop", ord("o")),
        ({"stop_token_ids": [257]}, "Hello world", "stop", None),
        ({"include_stop_str_in_output": True}, "Hello world", "stop", None),
        ({"include_stop_str_in_output": True, "skip_special_tokens": False}, "Hello world<end>", "stop", None),
        ({"skip_special_tokens": False}, "Hello world", "stop", None),
        ({"ignore_eos": True, "max_tokens": 12}, "Hello world", "length", None),
        ({"ignore_eos": True, "max_tokens": 12, "skip_special_tokens": False}, "Hello world<end>", "length", None),
        ({"ignore_eos": True, "stop_token_ids": [257]}, "Hello world", "stop", 257),
        ({"stop": "l", "min_tokens": 3}, "Hel", "stop", "l"),
        ({"stop": "l", "min_tokens": 4}, "Hello wor", "stop", "l"),
        ({"stop": "ello", "min_tokens": 3}, "H", "stop", "ello"),
    ],
)  # fmt: skip
async def test_a_reply_says_what_ended_it(
    server: Server, fields: dict[str, Any], text: str, finish: str, reason: str | int | None
) -> None:
    choice = await choice_of(server, **fields)
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (text, finish, reason)


@pytest.mark.anyio
async def test_a_stop_that_shows_has_its_log_probabilities(server: Server) -> None:
    asked = {"logprobs": 0, "include_stop_str_in_output": True}
    for fields in ({"stop": "o w"}, {"stop_token_ids": [ord("w")]}):
        choice = await choice_of(server, **asked, **fields)
        assert "".join(choice["logprobs"]["tokens"]) == choice["text"] == "Hello w"
        assert choice["logprobs"]["text_offset"] == [*range(7)]


@pytest.mark.anyio
async def test_special_tokens_show_on_request_in_the_middle_of_a_reply(server: Server) -> None:
    server.engine.replies[None] = [*b"a", 256, *b"b"]
    assert (await choice_of(server))["text"] == "ab"
    choice = await choice_of(server, skip_special_tokens=False, logprobs=0)
    assert choice["text"] == "a<begin>b" and choice["logprobs"]["text_offset"] == [0, 1, 8]
    assert (await choice_of(server, skip_special_tokens=False, stop="beg"))["text"] == "a<"


@pytest.mark.anyio
async def test_more_tokens_than_a_reply_may_have_cannot_be_the_least(server: Server) -> None:
    for fields in ({"min_tokens": 17}, {"min_tokens": 5, "max_tokens": 4}):
        reply = await server.post(COMPLETIONS, completion(**fields))
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "min_tokens")
    assert (await server.post(COMPLETIONS, completion(min_tokens=16))).status_code == 200
    assert server.engine.sequences[0].params.min_tokens == 16
