"""Responses whose body comes bit by bit, to a client that may leave at any moment."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import suppress

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from loramux_server.api.http.worker_threads import until_gone

DONE = b"data: [DONE]\n\n"
SSE_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # nginx would hold events back
}


def event(data: str) -> bytes:
    """A server-sent event; `data` must be a single line, as JSON is."""
    return f"data: {data}\n\n".encode()


class Stream(Response):
    """Sends blocks as they come and stops as soon as the client has left; `release` is awaited however it ends."""

    def __init__(
        self,
        blocks: AsyncGenerator[bytes, None],
        release: Callable[[], Awaitable[None]],
        headers: Mapping[str, str],
    ) -> None:
        self.status_code = 200
        self.background = None
        self._blocks = blocks
        self._release = release
        self.init_headers(headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            # OSError: the transport found out first that nobody listens.
            with suppress(ClientDisconnect, OSError):
                await until_gone(receive, self._send(send))
        finally:
            try:
                await self._blocks.aclose()
            finally:
                await self._release()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for data in self._blocks:
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
