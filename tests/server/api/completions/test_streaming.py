from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from support.fakes_api import BASE_NAME, VERSION, Server, make_server, usage_of
from support.raw_call import RawCall, events_of, text_of

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return make_server(tmp_path)


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": BASE_NAME, "messages": [{"role": "user", "content": "hi"}], "stream": True} | fields


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": BASE_NAME, "prompt": "Say", "stream": True} | fields


@pytest.mark.anyio
async def test_a_chat_stream_has_openais_chunks(server: Server) -> None:
    reply = await server.post(CHAT, chat(max_tokens=2))
    *chunks, done = events_of(reply)
    assert done == "[DONE]"
    heads = {(chunk.pop("id"), chunk.pop("created"), chunk.pop("object"), chunk.pop("model")) for chunk in chunks}
    assert len(heads) == 1 and heads.pop()[2:] == ("chat.completion.chunk", BASE_NAME)
    assert chunks == [
        {"choices": [{"index": 0, "delta": delta, "logprobs": None} | finish]}
        for delta, finish in [
            ({"role": "assistant", "content": ""}, {"finish_reason": None}),
            ({"content": "H"}, {"finish_reason": None}),
            ({"content": "e"}, {"finish_reason": None}),
            ({}, {"finish_reason": "length", "stop_reason": None}),
        ]
    ]


@pytest.mark.anyio
async def test_a_completion_stream_has_openais_chunks(server: Server) -> None:
    *chunks, done = events_of(await server.post(COMPLETIONS, completion(max_tokens=2)))
    assert done == "[DONE]"
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert [chunk["choices"] for chunk in chunks] == [
        [{"index": 0, "text": text, "logprobs": None} | finish]
        for text, finish in [
            ("H", {"finish_reason": None}),
            ("e", {"finish_reason": None}),
            ("", {"finish_reason": "length", "stop_reason": None}),
        ]
    ]


@pytest.mark.anyio
async def test_usage_comes_in_an_extra_last_chunk_if_it_is_asked_for(server: Server) -> None:
    *chunks, last, _ = events_of(await server.post(CHAT, chat(stream_options={"include_usage": True}, max_tokens=3)))
    assert all(chunk["usage"] is None for chunk in chunks)
    prompt = len("user:hi\nassistant:")
    assert last["choices"] == []
    assert last["usage"] == usage_of(prompt, 3)
    assert last["loramux"] == {"queue_ms": 2.0, "ttft_ms": 10.0}
    for options in (None, {"include_usage": False}, {}):
        events = events_of(await server.post(CHAT, chat(stream_options=options)))
        assert all("usage" not in event for event in events)


@pytest.mark.anyio
async def test_headers_tell_proxies_to_let_events_through(server: Server) -> None:
    reply = await server.post(CHAT, chat(model="pirate"))
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert reply.headers["cache-control"] == "no-cache"
    assert reply.headers["x-accel-buffering"] == "no"
    assert reply.headers["x-loramux-adapter-version"] == VERSION
    assert reply.headers["x-request-id"]


@pytest.mark.anyio
async def test_a_stream_says_what_the_whole_reply_says(server: Server) -> None:
    server.engine.replies[None] = "naïve 😀 €".encode()
    whole = (await server.post(CHAT, chat(stream=False))).json()["choices"][0]["message"]["content"]
    assert text_of(events_of(await server.post(CHAT, chat()))) == whole == "naïve 😀 €"


@pytest.mark.anyio
async def test_several_prompts_stream_side_by_side(server: Server) -> None:
    *chunks, done = events_of(await server.post(COMPLETIONS, completion(prompt=["a", "b", "c"], max_tokens=5)))
    assert done == "[DONE]"
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    for index in range(3):
        mine = [choice for choice in choices if choice["index"] == index]
        assert "".join(choice["text"] for choice in mine) == "Hello"
        assert [choice["finish_reason"] for choice in mine].count("length") == 1
    assert [choice["index"] for choice in choices] != sorted(choice["index"] for choice in choices)


@pytest.mark.anyio
async def test_nothing_of_a_stop_string_or_after_it_is_streamed(server: Server) -> None:
    server.engine.replies[None] = b"one <stop> two"
    events = events_of(await server.post(CHAT, chat(stop=["<stop>", "<step>"])))
    assert text_of(events) == "one "
    assert events[-2]["choices"][0]["finish_reason"] == "stop"
    assert server.engine.aborted == [server.engine.sequences[0].id]


