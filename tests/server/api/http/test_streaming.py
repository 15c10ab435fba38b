from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.requests import ClientDisconnect

from loramux_server.api.http.streaming import until_gone


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


@pytest.mark.anyio
async def test_who_is_cancelled_from_outside_is_not_told_that_the_client_left() -> None:
    async def receive() -> dict[str, Any]:
        await asyncio.Event().wait()
        return {}

    task = asyncio.create_task(until_gone(receive, asyncio.Event().wait()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.anyio
async def test_a_client_that_leaves_does_not_disturb_what_comes_after() -> None:
    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    with pytest.raises(ClientDisconnect):
        await until_gone(receive, asyncio.Event().wait())
    async with asyncio.timeout(1):
        await asyncio.sleep(0.01)


@pytest.mark.anyio
async def test_what_the_work_raises_is_raised() -> None:
    async def receive() -> dict[str, Any]:
        await asyncio.Event().wait()
        return {}

    async def work() -> None:
        await asyncio.sleep(0)
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        await until_gone(receive, work())
