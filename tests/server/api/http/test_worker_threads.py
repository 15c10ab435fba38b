from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from loramux_server.api.http.worker_threads import enter_in_thread, run_in_thread, run_in_thread_or_undo


@pytest.mark.anyio
async def test_work_runs_in_another_thread_and_its_error_comes_back() -> None:
    assert await run_in_thread(threading.get_ident) != threading.get_ident()
    with pytest.raises(ZeroDivisionError):
        await run_in_thread(divmod, 1, 0)


class Work:
    """Blocking work that the test lets end; `undone` are the results that were taken back."""

    def __init__(self) -> None:
        self.begun, self.proceed = threading.Event(), threading.Event()
        self.ended = False
        self.undone: list[str] = []

    def __call__(self) -> str:
        self.begun.set()
        assert self.proceed.wait(5)
        self.ended = True
        return "lease"


@pytest.mark.anyio
async def test_work_ends_before_its_cancelled_caller_does_and_is_undone() -> None:
    work = Work()
    task = asyncio.create_task(run_in_thread_or_undo(work.undone.append, work))
    await asyncio.to_thread(work.begun.wait, 5)
    task.cancel()
    await asyncio.sleep(0.01)
    assert not task.done()
    work.proceed.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert work.ended and work.undone == ["lease"]


@pytest.mark.anyio
async def test_a_context_manager_is_entered_and_left_in_threads_with_its_error() -> None:
    seen: list[Any] = []

    @contextmanager
    def manager() -> Iterator[str]:
        seen.append(threading.get_ident())
        try:
            yield "value"
        except KeyError as error:
            seen.append(threading.get_ident())
            raise RuntimeError("translated") from error

    with pytest.raises(RuntimeError, match="translated"):
        async with enter_in_thread(manager()) as value:
            assert value == "value"
            raise KeyError
    assert threading.get_ident() not in seen and len(seen) == 2
