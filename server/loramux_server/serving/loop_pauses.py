"""How long the event loop stood still: every stream of the server stands still with it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

TICK_SECONDS = 0.01  # a pause is told too short by at most as much
LEAST_SECONDS = 0.002  # shorter ones are no pauses: a timer is never exact
WINDOW_SECONDS = 60.0


class LoopPauses:
    """Wakes up again and again, and measures how much too late. Owner: the event loop.

    It is late while anything else runs on the loop, and while another thread holds the interpreter's lock.
    """

    def __init__(
        self, paused: Callable[[float, float], None], *, tick: float = TICK_SECONDS, window: float = WINDOW_SECONDS
    ) -> None:
        """`paused` is told of a pause, and of the longest in the last one to two windows, in seconds.

        It is also told, with 0 for the pause, when a window ends.
        """
        self._paused = paused
        self._tick = tick
        self._window = window
        self._earlier = self._current = 0.0  # the longest of the window before this one, and of this one
        self._window_ends = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Called on this loop, which is measured from now on."""
        self._window_ends = loop.time() + self._window
        self._wait(loop)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _wait(self, loop: asyncio.AbstractEventLoop) -> None:
        due = loop.time() + self._tick
        self._timer = loop.call_at(due, self._woke, loop, due)

    def _woke(self, loop: asyncio.AbstractEventLoop, due: float) -> None:
        now = loop.time()
        pause = now - due
        if now > self._window_ends:
            self._earlier, self._current, self._window_ends = self._current, 0.0, now + self._window
            self._paused(0.0, self._earlier)
        if pause >= LEAST_SECONDS:
            self._current = max(self._current, pause)
            self._paused(pause, max(self._earlier, self._current))
        self._wait(loop)
