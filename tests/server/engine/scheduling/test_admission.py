"""Who may start, who may pass whom, and what is held in host memory for those that wait."""

from __future__ import annotations

import pytest

from loramux_adapters.lora.slots import Slot
from loramux_server.engine.scheduling.admission import SchedulerConfig
from loramux_server.engine.scheduling.sequence import AdapterUse, Sequence
from loramux_server.errors import ConfigError
from support.fakes_engine import sequence
from support.fakes_scheduler import Bench
from support.lines_run import lines_run


def test_no_more_than_max_num_seqs_run() -> None:
    bench = Bench(SchedulerConfig(max_num_seqs=2))
    bench.add(*(sequence(name, max_tokens=2) for name in "abc"))
    bench.step()
    assert bench.running == ["a", "b"] and bench.waiting == ["c"]
    bench.run(2)
    assert bench.running == ["c"]


def test_a_sequence_without_enough_blocks_waits() -> None:
    bench = Bench(block_size=4, num_blocks=3)
    bench.add(sequence("a", prompt=5, max_tokens=4), sequence("b", prompt=5, max_tokens=4))
    bench.step()
    assert bench.running == ["a"] and bench.waiting == ["b"]
    bench.run(4)
    assert bench.running == ["b"]


def test_a_loading_version_is_passed_over_without_limit() -> None:
    bench = Bench(SchedulerConfig(max_passed_over=0, max_wait_seconds=0), instant=False)
    bench.add(sequence("slow", version="v"))
    for i in range(50):
        bench.add(sequence(str(i), max_tokens=1))
        bench.clock.advance(100)
        bench.step()
    assert bench.waiting == ["slow"] and len(bench.ended) == 50
    bench.host.end_load("v")
    bench.step()
    assert bench.running == ["slow"]


def test_a_waiting_sequence_pins_its_version_until_the_copy_is_made() -> None:
    bench = Bench(instant=False)
    bench.add(sequence("a", version="v"))
    bench.step()
    bench.host.end_load("v")
    bench.host.evict_unpinned()
    bench.scheduler.prefetch()
    batch = bench.scheduler.schedule()
    assert bench.host.pinned == {"v"}
    bench.scheduler.commit(batch)
    assert bench.host.pinned == set()


def test_what_lies_on_the_device_is_held_in_host_memory_for_nobody() -> None:
    bench = Bench(SchedulerConfig(max_num_seqs=1), instant=False)
    bench.add(sequence("a", version="v", max_tokens=1), sequence("b", version="v", max_tokens=1))
    bench.step()
    assert bench.host.pins["v"] == 1, "once for all that need it"
    bench.host.end_load("v")
    bench.step()
    assert bench.host.pinned == set() and bench.waiting == ["b"]
    bench.host.evict_unpinned()
    bench.step()
    assert bench.host.requests == ["v"] and bench.ended.keys() == {"a", "b"}


def test_a_failed_load_ends_every_sequence_of_that_version_and_no_other() -> None:
    bench = Bench(instant=False)
    bench.host.broken = {"bad"}
    bench.add(*(sequence(name, version=version) for name, version in (("a", "bad"), ("b", "good"), ("c", "bad"))))
    bench.step()
    bench.host.end_load("bad")
    bench.host.end_load("good")
    bench.step()
    assert bench.ended == {"a": "failed", "c": "failed"}
    assert bench.reasons["a"] == "version bad is broken"
    assert bench.running == ["b"]
    assert bench.host.pinned == set()


def test_a_version_that_failed_is_loaded_again_for_a_later_sequence() -> None:
    bench = Bench()
    bench.host.broken = {"v"}
    bench.add(sequence("a", version="v"))
    bench.step()
    bench.host.broken = set()
    bench.add(sequence("b", version="v"))
    bench.step()
    assert bench.running == ["b"]


