"""The engine thread: replies, how they end, aborts, what is counted."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from loramux_adapters.errors import AdapterCorrupt
from loramux_adapters.lora.host_cache import HostAdapter, HostCache
from loramux_server.engine.engine import MAX_FAILED_STEPS, Engine
from loramux_server.engine.scheduling.admission import SchedulerConfig
from loramux_server.engine.scheduling.scheduler import Scheduler
from loramux_server.engine.scheduling.sequence import Batch, FinishReason
from loramux_server.errors import EngineDead, RequestError, ServerBusy
from support.fakes_engine import FakeRunner, sequence, solo_reply, solo_scores
from support.fakes_rig import Rig, eventually

ERROR, LENGTH, STOP, ABORT = FinishReason.ERROR, FinishReason.LENGTH, FinishReason.STOP, FinishReason.ABORT


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig().start()
    yield rig
    rig.stop()


def test_a_reply_has_exactly_its_tokens_and_one_finish_reason(rig: Rig) -> None:
    one = sequence("one", max_tokens=5)
    rig.engine.submit(one)
    assert rig.deliveries.reason("one") is LENGTH
    outputs = rig.deliveries.of("one")
    assert [output.token_id for output in outputs] == solo_reply(one)
    assert [output.finish_reason for output in outputs] == [None] * 4 + [LENGTH]


def test_replies_in_company_equal_replies_alone(rig: Rig) -> None:
    sequences = [
        sequence(
            str(i), prompt=1 + 7 * i % 40, max_tokens=1 + i % 6, version=[None, "v", "w", "x"][i % 4], rank=8 + i % 4
        )
        for i in range(24)
    ]
    for one in sequences:
        rig.engine.submit(one)
    for one in sequences:
        rig.deliveries.final(one.id)
        assert rig.deliveries.tokens(one.id) == solo_reply(one)


def test_a_stop_token_ends_the_reply_and_is_no_part_of_it(rig: Rig) -> None:
    free = solo_reply(sequence("one", max_tokens=5))
    rig.engine.submit(sequence("one", max_tokens=5, stop=[free[2]]))
    final = rig.deliveries.final("one")
    assert (final.token_id, final.finish_reason) == (None, STOP)
    assert rig.deliveries.tokens("one") == free[:2]


def test_a_stop_token_in_the_last_place_is_a_stop(rig: Rig) -> None:
    free = solo_reply(sequence("one", max_tokens=3))
    rig.engine.submit(sequence("one", max_tokens=3, stop=[free[2]]))
    assert rig.deliveries.reason("one") is STOP


def test_the_first_output_and_only_it_carries_the_waiting_times() -> None:
    rig = Rig()
    rig.clock.advance(2)
    rig.engine.submit(sequence("one", max_tokens=2))
    rig.start()
    rig.deliveries.final("one")
    first, second = rig.deliveries.of("one")
    assert (first.queue_seconds, first.first_token_seconds) == (2, 2)
    assert (second.queue_seconds, second.first_token_seconds) == (None, None)
    assert rig.metrics.of("queued") == [(2,)] and rig.metrics.of("first_token") == [(2,)]
    rig.stop()


def test_all_outputs_of_a_step_are_delivered_in_one_call() -> None:
    rig = Rig()
    for name in "abc":
        rig.engine.submit(sequence(name, max_tokens=2))
    rig.start()
    rig.deliveries.final("c")
    assert [[id for id, _ in call] for call in rig.deliveries.calls] == [["a", "b", "c"]] * 2
    rig.stop()


def test_tokens_loads_and_evictions_are_counted() -> None:
    rig = Rig(rows=8)
    for version in ("v", "w"):
        rig.engine.submit(sequence(version, prompt=4, max_tokens=3, version=version))
    rig.start()
    rig.deliveries.final("w")
    rig.stop()
    counted = [(adapter, prompt, generated) for adapter, prompt, generated in rig.metrics.of("tokens")]
    assert counted == [(version, *counts) for version in ("v", "w") for counts in [(4, 1), (0, 1), (0, 1)]]
    assert len(rig.metrics.of("slot_loaded")) == 2 and rig.metrics.of("evicted") == [(1,)]
    assert len(rig.metrics.of("inter_token")) == 4


def test_an_idle_engine_does_not_spin(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.engine.submit(sequence("one", max_tokens=1))
    rig.deliveries.final("one")
    steps: list[float] = []
    schedule = rig.scheduler.schedule

    def counted() -> Batch:
        steps.append(time.monotonic())
        return schedule()

    monkeypatch.setattr(rig.scheduler, "schedule", counted)
    time.sleep(0.05)
    assert len(steps) <= 1


def test_the_end_of_a_load_wakes_the_engine() -> None:
    rig = Rig(instant=False).start()
    rig.engine.submit(sequence("one", version="v"))
    eventually(lambda: rig.host.loading == ["v"])
    rig.host.end_load("v")
    assert rig.deliveries.reason("one") is LENGTH
    rig.stop()


def test_a_failed_load_ends_its_sequence_with_the_reason_and_nobody_else(rig: Rig) -> None:
    rig.host.broken = {"bad"}
    rig.engine.submit(sequence("bad", version="bad"))
    rig.engine.submit(sequence("good", version="good"))
    final = rig.deliveries.final("bad")
    assert (final.finish_reason, final.error) == (ERROR, "version bad is broken")
    assert rig.deliveries.reason("good") is LENGTH


def test_an_abort_frees_a_running_sequence_before_the_next_step(rig: Rig) -> None:
    rig.hold_step("leaver", "stayer")
    rig.engine.abort("leaver")
    rig.runner.gate.set()
    assert rig.deliveries.reason("leaver") is ABORT
    assert rig.deliveries.reason("stayer") is LENGTH
    assert [row.sequence.id for row in rig.runner.batches[-1].rows] == ["stayer"]
    assert sum(row.sequence.id == "leaver" for batch in rig.runner.batches for row in batch.rows) <= 2
    assert rig.metrics.of("aborted") == [()]


def test_an_abort_takes_a_waiting_sequence_out_of_the_queue() -> None:
    rig = Rig(instant=False).start()
    rig.engine.submit(sequence("one", version="v"))
    eventually(lambda: rig.host.loading == ["v"])
    rig.engine.abort("one")
    assert rig.deliveries.reason("one") is ABORT
    rig.stop()


def test_an_abort_of_an_unknown_or_ended_sequence_is_ignored(rig: Rig) -> None:
    rig.engine.submit(sequence("one", max_tokens=1))
    rig.deliveries.final("one")
    rig.engine.abort("one")
    rig.engine.abort("never seen")
    rig.engine.submit(sequence("two", max_tokens=1))
    rig.deliveries.final("two")
    assert len(rig.deliveries.of("one")) == 1


def test_an_id_can_be_used_again_once_its_sequence_has_ended(rig: Rig) -> None:
    for _ in range(2):
        rig.engine.submit(sequence("one", max_tokens=1))
        eventually(lambda: not rig.inbox._live)
    assert len(rig.deliveries.of("one")) == 2


def test_a_full_inbox_is_busy_and_a_sequence_that_can_never_run_is_refused() -> None:
    rig = Rig(max_waiting=2)
    rig.engine.submit(sequence("a"))
    rig.engine.submit(sequence("b"))
    with pytest.raises(ServerBusy):
        rig.engine.submit(sequence("c"))
    with pytest.raises(RequestError):
        rig.engine.submit(sequence("d", prompt=1000))
    rig.start()
    assert rig.deliveries.reason("b") is LENGTH
    rig.stop()


def test_the_queue_counts_against_the_limit_like_the_inbox() -> None:
    rig = Rig(max_waiting=1, instant=False).start()
    rig.engine.submit(sequence("a", version="v"))
    eventually(lambda: rig.host.loading == ["v"])
    with pytest.raises(ServerBusy):
        rig.engine.submit(sequence("b"))
    rig.host.end_load("v")
    rig.deliveries.final("a")
    rig.engine.submit(sequence("b"))
    rig.deliveries.final("b")
    rig.stop()


def test_the_stats_name_the_adapters_that_are_waited_for() -> None:
    rig = Rig(instant=False).start()
    for name, version in (("one", "v"), ("two", "v"), ("three", "w")):
        rig.engine.submit(sequence(name, version=version, max_tokens=1))
    eventually(lambda: rig.engine.stats.waiting_by_adapter == {"v": 2, "w": 1})
    rig.host.end_load("v")
    rig.deliveries.final("two")
    eventually(lambda: rig.engine.stats.waiting_by_adapter == {"w": 1})
    rig.host.end_load("w")
    rig.deliveries.final("three")
    rig.stop()
    assert rig.engine.stats.waiting_by_adapter == {}


def test_the_stats_count_what_is_held_and_name_what_is_resident() -> None:
    rig = Rig(rows=16, num_blocks=8, config=SchedulerConfig(max_num_seqs=1)).start()
    rig.engine.submit(sequence("first", version="v", max_tokens=1))
    rig.deliveries.final("first")
    rig.hold_step("second", "third")
    stats = rig.engine.stats
    assert (stats.running, stats.kv_blocks_used, stats.kv_blocks_total) == (1, 3, 8)
    assert (stats.slot_rows_used, stats.slot_rows_total, stats.resident) == (8, 16, frozenset("v"))
    eventually(lambda: rig.engine.stats.waiting == 1)
    rig.stop()
    assert rig.engine.stats.running == rig.engine.stats.waiting == 0


def test_the_host_cache_feeds_the_engine_even_with_no_room_to_spare() -> None:
    def load(version: str) -> HostAdapter:
        if version == "v1":
            raise AdapterCorrupt("its bytes have changed")
        return HostAdapter(version, rank=8, nbytes=100, modules={})

    rig = Rig(rows=16, config=SchedulerConfig(max_num_seqs=3))
    cache = HostCache(load, budget_bytes=1, on_ready=rig.inbox.wake)
    scheduler = Scheduler(rig.scheduler.config, rig.blocks, rig.slots, cache)
    runner = FakeRunner(16, rig.blocks)
    engine = Engine(scheduler, runner, rig.inbox, rig.metrics)
    engine.start(rig.deliveries)
    for i in range(20):
        engine.submit(sequence(str(i), version=f"v{i % 5}"))
    for i in range(20):
        final = rig.deliveries.final(str(i))
        assert final.error == ("its bytes have changed" if i % 5 == 1 else None)
    engine.drain(10)
    assert cache.stats().entries == cache.stats().pinned == 0
    cache.check_integrity()
    cache.close()


def test_prompt_scores_come_with_the_first_output_and_those_of_continuations_with_the_last(rig: Rig) -> None:
    one = sequence("one", prompt=6, max_tokens=3, scored_from=2, continuations=[(1, 2), (3, 4)])
    rig.engine.submit(one)
    rig.deliveries.final("one")
    outputs, (prompt, continuations) = rig.deliveries.of("one"), solo_scores(one)

    assert [output.token_id for output in outputs] == solo_reply(one)
    assert [list(output.prompt_logprobs) for output in outputs] == [prompt, [], []]
    assert [list(map(list, output.continuations)) for output in outputs] == [[], [], continuations]


@pytest.mark.parametrize("stop", [False, True])
def test_a_reply_that_ends_at_once_ends_when_all_continuations_are_read(rig: Rig, stop: bool) -> None:
    (first,) = solo_reply(sequence("one", max_tokens=1))
    one = sequence("one", max_tokens=1, stop=[first] if stop else (), continuations=[(1, 2, 3)])
    rig.engine.submit(one)
    assert rig.deliveries.reason("one") is (STOP if stop else LENGTH)
    (output,) = rig.deliveries.of("one")
    assert output.token_id == (None if stop else first)
    assert list(map(list, output.continuations)) == solo_scores(one)[1]
    assert output.first_token_seconds is not None


def test_a_sequence_without_a_reply_ends_with_its_scores(rig: Rig) -> None:
    one = sequence("one", prompt=9, max_tokens=0, scored_from=1, continuations=[(1, 2, 3)])
    rig.engine.submit(one)
    assert rig.deliveries.reason("one") is LENGTH
    (output,) = rig.deliveries.of("one")
    prompt, continuations = solo_scores(one)
    assert output.token_id is None and list(output.prompt_logprobs) == prompt
    assert list(map(list, output.continuations)) == continuations


def test_an_engine_without_a_thread_works_off_what_it_has_on_the_callers() -> None:
    rig = Rig()
    for name in ("a", "b"):
        rig.engine.submit(sequence(name, version=name))
    rig.engine.work_off(rig.deliveries)
    rig.engine.submit(sequence("c"))
    rig.engine.work_off(rig.deliveries)
    assert {name: rig.deliveries.tokens(name) for name in "abc"} == {
        name: solo_reply(sequence(name, version=None if name == "c" else name)) for name in "abc"
    }
    rig.runner.failures = [RuntimeError("device lost")] * MAX_FAILED_STEPS
    for name in "def":
        rig.engine.submit(sequence(name))
        if name != "f":
            rig.engine.work_off(rig.deliveries)
    with pytest.raises(EngineDead):
        rig.engine.work_off(rig.deliveries)