@pytest.mark.anyio
async def test_text_held_back_for_a_stop_string_comes_when_it_was_none(server: Server) -> None:
    server.engine.replies[None] = b"a <sto"
    events = events_of(await server.post(CHAT, chat(stop="<stop>")))
    assert [c["choices"][0]["delta"].get("content") for c in events[1:-2]] == ["a", " ", "<sto"]
    assert events[-2]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.anyio
async def test_log_probabilities_come_with_the_text_of_their_tokens(server: Server) -> None:
    server.engine.replies[None] = "é<sx".encode()
    events = events_of(await server.post(CHAT, chat(logprobs=True, stop="<stop>")))
    tokens = [
        (
            choice["delta"].get("content"),
            [entry["token"] for entry in (choice["logprobs"] or {"content": []})["content"]],
        )
        for event in events[1:-2]
        for choice in event["choices"]
    ]
    assert tokens == [("é", ["bytes:\\xc3", "bytes:\\xa9"]), ("<sx", ["<", "s", "x"])]


@pytest.mark.anyio
async def test_an_error_in_mid_stream_is_its_last_event(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    server.engine.error_after = 4
    reply = await server.post(CHAT, chat(model="pirate"))
    assert reply.status_code == 200
    events = events_of(reply)
    assert text_of(events) == "Arr,"
    assert events[-1]["error"]["code"] == "engine_error"
    assert events[-1]["error"]["message"] == "the step of this request failed"
    assert server.store.leased == 0
    assert server.metric('loramux_requests_total{adapter="pirate",outcome="error"}') == 1


@pytest.mark.anyio
async def test_a_crash_in_mid_stream_tells_nothing_of_itself_and_is_logged(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    server.engine.crash_after = 4
    with caplog.at_level(logging.ERROR):
        reply = await server.post(CHAT, chat(model="pirate"))
    assert events_of(reply)[-1]["error"]["code"] == "internal_error"
    for secret in ("0x", "/srv", "Traceback", "secret"):
        assert secret not in reply.text
    assert reply.headers["x-request-id"] in caplog.text and "secret" in caplog.text
    assert server.store.leased == 0
    assert server.engine.running == set()


@pytest.mark.anyio
@pytest.mark.parametrize("body", [chat(model="pirate"), completion(model="pirate", prompt=["a", "b"])])
async def test_a_client_that_leaves_in_mid_stream_frees_everything(server: Server, body: dict[str, Any]) -> None:
    server.engine.hold_after = 3
    path = CHAT if "messages" in body else COMPLETIONS
    call = RawCall(server.app, "POST", path, json.dumps(body).encode())
    await server.engine.holding.wait()
    await call.until(lambda: any(b"Arr"[:1] in message.get("body", b"") for message in call.sent))
    assert server.store.leased == 1
    await call.disconnect()
    assert server.store.leased == 0
    assert server.engine.running == set()
    assert sorted(server.engine.aborted) == sorted(sequence.id for sequence in server.engine.sequences)
    assert call.sent[-1]["more_body"] is True
    assert server.metric('loramux_requests_total{adapter="pirate",outcome="abort"}') == 1


@pytest.mark.anyio
async def test_a_transport_that_finds_the_client_gone_frees_everything(server: Server) -> None:
    call = RawCall(server.app, "POST", CHAT, json.dumps(chat(model="pirate")).encode())
    server.engine.hold_after = 3
    sent = call.sent

    class Broken(list[Any]):
        def append(self, message: Any) -> None:
            sent.append(message)
            if len(sent) == 3:
                raise BrokenPipeError

    call.sent = Broken()
    await call.task
    assert server.store.leased == 0
    assert server.engine.running == set()


@pytest.mark.anyio
async def test_a_stream_that_takes_too_long_ends_with_an_error(tmp_path: Path) -> None:
    server = make_server(tmp_path, request_seconds=0.05)
    server.engine.hold_after = 2
    events = events_of(await server.post(CHAT, chat()))
    assert text_of(events) == "He"
    assert events[-1]["error"]["code"] == "request_timeout"
