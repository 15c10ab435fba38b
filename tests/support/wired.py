"""An ASGI application behind a real port in this process, with our connections and uvicorn's requests."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import uvicorn
from uvicorn.server import ServerState

from loramux_server.wire.acceptor import Acceptor
from loramux_server.wire.connections import PARTS, Connections, Cut
from loramux_server.wire.pace import Pace
from loramux_server.wire.protocol import DeadlineProtocol, Deadlines

TICK = 0.02
SECONDS = 10.0  # longest wait for anything


@dataclass
class Wired:
    """What is behind the port. `acceptor` is open as long as the context is."""

    port: int
    connections: Connections
    acceptor: Acceptor
    clients: list[Client] = field(default_factory=list)

    async def connect(self, data: bytes = b"") -> Client:
        client = Client(*await asyncio.open_connection("127.0.0.1", self.port))
        self.clients.append(client)
        client.writer.write(data)
        return client

    async def ask(self, data: bytes) -> bytes:
        """Everything that the server sends until it closes."""
        return await (await self.connect(data)).rest()

    def cuts(self, cut: Cut) -> int:
        return self.connections.readings().cuts[cut]

    async def until(self, open: int | None = None, busy: int | None = None) -> None:
        async with asyncio.timeout(SECONDS):
            while (open, busy) != (
                None if open is None else self.connections.readings().open,
                None if busy is None else self.connections.readings().busy,
            ):
                await asyncio.sleep(TICK)


@dataclass
class Client:
    """One connection to it."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def rest(self) -> bytes:
        """What comes until the server closes."""
        async with asyncio.timeout(SECONDS):
            try:
                return await self.reader.read()
            except ConnectionResetError:
                return b""

    async def line(self) -> bytes:
        async with asyncio.timeout(SECONDS):
            return await self.reader.readline()

    def close(self) -> None:
        self.writer.close()


@asynccontextmanager
async def wired(
    app: Any,
    *,
    cap: int | None = None,
    header_seconds: float = 60.0,
    stall_seconds: float = 60.0,
    bytes_per_second: float = 1024.0,
    keep_alive: int = 60,
    connections: Connections | None = None,
) -> AsyncIterator[Wired]:
    config = uvicorn.Config(
        app,
        interface="asgi3",
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        timeout_keep_alive=keep_alive,
    )
    config.load()
    connections = connections or Connections(cap)
    deadlines = Deadlines(header_seconds, Pace(stall_seconds, bytes_per_second))
    state = ServerState()
    protocol = partial(DeadlineProtocol, connections, deadlines, config=config, server_state=state, app_state={})
    with socket.create_server(("127.0.0.1", 0), backlog=256) as listener:
        acceptor = Acceptor(listener, connections, protocol)
        checking = asyncio.create_task(_check(connections))
        server = Wired(listener.getsockname()[1], connections, acceptor)
        try:
            yield server
        finally:
            for client in server.clients:
                client.close()
            acceptor.close()
            checking.cancel()
            for connection in list(state.connections):
                connection.transport.abort()
            for task in list(state.tasks):
                task.cancel()
            await asyncio.gather(*state.tasks, return_exceptions=True)
            await asyncio.sleep(TICK)


async def _check(connections: Connections) -> None:
    while True:
        for turn in range(PARTS):
            connections.check(asyncio.get_running_loop().time(), turn)
        await asyncio.sleep(TICK)