def test_only_so_many_versions_are_held_in_host_memory_for_waiting_sequences() -> None:
    bench = Bench(SchedulerConfig(max_prefetch=2), instant=False)
    bench.add(
        *(sequence(name, version=name) for name in "abc"), sequence("a2", version="a"), sequence("base", max_tokens=9)
    )
    bench.step()
    assert bench.host.requests == ["a", "b"] and bench.host.pinned == {"a", "b"}
    assert bench.running == ["base"]
    bench.host.end_load("a")
    bench.run(2)
    assert bench.running == ["base", "a", "a2"]
    assert bench.host.requests == ["a", "b", "c"]


def test_versions_are_held_in_host_memory_only_while_they_fit_its_budget() -> None:
    bench = Bench(SchedulerConfig(max_prefetch_bytes=100), instant=False)
    sizes = {"huge": 101, "a": 60, "b": 40, "c": 41, "small": 1}
    bench.add(*(sequence(name, version=name, nbytes=nbytes, max_tokens=1) for name, nbytes in sizes.items()))
    bench.step()
    assert bench.host.pinned == {"huge"}, "one is held whatever its size"
    bench.host.end_load("huge")
    bench.run(2)
    assert bench.host.pinned == {"a", "b"}
    bench.host.end_load("a")
    bench.step()
    assert bench.host.pinned == {"b"} and bench.host.loading == ["b"]
    bench.step()
    assert bench.host.pinned == {"b", "c", "small"}


def test_a_large_version_is_not_shut_out_by_small_ones_that_would_fit() -> None:
    bench = Bench(SchedulerConfig(max_prefetch_bytes=10), instant=False)
    bench.add(sequence("first", version="v", nbytes=1), sequence("large", version="large", nbytes=10))
    for number in range(3):
        bench.add(sequence(f"small {number}", version=f"s{number}", nbytes=1))
    bench.step()
    assert bench.host.pinned == {"v"}
    bench.abort({"first"})
    bench.step()
    assert bench.host.pinned == {"large"}


def test_nobody_gets_a_hold_on_host_memory_before_an_older_one_that_lacks_it() -> None:
    bench = Bench(SchedulerConfig(max_prefetch=1), instant=False)
    bench.add(sequence("a", version="v"), sequence("b", version="w"), sequence("c", version="x"))
    bench.step()
    bench.abort({"a"})
    bench.step()
    assert bench.host.pinned == {"w"}


def blocked_by_a_slot(config: SchedulerConfig) -> Bench:
    """`holder` runs in half of the table, `wide` needs all of it; base sequences need nothing."""
    bench = Bench(config, rows=16)
    bench.add(sequence("holder", version="h", max_tokens=40))
    bench.step()
    bench.add(sequence("wide", version="w", rank=16, max_tokens=1))
    return bench


def test_a_blocked_sequence_is_passed_over_so_many_times_and_then_is_a_barrier() -> None:
    bench = blocked_by_a_slot(SchedulerConfig(max_passed_over=3))
    bench.add(*(sequence(str(i), max_tokens=1) for i in range(5)))
    bench.run(3)
    assert set(bench.ended) == {"0", "1", "2"}
    assert bench.waiting == ["wide", "3", "4"]
    bench.abort({"holder"})
    bench.step()
    assert {"wide", "3", "4"} <= set(bench.ended)


def test_a_blocked_sequence_is_passed_over_for_so_long_and_then_is_a_barrier() -> None:
    bench = blocked_by_a_slot(SchedulerConfig(max_wait_seconds=5.0))
    bench.step()
    bench.clock.advance(4.9)
    bench.add(sequence("in time", max_tokens=1))
    bench.step()
    bench.clock.advance(0.1)
    bench.add(sequence("too late", max_tokens=1))
    bench.step()
    assert set(bench.ended) == {"in time"}
    assert bench.waiting == ["wide", "too late"]


def test_strict_fifo_lets_nobody_pass() -> None:
    bench = blocked_by_a_slot(SchedulerConfig(max_passed_over=0))
    bench.add(sequence("later", max_tokens=1))
    bench.run(3)
    assert bench.waiting == ["wide", "later"]


