"""How long the event loop stood still: every stream of the server stands still with it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

TICK_SECONDS = 0.01  # a pause is found, and told too short by as much as this
WINDOW_SECONDS = 60.0


class LoopPauses:
    """Wakes up again and again, and measures how much too late. Owner: the event loop.

    It is late while anything else runs on the loop, and while another thread holds the interpreter's lock.
    """

    def __init__(
        self, paused: Callable[[float, float], None], *, tick: float = TICK_SECONDS, window: float = WINDOW_SECONDS
    ) -> None:
        """`paused` is told, at every tick, the pause and the longest one of the last one to two windows, in seconds."""
        self._paused = paused
        self._tick = tick
        self._window = window
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        earlier = current = 0.0
        now = began = time.monotonic()
        while True:
            due = now + self._tick
            await asyncio.sleep(self._tick)
            now = time.monotonic()
            if now - began > self._window:
                earlier, current, began = current, 0.0, now
            pause = max(0.0, now - due)
            current = max(current, pause)
            self._paused(pause, max(earlier, current))
