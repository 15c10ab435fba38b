"""What the metrics hear of a step."""

from __future__ import annotations

from loramux_adapters.lora.slots import Slot
from loramux_server.engine.sequence import Batch, ScheduledSequence, SlotLoad
from loramux_server.engine.step_metrics import StepMetrics
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
