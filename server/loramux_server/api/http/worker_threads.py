"""Blocking work in worker threads, awaited on the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager
from contextvars import copy_context
from functools import partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_work = threading.local()  # .left: the event that says that the caller of the work in this thread was cancelled


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


def abandonment() -> Callable[[], bool]:
    """For work that takes long: whether whoever waited for it was cancelled; to be asked for in its own thread.

    What this module did not start is never abandoned.
    """
    left: threading.Event | None = getattr(_work, "left", None)
    return lambda: left is not None and left.is_set()


async def _in_thread(function: Callable[[], T], undo: Callable[[T], object] | None) -> T:
    left = threading.Event()

    def work() -> T:
        _work.left = left
        try:
            return function()
        finally:
            _work.left = None

    loop = asyncio.get_running_loop()
    future = loop.run_in_executor(None, copy_context().run, work)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        left.set()
        await asyncio.wait([future])
        has_result = future.exception() is None  # asked for in any case: nobody else wants to know of a failure
        if undo is not None and has_result:
            await asyncio.wait([loop.run_in_executor(None, undo, future.result())])
        raise
