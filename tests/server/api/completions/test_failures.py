"""Generation requests that fail, or whose client leaves: the right status, and nothing is kept."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

from loramux_adapters.errors import AdapterCorrupt, IndexLost, StoreUnavailable
from loramux_adapters.store.store import Lease
from loramux_server.engine.scheduling.sequence import FinishReason, Sequence, TokenOutput
from loramux_server.errors import EngineDead, GrammarFailed, RequestError, SequenceFailed, ServerBusy, ServerDraining
from support.fakes_api import BASE_NAME, Server, make_server
from support.raw_call import RawCall

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return make_server(tmp_path)


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": BASE_NAME, "messages": [{"role": "user", "content": "hi"}]} | fields


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": BASE_NAME, "prompt": "Say"} | fields


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (ServerBusy("the queue is full", retry_after=3), 503, "server_busy"),
        (ServerDraining("shutting down"), 503, "server_draining"),
        (EngineDead("the engine has stopped"), 503, "engine_dead"),
        (SequenceFailed("the adapter could not be read"), 500, "engine_error"),
        (GrammarFailed("nothing may come next"), 400, "reply_impossible"),
        (RequestError("too large for the cache", param="prompt"), 400, None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["a", ["a", "b"]])
async def test_what_the_engine_refuses_has_its_status_also_in_a_stream(
    server: Server, error: Exception, status: int, code: str | None, stream: bool, prompt: object
) -> None:
    server.engine.refusal = error
    reply = await server.post(COMPLETIONS, completion(stream=stream, prompt=prompt, model="pirate"))
    assert reply.status_code == status
    assert reply.json()["error"]["message"] == str(error)
    assert reply.json()["error"]["code"] == code
    assert server.store.leased == 0
    refused = isinstance(error, RequestError | ServerBusy)
    outcome = "rejected" if refused else "error"
    assert server.metric(f'loramux_requests_total{{adapter="pirate",outcome="{outcome}"}}') == 1
    assert server.metric("loramux_request_duration_seconds_count") == (0 if refused else 1)
    if isinstance(error, ServerBusy):
        assert reply.headers["retry-after"] == str(error.retry_after)


@pytest.mark.anyio
@pytest.mark.parametrize("after", [0, 3])
async def test_a_failed_step_is_500_with_the_engines_reason(server: Server, after: int) -> None:
    server.engine.error_after = after
    reply = await server.post(CHAT, chat(model="pirate"))
    assert reply.status_code == 500
    assert reply.json()["error"] == {
        "message": "the step of this request failed",
        "type": "server_error",
        "param": None,
        "code": "engine_error",
    }
    assert server.store.leased == 0
    assert server.engine.aborted == []
    assert server.metric('loramux_requests_total{adapter="pirate",outcome="error"}') == 1


@pytest.mark.anyio
@pytest.mark.parametrize("stream", [False, True])
async def test_a_damaged_adapter_is_called_so_from_the_first_request_on(server: Server, stream: bool) -> None:
    acquire = server.store.acquire
    found: list[AdapterCorrupt] = []

    def acquire_until_found(name: str, version_prefix: str | None = None) -> Lease:
        if found:
            raise found[0]
        return acquire(name, version_prefix)

    async def fail_to_load(sequence: Sequence) -> AsyncGenerator[TokenOutput, None]:
        found.append(AdapterCorrupt("version 1234 of the adapter pirate is damaged"))
        yield TokenOutput(finish_reason=FinishReason.ERROR, error="the stored files cannot be read as published")

    server.store.acquire = acquire_until_found  # type: ignore[method-assign]
    server.engine.submit = lambda *sequences: [fail_to_load(each) for each in sequences]  # type: ignore[method-assign]
    for _ in range(2):
        reply = await server.post(CHAT, chat(model="pirate", stream=stream))
        assert (reply.status_code, reply.json()["error"]["code"]) == (500, "adapter_corrupt")
        assert "upload it again" in reply.json()["error"]["message"]
    assert server.store.leased == 0


@pytest.mark.anyio
async def test_a_name_that_was_deleted_since_is_not_what_a_failed_step_is_blamed_on(server: Server) -> None:
    async def fail(sequence: Sequence) -> AsyncGenerator[TokenOutput, None]:
        server.store.delete("pirate")
        yield TokenOutput(finish_reason=FinishReason.ERROR, error="the step failed")

    server.engine.submit = lambda *sequences: [fail(each) for each in sequences]  # type: ignore[method-assign]
    reply = await server.post(CHAT, chat(model="pirate"))
    assert (reply.status_code, reply.json()["error"]["message"]) == (500, "the step failed")
    assert server.store.leased == 0


@pytest.mark.anyio
async def test_a_reply_that_its_request_leaves_no_token_is_not_to_be_asked_for_again(server: Server) -> None:
    """Clients repeat by themselves what ended with a 5xx."""

    async def fail(sequence: Sequence) -> AsyncGenerator[TokenOutput, None]:
        yield TokenOutput(finish_reason=FinishReason.ERROR, error="nothing may come next", is_impossible=True)

    server.engine.submit = lambda *sequences: [fail(each) for each in sequences]  # type: ignore[method-assign]
    reply = await server.post(CHAT, chat(model="pirate"))
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "reply_impossible")
    assert reply.json()["error"]["message"] == "nothing may come next"
    assert server.metric('loramux_requests_total{adapter="pirate",outcome="error"}') == 1
    assert server.store.leased == 0


@pytest.mark.anyio
async def test_a_crash_tells_the_client_nothing_of_itself(server: Server) -> None:
    server.engine.crash_after = 2
    reply = await server.post(CHAT, chat(model="pirate"))
    assert reply.status_code == 500
    assert reply.headers["x-request-id"]
    assert reply.json()["error"]["code"] == "internal_error"
    for secret in ("0x", "/srv", "Traceback", "RuntimeError", "secret"):
        assert secret not in reply.text
    assert server.store.leased == 0
    assert server.engine.running == set()


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("failure", "status"),
    [
        (StoreUnavailable("/srv/store is full"), 503),
        (IndexLost("it lacks changes", 3, "/srv/store"), 503),
        (AdapterCorrupt("/srv/x differs"), 500),
    ],
)
async def test_a_store_that_fails_does_not_show_its_paths(server: Server, failure: Exception, status: int) -> None:
    server.store.failure = failure
    reply = await server.post(CHAT, chat(model="pirate"))
    assert reply.status_code == status
    assert "/srv" not in reply.text
    assert ("retry-after" in reply.headers) == (status == 503)


@pytest.mark.anyio
@pytest.mark.parametrize("prompt", ["a", ["a", "b"]])
async def test_a_client_that_leaves_frees_everything(server: Server, prompt: object) -> None:
    server.engine.hold_after = 3
    body = json.dumps(completion(model="pirate", prompt=prompt)).encode()
    call = RawCall(server.app, "POST", COMPLETIONS, body)
    await server.engine.holding.wait()
    assert (server.store.leased, len(server.engine.running)) == (1, len(prompt))  # type: ignore[arg-type]
    await call.disconnect()
    assert server.store.leased == 0
    assert server.engine.running == set()
    assert sorted(server.engine.aborted) == sorted(sequence.id for sequence in server.engine.sequences)
    assert server.metric('loramux_requests_total{adapter="pirate",outcome="abort"}') == 1
    assert server.metric("loramux_aborts_total") == 1


@pytest.mark.anyio
@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_while_it_waits_for_the_first_token_frees_everything(
    server: Server, stream: bool
) -> None:
    server.engine.hold_after = 0
    call = RawCall(server.app, "POST", CHAT, json.dumps(chat(model="pirate", stream=stream)).encode())
    await server.engine.holding.wait()
    await call.disconnect()
    assert server.store.leased == 0
    assert server.engine.running == set()
    assert server.engine.aborted == [server.engine.sequences[0].id]


@pytest.mark.anyio
async def test_a_request_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    server = make_server(tmp_path, request_seconds=0.05)
    server.engine.hold_after = 2
    reply = await server.post(CHAT, chat(model="pirate"))
    assert (reply.status_code, reply.json()["error"]["code"]) == (504, "request_timeout")
    assert server.store.leased == 0
    assert server.engine.aborted == [server.engine.sequences[0].id]


@pytest.mark.anyio
async def test_refused_requests_are_counted_without_naming_what_the_client_wrote(server: Server) -> None:
    await server.post(CHAT, chat(model="evil-name"))
    await server.post(CHAT, {"model": 1})
    assert server.metric('loramux_requests_total{adapter="unknown",outcome="rejected"}') == 2
    await server.post(COMPLETIONS, completion(model="pirate", prompt="x" * 999))
    assert server.metric('loramux_requests_total{adapter="pirate",outcome="rejected"}') == 1
    assert b"evil-name" not in server.metrics.render()
    assert server.store.leased == 0


@pytest.mark.anyio
async def test_a_body_over_the_limit_is_413_with_and_without_a_length(tmp_path: Path) -> None:
    server = make_server(tmp_path, body_bytes=1000)
    read = 0

    async def body() -> Any:
        nonlocal read
        for _ in range(10**6):
            read += 1000
            yield b" " * 1000

    async with server.client(headers={"content-type": "application/json"}) as client:
        announced = await client.post(CHAT, content=b" " * 1001)
        streamed = await client.post(CHAT, content=body())
    assert announced.status_code == streamed.status_code == 413
    assert read <= 1000 + 2 * 64 * 1024
    assert server.engine.sequences == []


@pytest.mark.anyio
async def test_a_body_that_stalls_is_408(tmp_path: Path) -> None:
    server = make_server(tmp_path, stall_seconds=0.02)
    call = RawCall(server.app, "POST", CHAT, b"{", more_body=True)
    await call.task
    assert call.sent[0]["status"] == 408


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "application/json-x"])
async def test_a_body_that_a_web_page_may_send_unasked_is_refused(server: Server, kind: str) -> None:
    async with server.client(headers={"content-type": kind}) as client:
        reply = await client.post(CHAT, content=json.dumps(chat()))
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_content_type")
