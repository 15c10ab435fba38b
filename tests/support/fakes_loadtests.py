"""A completion server that speaks just enough HTTP and SSE for the load tests, and remembers what it was asked."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any


class FakeCompletions:
    """Streams `max_tokens` words per request. Models whose name begins with an odd word misbehave in that way.

    Attributes:
        bodies: every request body, in the order of arrival.
        most_open: most requests that were open at the same time.
    """

    def __init__(self, *, gap: float = 0.0, chunked: bool = True) -> None:
        self.gap = gap
        self.chunked = chunked
        self.bodies: list[dict[str, Any]] = []
        self.open = 0
        self.most_open = 0
        self.url = ""

    @asynccontextmanager
    async def running(self) -> AsyncIterator[FakeCompletions]:
        server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with server:
            yield self

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = next(int(line.split(":")[1]) for line in head.splitlines() if line.startswith("Content-Length"))
            body = json.loads(await reader.readexactly(length))
            self.bodies.append(body)
            await self._reply(writer, body["model"], body["max_tokens"])
        except ConnectionError:
            pass  # the client was cut off; nothing is left to answer
        finally:
            self.open -= 1
            writer.close()

    async def _reply(self, writer: asyncio.StreamWriter, model: str, tokens: int) -> None:
        if model.startswith("missing"):
            writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\n{}")
            return
        if model.startswith("silent"):
            return
        encoding = "Transfer-Encoding: chunked\r\n" if self.chunked else ""
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n{encoding}\r\n".encode())
        for number in range(tokens):
            await asyncio.sleep(self.gap)
            last = number == tokens - 1
            choice = {"index": 0, "text": f" w{number}", "finish_reason": "length" if last else None}
            await self._send(writer, f"data: {json.dumps({'choices': [choice]})}\n\n")
            if model.startswith("broken"):
                return
        if model.startswith("failing"):
            await self._send(writer, 'data: {"error": {"message": "the step failed"}}\n\n')
        usage = {"prompt_tokens": 7, "completion_tokens": tokens}
        await self._send(writer, f": a comment\n\ndata: {json.dumps({'choices': [], 'usage': usage})}\n\n")
        await self._send(writer, "data: [DONE]\n\n")
        if self.chunked:
            writer.write(b"0\r\n\r\n")
        await writer.drain()

    async def _send(self, writer: asyncio.StreamWriter, event: str) -> None:
        data = event.encode()
        writer.write(b"%x\r\n%s\r\n" % (len(data), data) if self.chunked else data)
        await writer.drain()
