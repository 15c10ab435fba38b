"""Waiting, on the event loop: for blocking work in a worker thread, and for a client that may leave meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractContextManager, asynccontextmanager
from functools import partial
from typing import Any, ParamSpec, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive

P = ParamSpec("P")
T = TypeVar("T")


async def offload(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run blocking work in a worker thread. If the caller is cancelled, the work still ends before this returns."""
    return await _in_thread(partial(function, *args, **kwargs), None)


async def offload_or_undo(undo: Callable[[T], object], function: Callable[[], T]) -> T:
    """As `offload`; if the caller is cancelled meanwhile, `undo` is called on the result, also in a worker thread."""
    return await _in_thread(function, undo)


@asynccontextmanager
async def entered(manager: AbstractContextManager[T]) -> AsyncIterator[T]:
    """A context manager whose beginning and end wait for the disk, for use on the event loop."""
    value = await offload_or_undo(lambda _: manager.__exit__(None, None, None), manager.__enter__)
    try:
        yield value
    except BaseException as error:
        if not await offload(manager.__exit__, type(error), error, error.__traceback__):
            raise
    else:
        await offload(manager.__exit__, None, None, None)


async def _in_thread(function: Callable[[], T], undo: Callable[[T], object] | None) -> T:
    loop = asyncio.get_running_loop()
    future = loop.run_in_executor(None, function)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        await asyncio.wait([future])
        if undo is not None and future.exception() is None:
            await asyncio.wait([loop.run_in_executor(None, undo, future.result())])
        raise


async def until_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; it is cancelled, and ClientDisconnect raised, as soon as the client leaves.

    The request's body must have been read: whatever `receive` still brings is taken as the client's end.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        await stop(working, watching)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def stop(*tasks: asyncio.Future[Any]) -> None:
    """Cancel tasks and wait until they have ended; their results and errors are dropped."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
