from __future__ import annotations

import asyncio
import time

import pytest

from loramux_server.metrics.metrics import Metrics
from loramux_server.serving.loop_pauses import LoopPauses


@pytest.mark.anyio
async def test_a_pause_of_the_event_loop_is_found_and_remembered_for_a_while() -> None:
    seen: list[tuple[float, float]] = []
    pauses = LoopPauses(lambda pause, longest: seen.append((pause, longest)), tick=0.001, window=0.05)
    pauses.start()
    await asyncio.sleep(0.01)
    time.sleep(0.03)
    await asyncio.sleep(0.01)
    longest = max(pause for pause, _ in seen)
    assert longest >= 0.028  # 0.03 less a tick, and less what a clock may differ
    assert seen[-1][1] == longest
    while max(pause for pause, _ in seen[-20:]) >= longest or seen[-1][1] >= longest:
        await asyncio.sleep(0.01)  # forgotten when two windows have passed
    pauses.stop()
    await asyncio.sleep(0.01)
    count = len(seen)
    await asyncio.sleep(0.01)
    assert len(seen) == count


def test_pauses_are_measured_for_prometheus() -> None:
    metrics = Metrics()
    metrics.loop_paused(0.03, 0.2)
    text = metrics.render().decode()
    assert 'loramux_event_loop_pause_seconds_bucket{le="0.03"} 1.0' in text
    assert 'loramux_event_loop_pause_seconds_bucket{le="0.02"} 0.0' in text
    assert "loramux_event_loop_longest_pause_seconds 0.2" in text
