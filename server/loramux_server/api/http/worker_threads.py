"""Blocking work in worker threads, awaited on the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager
from functools import partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def run_in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """As `asyncio.to_thread`, but if the caller is cancelled, the work still ends before this returns."""
    return await _in_thread(partial(function, *args, **kwargs), None)


async def run_in_thread_or_undo(undo: Callable[[T], object], function: Callable[[], T]) -> T:
    """As `run_in_thread`; if the caller is cancelled meanwhile, `undo` is called on the result, in a worker thread."""
    return await _in_thread(function, undo)


@asynccontextmanager
async def enter_in_thread(manager: AbstractContextManager[T]) -> AsyncIterator[T]:
    """For the event loop: a context manager whose beginning and end wait for the disk."""
    value = await run_in_thread_or_undo(lambda _: manager.__exit__(None, None, None), manager.__enter__)
    try:
        yield value
    except BaseException as error:
        if not await run_in_thread(manager.__exit__, type(error), error, error.__traceback__):
            raise
    else:
        await run_in_thread(manager.__exit__, None, None, None)


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
