"""Clients that stop reading: what they hold is given back, over real sockets."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from loramux_server.wire.connections import Cut
from support.fakes_api import VERSION, Server, make_server
from support.wired import SECONDS, TICK, Wired, wired

STALL = 0.4


@contextmanager
def reader_that_stops(server: Wired, request: bytes) -> Iterator[socket.socket]:
    """Sends a request and never reads; its own buffer is small."""
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", server.port))
        client.sendall(request)
        yield client


async def given_back(server: Server) -> None:
    async with asyncio.timeout(SECONDS):
        while server.store.leased or server.engine.running:
            await asyncio.sleep(TICK)


@pytest.mark.anyio
async def test_a_stream_whose_client_stops_reading_gives_its_lease_and_its_place_back(tmp_path: Path) -> None:
    server = make_server(tmp_path, context=10**6)
    server.engine.replies["pirate"] = b"x" * 50_000
    body = json.dumps({"model": "pirate", "prompt": "hi", "max_tokens": 50_000, "stream": True}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    async with wired(server.app, stall_seconds=STALL, bytes_per_second=16_384) as port:
        with reader_that_stops(port, head + b"Content-Length: %d\r\n\r\n" % len(body) + body):
            async with asyncio.timeout(SECONDS):
                while not server.store.leased:
                    await asyncio.sleep(TICK)
            await given_back(server)
        assert port.cuts(Cut.READER_TOO_SLOW) == 1
    assert server.metric('loramux_requests_total{adapter="pirate",outcome="abort"}') == 1


@pytest.mark.anyio
async def test_a_download_whose_client_stops_reading_gives_its_lease_back(tmp_path: Path) -> None:
    server = make_server(tmp_path)
    directory = server.store.directory(VERSION)
    directory.mkdir()
    (directory / "adapter_model.safetensors").write_bytes(os.urandom(2**23))
    async with wired(server.app, stall_seconds=STALL, bytes_per_second=16_384) as port:
        with reader_that_stops(port, b"GET /v1/adapters/pirate/archive HTTP/1.1\r\nHost: localhost\r\n\r\n"):
            async with asyncio.timeout(SECONDS):
                while not server.store.leased:
                    await asyncio.sleep(TICK)
            await given_back(server)
        assert port.cuts(Cut.READER_TOO_SLOW) == 1


@pytest.mark.anyio
async def test_a_reply_that_is_complete_and_never_read_keeps_no_connection(tmp_path: Path) -> None:
    server = make_server(tmp_path)
    server.store.known |= {f"a{number}": server.store.known["pirate"] for number in range(2000)}
    async with wired(server.app, stall_seconds=STALL, bytes_per_second=16_384) as port:
        with reader_that_stops(port, b"GET /v1/adapters HTTP/1.1\r\nHost: localhost\r\n\r\n"):
            await port.until(open=1)
            await port.until(open=0)
        assert port.cuts(Cut.READER_TOO_SLOW) == 1
