from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import pytest

from loramux_server.metrics.metrics import Metrics
from loramux_server.serving.loop_pauses import LoopPauses


class ClockedLoop:
    """A loop whose timers come due as late as the test says. `timer` is the one that waits."""

    def __init__(self) -> None:
        self.now = 100.0
        self.timer: tuple[float, Callable[..., None], tuple[Any, ...]] | None = None

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, callback: Callable[..., None], *args: Any) -> ClockedLoop:
        assert self.timer is None
        self.timer = (when, callback, args)
        return self

    def cancel(self) -> None:
        self.timer = None

    def wake(self, late: float = 0.0) -> None:
        assert self.timer is not None
        (when, callback, args), self.timer = self.timer, None
        self.now = when + late
        callback(*args)


def started(tick: float, window: float) -> tuple[ClockedLoop, LoopPauses, list[tuple[float, float]]]:
    loop, told = ClockedLoop(), list[tuple[float, float]]()
    pauses = LoopPauses(lambda pause, longest: told.append((pause, longest)), tick=tick, window=window)
    pauses.start(cast(asyncio.AbstractEventLoop, loop))
    return loop, pauses, told


def test_a_pause_is_told_with_the_longest_so_far_and_what_is_no_pause_is_not() -> None:
    loop, pauses, told = started(tick=0.01, window=60.0)
    for late in (0.0, 0.25, 0.001, 0.125):
        loop.wake(late)
    assert [pytest.approx(one) for one in told] == [(0.25, 0.25), (0.125, 0.25)]
    pauses.stop()
    assert loop.timer is None


def test_a_pause_is_forgotten_when_two_windows_have_passed() -> None:
    loop, _, told = started(tick=1.0, window=10.0)
    loop.wake(0.5)
    for _ in range(11):
        loop.wake()
    assert told[-1] == (0.0, 0.5)
    for _ in range(11):
        loop.wake()
    assert told[-1] == (0.0, 0.0)


@pytest.mark.anyio
async def test_a_real_loop_is_measured_until_it_is_told_to_stop() -> None:
    told: list[float] = []
    woke = asyncio.Event()

    def paused(pause: float, longest: float) -> None:
        told.append(longest)
        woke.set()

    pauses = LoopPauses(paused, tick=0.001, window=0.002)
    pauses.start(asyncio.get_running_loop())
    await woke.wait()
    pauses.stop()
    assert told


def test_pauses_are_measured_for_prometheus() -> None:
    metrics = Metrics()
    metrics.loop_paused(0.03, 0.2)
    metrics.loop_paused(0.0, 0.2)
    text = metrics.render().decode()
    assert 'loramux_event_loop_pause_seconds_bucket{le="0.03"} 1.0' in text
    assert 'loramux_event_loop_pause_seconds_bucket{le="0.02"} 0.0' in text
    assert "loramux_event_loop_longest_pause_seconds 0.2" in text
