"""What the metrics hear of a step."""

from __future__ import annotations

import pytest

from loramux_adapters.lora.slots import Slot
from loramux_server.engine.inbox import Backlog
from loramux_server.engine.scheduling.fair_share import Line, Waiting
from loramux_server.engine.scheduling.sequence import Batch, ScheduledSequence, SlotLoad
from loramux_server.engine.step_metrics import StepMetrics, WorkRate
from support.fakes_engine import FakeMetrics, sequence


def test_a_step_reports_its_size_its_adapters_and_its_tokens_by_adapter() -> None:
    sink = FakeMetrics()
    metrics = StepMetrics(sink)
    base, first, second = sequence("base"), sequence("first", version="v"), sequence("second", version="v")
    first.num_computed, second.num_computed = 1, 6
    rows = [ScheduledSequence(base, 4, True), ScheduledSequence(first, 3, False), ScheduledSequence(second, 1, True)]
    for one in (base, first, second):
        one.num_computed, one.scheduled_at = 4, 2.0
    second.num_computed = 7
    metrics.token_chosen(base, True, 3.0)
    metrics.token_chosen(second, True, 3.0)
    metrics.step_done(Batch(rows), 0.5, 0)
    assert sink.of("step_done") == [(3, 1, 0.5)]
    assert sorted(sink.of("tokens"), key=str) == [("v", 3, 1), (None, 4, 1)]
    assert sink.of("queued") == [(2.0,)], "only the sequence that ran for the first time"


def test_tokens_are_timed_from_arrival_and_from_the_one_before() -> None:
    sink = FakeMetrics()
    metrics = StepMetrics(sink)
    one = sequence("one")
    for now in (3.0, 4.0, 6.0):
        metrics.token_chosen(one, True, now)
    metrics.token_chosen(one, False, 9.0)
    assert sink.of("first_token") == [(3.0,)]
    assert sink.of("inter_token") == [(1.0,), (2.0,)]
    assert one.first_token_at == 3.0 and one.last_token_at == 6.0


def test_slot_loads_and_new_evictions_are_counted_once() -> None:
    sink = FakeMetrics()
    metrics = StepMetrics(sink)
    loads = [SlotLoad(Slot(0, 8), "a", seconds=0.25), SlotLoad(Slot(8, 8), "b", seconds=0.5)]
    metrics.step_done(Batch([], loads), 1.0, 3)
    metrics.step_done(Batch(), 1.0, 3)
    assert sink.of("slot_loaded") == [(0.25,), (0.5,)]
    assert sink.of("evicted") == [(3,)]


def line_of(version: str, *lengths: tuple[int, int]) -> Line:
    """Of sequences with so many tokens of prompt and, at most, of reply."""
    line = Line(("", version, version), {version: 0})
    for number, (prompt, reply) in enumerate(lengths):
        line.add(Waiting(sequence(f"{version} {number}", prompt=prompt, max_tokens=reply, version=version), number))
    return line


def test_how_long_a_queue_takes_is_what_it_asks_for_at_the_pace_of_the_last_steps() -> None:
    rate = WorkRate()
    lines = [line_of("v", (10, 5), (20, 5)), line_of("w", (4, 3))]
    assert rate.backlog(lines) == {("", "v"): Backlog(2, 0.0), ("", "w"): Backlog(1, 0.0)}, "nothing is known yet"
    reads, writes = sequence("reads", prompt=8), sequence("writes", prompt=4)
    writes.num_computed = 4
    for _ in range(3):  # 8 of a prompt and one of a reply: 10 a second
        rate.step_done(Batch([ScheduledSequence(reads, 8, False), ScheduledSequence(writes, 1, True)]), 1.0)
    assert rate.backlog(lines)["", "v"].seconds == pytest.approx((30 + 2 * 10) / 10)
    ended = sequence("ended")
    ended.output = [1, 2]
    rate.ended(ended)
    found = rate.backlog([*lines, line_of("v", (10, 1))])
    assert found["", "v"] == Backlog(3, pytest.approx((30 + 2 * 4) / 10 + (10 + 2 * 1) / 10))
    assert found["", "w"].seconds == pytest.approx((4 + 2 * 2) / 10)


def test_the_pace_is_that_of_late() -> None:
    rate, line = WorkRate(), line_of("v", (10, 0))
    one = sequence("one", prompt=10)
    for seconds in (1.0, 2.0):
        for _ in range(600):
            rate.step_done(Batch([ScheduledSequence(one, 10, False)]), seconds)
        assert rate.backlog([line])["", "v"].seconds == pytest.approx(seconds, rel=0.02)
