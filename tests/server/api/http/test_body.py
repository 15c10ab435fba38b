"""Bodies as clients encode them, and as slowly as they send them."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from starlette.requests import Request

from loramux_server.api.http.body import blocks
from loramux_server.api.http.errors import BodyStalled
from loramux_server.wire.connections import Cut
from loramux_server.wire.pace import Pace
from support.fakes_api import Server, make_server

BODY = json.dumps({"model": "pirate", "prompt": "hello", "max_tokens": 3}).encode()


def packed(data: bytes) -> bytes:
    """The same bytes at any time, for the names of tests."""
    return gzip.compress(data, mtime=0)


DOUBLE_LIMIT = b" " * 2**16


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return make_server(tmp_path, body_bytes=2**15)


async def post(server: Server, body: bytes, encoding: str | None = None) -> httpx.Response:
    headers = {"content-type": "application/json"} | ({"content-encoding": encoding} if encoding else {})
    async with server.client() as client:
        return await client.post("/v1/completions", content=body, headers=headers)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("body", "encoding"),
    [
        (packed(BODY), "gzip"),
        (packed(BODY), "GZIP"),
        (packed(BODY), "x-gzip"),
        (zlib.compress(BODY), "deflate"),
        (BODY, "identity"),
        (b"\xef\xbb\xbf" + BODY, None),
        (packed(b"\xef\xbb\xbf" + BODY), "gzip"),
    ],
)
async def test_json_is_taken_as_clients_pack_it(server: Server, body: bytes, encoding: str | None) -> None:
    reply = await post(server, body, encoding)
    assert (reply.status_code, reply.json()["choices"][0]["text"]) == (200, "Arr")


@pytest.mark.anyio
@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip", "compress", "none"])
async def test_other_encodings_are_415_and_named_beside_those_that_are_taken(server: Server, encoding: str) -> None:
    reply = await post(server, BODY, encoding)
    assert (reply.status_code, reply.json()["error"]["code"]) == (415, "encoding_not_accepted")
    assert encoding in reply.json()["error"]["message"]
    assert "gzip, deflate" in reply.json()["error"]["message"]
    assert reply.headers["accept-encoding"] == "gzip, deflate"


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("body", "status"),
    [
        (BODY, 400),
        (packed(BODY)[:-9], 400),
        (packed(BODY)[:-8] + bytes(8), 400),
        (packed(BODY) + b"more", 400),
        (packed(BODY) + packed(BODY), 400),
        (b"", 400),
        (packed(b" " * 10**8), 413),
        (packed(DOUBLE_LIMIT + BODY), 413),
    ],
)
async def test_what_is_packed_wrongly_or_too_large_is_refused(server: Server, body: bytes, status: int) -> None:
    reply = await post(server, body, "gzip")
    assert reply.status_code == status
    assert reply.json()["error"]["code"] == {400: "invalid_encoding", 413: "body_too_large"}[status]


@pytest.mark.anyio
async def test_an_upload_is_taken_as_it_is(server: Server) -> None:
    files = {"config": b"{}", "weights": b"x"}
    async with server.client() as client:
        reply = await client.put("/v1/adapters/new", files=files, headers={"content-encoding": "gzip"})
    assert (reply.status_code, reply.headers["accept-encoding"]) == (415, "identity")


# slowly


async def sent(*parts: tuple[float, bytes]) -> AsyncIterator[bytes]:
    for seconds, data in parts:
        await asyncio.sleep(seconds)
        yield data


def slow_request(*parts: tuple[float, bytes]) -> Request:
    stream = sent(*parts)

    async def receive() -> dict[str, object]:
        data = await anext(stream, b"")
        return {"type": "http.request", "body": data, "more_body": bool(data)}

    return Request({"type": "http", "headers": [], "method": "PUT", "path": "/"}, receive)


async def bytes_of(request: Request, pace: Pace) -> int:
    total = 0
    async for block in blocks(request, limit=10**9, too_large=AssertionError(), pace=pace):
        total += len(block)
    return total


@pytest.mark.anyio
async def test_a_body_with_little_pauses_that_keeps_its_rate_is_read() -> None:
    assert await bytes_of(slow_request(*[(0.02, bytes(1000))] * 20), Pace(0.2, 10_000)) == 20_000


@pytest.mark.anyio
async def test_a_body_that_trickles_without_a_pause_is_too_slow() -> None:
    with pytest.raises(BodyStalled):
        await bytes_of(slow_request(*[(0.02, b"x")] * 50), Pace(0.2, 10_000))


@pytest.mark.anyio
async def test_a_fast_beginning_buys_no_long_pause() -> None:
    with pytest.raises(BodyStalled):
        await bytes_of(slow_request((0, bytes(10**6)), (0.4, b"x"), (0, b"")), Pace(0.2, 10_000))


async def trickle(part: bytes, seconds: float) -> AsyncIterator[bytes]:
    while True:
        yield part
        await asyncio.sleep(seconds)


@pytest.mark.anyio
async def test_slow_uploads_are_ended_counted_and_give_their_places_back(tmp_path: Path) -> None:
    server = make_server(tmp_path, stall_seconds=0.1, body_rate=10_000, uploads=1)
    headers = {"content-type": "multipart/form-data; boundary=b"}
    async with server.client() as client:
        reply = await client.put("/v1/adapters/new", content=trickle(b"-", 0.01), headers=headers)
    assert (reply.status_code, reply.json()["error"]["code"]) == (408, "body_too_slow")
    assert server.deps.connections.readings().cuts[Cut.BODY_TOO_SLOW] == 1
    assert server.metric('loramux_uploads{state="running"}') == 0


@pytest.mark.anyio
async def test_an_upload_that_never_ends_has_a_deadline_however_fast_it_is(tmp_path: Path) -> None:
    server = make_server(tmp_path, upload_seconds=0.2)
    headers = {"content-type": "multipart/form-data; boundary=b"}
    first = b'--b\r\nContent-Disposition: form-data; name="weights"\r\n\r\n'

    async def endless() -> AsyncIterator[bytes]:
        yield first
        async for part in trickle(bytes(10_000), 0.01):
            yield part

    async with server.client() as client:
        reply = await client.put("/v1/adapters/new", content=endless(), headers=headers)
    assert reply.status_code == 408
    assert "did not arrive within 0.2 seconds" in reply.json()["error"]["message"]


@pytest.mark.anyio
async def test_uploads_that_run_and_wait_are_measured(tmp_path: Path) -> None:
    server = make_server(tmp_path, uploads=1)
    with server.metrics.upload_runs(), server.metrics.upload_waits():
        assert server.metric('loramux_uploads{state="running"}') == 1
        assert server.metric('loramux_uploads{state="waiting"}') == 1
    assert server.metric('loramux_uploads{state="waiting"}') == 0
