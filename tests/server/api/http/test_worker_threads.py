from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from starlette.requests import ClientDisconnect

from loramux_server.api.http.worker_threads import entered, offload, offload_or_undo, until_gone


@pytest.mark.anyio
async def test_work_runs_in_another_thread_and_its_error_comes_back() -> None:
    assert await offload(threading.get_ident) != threading.get_ident()
    with pytest.raises(ZeroDivisionError):
        await offload(divmod, 1, 0)


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
    task = asyncio.create_task(offload_or_undo(work.undone.append, work))
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
        async with entered(manager()) as value:
            assert value == "value"
            raise KeyError
    assert threading.get_ident() not in seen and len(seen) == 2


@pytest.mark.anyio
async def test_work_that_is_done_first_gives_its_result() -> None:
    async def receive() -> dict[str, Any]:
        await asyncio.Event().wait()
        return {}

    async def work() -> int:
        return 5

    assert await until_gone(receive, work()) == 5


@pytest.mark.anyio
async def test_work_is_cancelled_when_the_client_leaves() -> None:
    messages = [{"type": "http.request"}, {"type": "http.disconnect"}]
    cancelled = False

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    async def work() -> None:
        nonlocal cancelled
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled = True
            raise

    with pytest.raises(ClientDisconnect):
        await until_gone(receive, work())
    assert cancelled
