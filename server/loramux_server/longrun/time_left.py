"""How long work will still take, from how long it has taken."""

from __future__ import annotations

import time
from collections.abc import Callable

LEAST_SECONDS = 1.0  # of work that a guess is made from


class TimeLeft:
    """The time that is left of one piece of work after another. Used by one thread at a time."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._what: object = None
        self._began = 0.0
        self._first = 0

    def left(self, what: object, done: int, total: int) -> str:
        """`, 0:12 left`, or nothing where nobody can tell yet. `what`: the piece; another one begins anew."""
        now = self._clock()
        if what != self._what or done < self._first:
            self._what, self._began, self._first = what, now, done
        elapsed, since = now - self._began, done - self._first
        if since <= 0 or elapsed < LEAST_SECONDS or done >= total:
            return ""
        return f", {duration(elapsed / since * (total - done))} left"


def duration(seconds: float) -> str:
    """`0:07`, `12:30` or `3:05:00`."""
    whole = round(seconds)
    minutes, hours = whole // 60 % 60, whole // 3600
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
