"""Work and responses for a client that may leave at any moment: stopped when it does, streamed while it stays."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
SSE_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # nginx would hold events back
}


async def until_gone(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`; it is cancelled, and ClientDisconnect raised, as soon as the client leaves.

    The request's body must have been read: whatever `receive` still brings is taken as the client's end.
    """
    task = asyncio.current_task()
    assert task is not None
    watching = asyncio.ensure_future(_disconnected(receive))
    cancelled_before, is_gone = task.cancelling(), False

    def stop(_: object) -> None:
        nonlocal is_gone
        is_gone = True
        task.cancel()

    watching.add_done_callback(stop)
    try:
        return await work
    except asyncio.CancelledError:
        if is_gone and task.uncancel() <= cancelled_before:  # and nobody else wants this task to end
            raise ClientDisconnect from None
        raise
    finally:
        watching.remove_done_callback(stop)
        await cancel(watching)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def cancel(*tasks: asyncio.Future[Any]) -> None:
    """Cancel tasks and wait until they have ended; their results and errors are dropped."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


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