def test_a_sequence_that_lacks_blocks_becomes_a_barrier_too() -> None:
    bench = Bench(SchedulerConfig(max_passed_over=2), num_blocks=4, block_size=4)
    bench.add(sequence("half", prompt=4, max_tokens=5))
    bench.step()
    bench.add(sequence("whole", prompt=8, max_tokens=9))
    for i in range(4):
        bench.add(sequence(str(i), prompt=4, max_tokens=1))
    bench.step()
    assert set(bench.ended) == {"0", "1"}
    bench.run(3)
    assert bench.waiting == ["whole", "2", "3"]
    bench.step()
    assert bench.running == ["whole"]


def test_older_sequences_whose_load_ends_pass_a_barrier_behind_them() -> None:
    bench = Bench(SchedulerConfig(max_passed_over=0), rows=16, instant=False)
    bench.add(sequence("holder", version="h", max_tokens=40))
    bench.step()
    bench.host.end_load("h")
    bench.step()
    bench.add(sequence("loading", version="l", max_tokens=40), sequence("wide", version="w", rank=16))
    bench.step()
    bench.host.end_load("w")
    bench.step()
    bench.host.end_load("l")
    bench.step()
    assert bench.running == ["holder", "loading"] and bench.waiting == ["wide"]


def test_a_sequence_aborted_while_it_waits_leaves_with_its_pin() -> None:
    bench = blocked_by_a_slot(SchedulerConfig(max_passed_over=0))
    bench.add(sequence("later", max_tokens=1))
    bench.step()
    assert bench.host.pinned == {"w"}
    bench.abort({"wide", "unknown"})
    assert bench.host.pinned == set()
    bench.step()
    assert bench.ended == {"wide": "aborted", "later": "done"}


def sum_of(id: str, versions: str, *, rank: int = 8, max_tokens: int = 3) -> Sequence:
    """A sequence of one adapter for each letter."""
    return sequence(id, max_tokens=max_tokens, uses=[AdapterUse(version, rank, 1, 0.5) for version in versions])


def test_a_sequence_of_several_adapters_starts_when_all_are_loaded_with_a_slot_for_each() -> None:
    bench = Bench(instant=False)
    one = sum_of("ab", "ab", max_tokens=2)
    bench.add(one, sequence("base", max_tokens=1))
    bench.step()
    bench.host.end_load("a")
    bench.step()
    assert bench.waiting == ["ab"] and bench.host.pinned == {"a", "b"}
    assert not bench.slots.pinned, "it holds nothing of the device while it waits"
    bench.host.end_load("b")
    batch = bench.step()
    assert [(load.version, load.slot) for load in batch.slot_loads] == [("a", Slot(0, 8)), ("b", Slot(8, 8))]
    assert [(scaled.slot, scaled.scale) for scaled in one.slots] == [(Slot(0, 8), 0.5), (Slot(8, 8), 0.5)]
    assert bench.host.pinned == set()
    bench.step()
    bench.check_empty()


def test_one_failed_load_of_several_ends_the_sequence_and_gives_the_others_back() -> None:
    bench = Bench(instant=False)
    bench.host.broken = {"b"}
    bench.add(sum_of("abc", "abc"), sum_of("ac", "ac"))
    bench.step()
    for version in "abc":
        bench.host.end_load(version)
    bench.step()
    assert bench.ended == {"abc": "failed"} and bench.reasons["abc"] == "version b is broken"
    assert bench.running == ["ac"] and bench.host.pinned == set()


def test_a_sequence_that_lacks_one_of_its_slots_takes_none_and_then_is_a_barrier() -> None:
    bench = Bench(SchedulerConfig(max_passed_over=1), rows=24)
    bench.add(sequence("holder", version="h", max_tokens=40))
    bench.step()
    bench.add(sum_of("abc", "abc", max_tokens=1))
    bench.add(*(sequence(str(i), version=f"v{i}", max_tokens=1) for i in range(3)))
    bench.step()
    assert set(bench.ended) == {"0"} and bench.slots.pinned == ["h"]
    bench.step()
    assert bench.waiting == ["abc", "1", "2"]
    bench.abort({"holder"})
    bench.step()
    assert bench.ended["abc"] == "done"


def test_adapters_left_lying_in_each_others_way_are_loaded_anew_rather_than_waited_for() -> None:
    bench = Bench(rows=32)
    for version in "axb":
        bench.add(sequence(version, version=version, max_tokens=1))
        bench.step()
    assert bench.slots.lookup("b") == Slot(16, 8)
    wide = AdapterUse("wide", 16, 1)
    bench.add(sequence("sum", max_tokens=1, uses=[AdapterUse("a", 8), AdapterUse("b", 8), wide]))
    batch = bench.step()
    assert bench.ended["sum"] == "done" and {load.version for load in batch.slot_loads} == {"a", "b", "wide"}
    bench.check_empty()


def test_the_adapters_of_one_sequence_may_be_held_whatever_the_limit_and_nobody_gets_more_beside_them() -> None:
    bench = Bench(SchedulerConfig(max_prefetch=2, max_prefetch_bytes=2), instant=False)
    bench.add(sequence("first", version="f", max_tokens=1), sum_of("abc", "abc"), sequence("d", version="d"))
    bench.step()
    assert bench.host.pinned == {"f"}, "what one sequence needs is held together or not at all"
    bench.host.end_load("f")
    bench.run(2)
    assert bench.host.pinned == {"a", "b", "c"}
    for version in "abc":
        bench.host.end_load(version)
    bench.run(2)
    assert "abc" in bench.running and bench.host.pinned == {"d"}


def test_two_uses_of_one_version_share_its_slot() -> None:
    bench = Bench(rows=8)
    one = sequence("twice", max_tokens=2, uses=[AdapterUse("v", 8, 1, 0.5), AdapterUse("v", 8, 1, 2.0)])
    bench.add(one)
    bench.step()
    assert [scaled.scale for scaled in one.slots] == [0.5, 2.0] and bench.slots.rows_used == 8
    bench.step()
    bench.check_empty()


@pytest.mark.parametrize("field", ["max_num_seqs", "max_batch_tokens", "max_prefetch", "max_prefetch_bytes"])
def test_a_limit_below_one_is_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        SchedulerConfig(**{field: 0})


@pytest.mark.parametrize("field", ["max_passed_over", "max_wait_seconds"])
def test_a_negative_patience_is_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        SchedulerConfig(**{field: -1})


@pytest.mark.parametrize("blocked", [False, True])
def test_a_step_does_not_go_through_all_who_wait(blocked: bool) -> None:
    """Neither where all seats are taken nor where the cache is full."""
    lines = []
    for waiting in (100, 5000):
        bench = Bench(SchedulerConfig(max_num_seqs=100 if blocked else 2), num_blocks=8, block_size=4)
        for number in range(waiting):
            bench.scheduler.add(sequence(str(number), max_tokens=9))

        def step(bench: Bench = bench) -> None:
            bench.scheduler.prefetch()
            bench.scheduler.commit(bench.scheduler.schedule())

        step()
        lines.append(lines_run(step))
    assert lines[1] == pytest.approx(lines[0], rel=0.1)


def test_versions_whose_rows_of_tokens_are_too_many_together_wait_for_each_other() -> None:
    bench = Bench(beside=10)
    bench.host.beside = {"a": 6, "b": 6}
    first, second = sequence("first", version="a", max_tokens=2), sequence("second", version="b", max_tokens=2)
    bench.add(first, second)
    bench.step()
    assert [one.id for one in bench.scheduler.running] == ["first"]
    bench.run(6)
    assert bench.ended == {"first": "done", "second": "done"}
    assert bench.slots.resident == ["b"]


def test_rows_of_tokens_that_can_never_lie_there_together_are_refused_with_what_to_raise() -> None:
    bench = Bench(beside=10 * 2**20)
    bench.host.beside = {"a": 6 * 2**20, "b": 6 * 2**20, "large": 11 * 2**20}
    bench.add(sum_of("both", "ab"), sequence("large", version="large"), sequence("one", version="a", max_tokens=1))
    bench.step()
    assert bench.ended == {"both": "failed", "large": "failed", "one": "done"}
    assert "take 12 MiB, and this server has 10 MiB" in bench.reasons["both"]
    assert "--token-memory-mib" in bench.reasons["large"]
