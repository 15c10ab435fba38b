"""What a step runs: decodes, prefill chunks, slot loads, and what is freed afterwards."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from loramux_server.engine.scheduling.admission import SchedulerConfig
from loramux_server.engine.scheduling.sequence import AdapterUse, Sequence, SequenceStatus, SlotLoad, composed
from loramux_server.errors import RequestError
from support.fakes_engine import sequence, solo_reply, solo_scores
from support.fakes_scheduler import Bench, rows_of


def test_a_prompt_that_fits_the_step_samples_at_once_and_then_decodes_one_token_a_step() -> None:
    bench = Bench()
    one = sequence("one", prompt=5, max_tokens=3)
    bench.add(one)
    assert rows_of(bench.step()) == [("one", 5, True)]
    assert rows_of(bench.step()) == [("one", 1, True)]
    assert rows_of(bench.step()) == [("one", 1, True)]
    assert rows_of(bench.step()) == []
    assert one.output == solo_reply(one)
    assert one.status is SequenceStatus.FINISHED
    bench.check_empty()


def test_a_long_prompt_is_prefilled_in_chunks_and_samples_only_after_the_last() -> None:
    bench = Bench(SchedulerConfig(max_batch_tokens=4))
    bench.add(sequence("long", prompt=10, max_tokens=2))
    steps = [rows_of(bench.step()) for _ in range(4)]
    assert steps == [[("long", 4, False)], [("long", 4, False)], [("long", 2, True)], [("long", 1, True)]]


def test_prefill_gets_what_decodes_leave_in_order_of_admission() -> None:
    bench = Bench(SchedulerConfig(max_batch_tokens=6))
    bench.add(sequence("a", prompt=6, max_tokens=9))
    bench.step()
    bench.add(sequence("b", prompt=8, max_tokens=9), sequence("c", prompt=4, max_tokens=9))
    assert rows_of(bench.step()) == [("a", 1, True), ("b", 5, False)]
    assert rows_of(bench.step()) == [("a", 1, True), ("b", 3, True), ("c", 2, False)]
    assert rows_of(bench.step()) == [("a", 1, True), ("b", 1, True), ("c", 2, True)]


def test_a_chunk_may_be_a_single_token() -> None:
    bench = Bench(SchedulerConfig(max_batch_tokens=3))
    bench.add(sequence("a", prompt=2, max_tokens=4), sequence("b", prompt=3, max_tokens=4))
    assert rows_of(bench.step()) == [("a", 2, True), ("b", 1, False)]


def test_decodes_run_even_when_they_exceed_the_budget_and_prefill_then_waits() -> None:
    bench = Bench(SchedulerConfig(max_batch_tokens=2))
    bench.add(sequence("a", prompt=2, max_tokens=9), sequence("b", prompt=2, max_tokens=9))
    bench.run(3)
    bench.add(sequence("c", prompt=2, max_tokens=9))
    assert rows_of(bench.step()) == [("a", 1, True), ("b", 1, True)]
    assert bench.waiting == ["c"]


def test_a_sequence_gets_the_blocks_of_its_whole_length_when_it_starts() -> None:
    bench = Bench(block_size=4, num_blocks=8)
    one = sequence("one", prompt=5, max_tokens=4)  # 8 tokens are ever cached
    bench.add(one)
    bench.step()
    assert len(one.blocks) == bench.blocks.used == 2


def test_rows_are_base_first_then_one_run_per_slot() -> None:
    bench = Bench()
    versions = ["y", None, "x", "y", None, "x"]
    bench.add(*(sequence(str(i), version=version) for i, version in enumerate(versions)))
    batch = bench.step()
    assert [row.sequence.id for row in batch.rows] == ["1", "4", "0", "3", "2", "5"]


def test_a_slot_load_comes_once_in_the_batch_in_which_the_version_first_runs() -> None:
    bench = Bench()
    bench.add(sequence("a", version="v"), sequence("b", version="v"))
    batch = bench.step()
    slot = bench.slots.lookup("v")
    assert slot is not None
    assert batch.slot_loads == [SlotLoad(slot, "v")]
    bench.add(sequence("c", version="v"))
    assert bench.step().slot_loads == []
    assert len(bench.running) == 3


def test_a_version_stays_resident_after_its_last_sequence() -> None:
    bench = Bench()
    bench.add(sequence("a", version="v", max_tokens=1))
    bench.step()
    assert bench.slots.resident == ["v"] and bench.slots.pinned == []
    bench.host.evict_unpinned()
    bench.add(sequence("b", version="v", max_tokens=1))
    assert bench.step().slot_loads == []
    assert bench.host.requests == ["v"]


def test_a_sequence_aborted_while_it_runs_frees_what_it_holds() -> None:
    bench = Bench()
    bench.add(sequence("a", version="v", max_tokens=9))
    bench.step()
    bench.abort({"a"})
    bench.check_empty()
    assert bench.slots.resident == ["v"]


def test_a_failed_step_ends_its_sequences_and_forgets_its_slot_loads() -> None:
    bench = Bench()
    bench.add(sequence("a", version="old", max_tokens=9))
    bench.step()
    bench.add(sequence("b", version="new", max_tokens=9))
    bench.step(fails=True)
    assert bench.ended == {"a": "broken", "b": "broken"}
    bench.check_empty()
    assert bench.slots.resident == ["old"]
    bench.add(sequence("c", version="new"))
    assert [load.version for load in bench.step().slot_loads] == ["new"]


def test_a_sequence_that_waits_survives_a_failed_step() -> None:
    bench = Bench(SchedulerConfig(max_batch_tokens=2))
    bench.add(sequence("a", prompt=1, max_tokens=2), sequence("b", prompt=9, max_tokens=1))
    bench.step()
    bench.add(sequence("c", prompt=1, max_tokens=9))
    bench.step(fails=True)
    assert bench.ended == {"a": "broken", "b": "broken"}
    bench.step()
    assert bench.running == ["c"]


def test_the_first_step_of_a_sequence_is_stamped() -> None:
    bench = Bench()
    bench.clock.advance(7)
    one = sequence("one")
    bench.add(one)
    bench.step()
    bench.clock.advance(1)
    bench.step()
    assert one.scheduled_at == 7


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "rank", "param"),
    [(0, 1, 8, "prompt"), (1, 0, 8, "max_tokens"), (10, 8, 8, "max_tokens"), (4, 4, 33, "model")],
)
def test_what_could_never_start_is_refused_at_once(prompt: int, max_tokens: int, rank: int, param: str) -> None:
    bench = Bench(rows=32, num_blocks=4, block_size=4)
    with pytest.raises(RequestError) as error:
        bench.add(sequence("x", prompt=prompt, max_tokens=max_tokens, version="v", rank=rank))
    assert error.value.param == param


def test_adapters_that_together_exceed_the_device_are_refused_at_once() -> None:
    bench = Bench(rows=32)
    uses = [AdapterUse("a", 16), AdapterUse("b", 8), AdapterUse("c", 9)]
    with pytest.raises(RequestError, match="16, 8, 9 together take 40 rows") as error:
        bench.add(sequence("x", uses=uses))
    assert error.value.param == "adapters"
    bench.add(sequence("y", max_tokens=1, uses=[*uses[:2], AdapterUse("b", 8, scale=2.0)]))
    bench.step()
    assert bench.ended == {"y": "done"}


def test_rows_of_the_same_sum_are_one_run() -> None:
    bench = Bench()
    a, b = AdapterUse("a", 8), AdapterUse("b", 8)
    kinds = [[a, b], [a], [b], [a, b], [], [a, replace(b, scale=2.0)], [a]]
    bench.add(*(sequence(str(index), uses=uses) for index, uses in enumerate(kinds)))
    batch = bench.step()
    assert [row.sequence.id for row in batch.rows] == ["4", "1", "6", "0", "3", "5", "2"]


def test_the_order_in_which_adapters_are_named_does_not_matter() -> None:
    a, b, none = AdapterUse("a", 8, scale=0.7), AdapterUse("b", 8, scale=-1.0), AdapterUse("c", 8, scale=0.0)
    assert composed([a, b]) == composed([b, none, a]) == (a, b)


def test_what_just_fits_an_idle_server_is_taken() -> None:
    bench = Bench(rows=32, num_blocks=4, block_size=4)
    bench.add(sequence("x", prompt=10, max_tokens=7, version="v", rank=32))
    bench.run(7)
    assert bench.ended == {"x": "done"}


def own(id: str, **fields: Any) -> Sequence:
    return sequence(id, background=True, **fields)


def test_the_servers_own_work_runs_on_the_tokens_that_are_left_and_on_few_of_them() -> None:
    bench = Bench(SchedulerConfig(max_batch_tokens=10, max_background_tokens=3))
    bench.add(sequence("user", prompt=4, max_tokens=9), own("own", prompt=8, max_tokens=2))
    assert sorted(rows_of(bench.step())) == [("own", 3, False), ("user", 4, True)]
    bench.add(sequence("long", prompt=30, max_tokens=1))
    assert sorted(rows_of(bench.step())) == [("long", 9, False), ("own", 1, False), ("user", 1, True)]
    bench.run(3)
    assert sorted(rows_of(bench.step())) == [("own", 1, True), ("user", 1, True)]
    assert bench.ended["own"] == "done" and bench.ended["long"] == "done"


def test_the_servers_own_work_does_not_start_while_somebody_waits_for_a_seat_and_takes_none() -> None:
    bench = Bench(SchedulerConfig(max_num_seqs=1, max_background_wait_seconds=50))
    bench.add(sequence("a", max_tokens=3), sequence("b", max_tokens=3), own("own", max_tokens=9))
    bench.step()
    assert bench.running == ["a"]
    bench.run(2)
    bench.step()
    assert bench.running == ["b", "own"]
    bench.add(sequence("c", max_tokens=3))
    bench.run(3)
    assert bench.running == ["own", "c"], "it took no seat of theirs"


def test_the_servers_own_work_joins_the_queue_when_it_has_waited_for_long() -> None:
    bench = Bench(SchedulerConfig(max_num_seqs=1, max_background_wait_seconds=50))
    bench.add(sequence("a", max_tokens=3), own("own", version="v", max_tokens=1), sequence("b", max_tokens=3))
    bench.step()
    assert bench.host.pinned == {"v"}
    bench.clock.advance(50)
    bench.step()
    bench.add(sequence("c", max_tokens=3))
    bench.run(5)
    assert bench.running == ["own"] or bench.ended.get("own") == "done"
    assert bench.waiting == ["c"]


def test_what_the_servers_own_work_holds_in_host_memory_is_not_taken_from_others() -> None:
    bench = Bench(SchedulerConfig(max_prefetch=1), instant=False)
    bench.add(own("own", version="v"), sequence("user", version="w"))
    bench.step()
    assert bench.host.pinned == {"v", "w"}
    bench.abort({"own"})
    assert bench.host.pinned == {"w"}


def test_the_servers_own_work_survives_a_failed_step_that_it_sat_out() -> None:
    bench = Bench(SchedulerConfig(max_batch_tokens=4, max_background_tokens=2))
    bench.add(own("one", prompt=2, max_tokens=9), own("two", prompt=1, version="v", max_tokens=9))
    bench.run(2)
    bench.add(sequence("user", prompt=9, max_tokens=1))
    batch = bench.step(fails=True)
    assert [row.sequence.id for row in batch.rows] == ["user", "one"]
    assert bench.running == ["two"]
    bench.run(10)
    assert bench.ended == {"user": "broken", "one": "broken", "two": "done"}
    bench.check_empty()


def test_text_that_is_scored_is_read_in_small_pieces_beside_one_token_for_each_sequence() -> None:
    bench = Bench(SchedulerConfig(max_batch_tokens=20, max_scored_tokens=3))
    bench.add(
        sequence("a", prompt=9, scored_from=5, max_tokens=1), sequence("b", prompt=6, scored_from=1, max_tokens=1)
    )
    assert rows_of(bench.step()) == [("a", 8, False), ("b", 1, False)]  # positions 0 to 3 of a are not scored
    assert rows_of(bench.step()) == [("a", 1, True), ("b", 4, False)]
    assert rows_of(bench.step()) == [("b", 1, True)]
    bench.check_empty()


def test_who_reads_scored_text_leaves_a_token_of_each_step_to_all_that_run() -> None:
    bench = Bench(SchedulerConfig(max_num_seqs=3, max_batch_tokens=4, max_scored_tokens=1))
    bench.add(sequence("a", prompt=3, scored_from=1, max_tokens=1), sequence("b", prompt=30, max_tokens=1))
    assert rows_of(bench.step()) == [("a", 2, False), ("b", 2, False)]
    bench.add(sequence("c", max_tokens=1))
    assert rows_of(bench.step()) == [("a", 1, True), ("b", 3, False)]


def test_continuations_are_read_between_the_prompt_and_the_second_token_of_the_reply() -> None:
    bench = Bench(SchedulerConfig(max_scored_tokens=2))
    one = sequence("one", max_tokens=2, continuations=[(7, 8, 9), (7, 8, 5, 5, 5, 5, 5), (4,)])
    bench.add(one)
    # the second begins as the first does, so two of its tokens are scored already and one of them is in the cache
    steps = [rows_of(bench.step()) for _ in range(5)]
    assert steps == [
        [("one", 4, True)],
        [("one", 2, False)],
        [("one", 3, False)],
        [("one", 2, False)],
        [("one", 1, True)],
    ]
    assert (one.output, (one.prompt_logprobs, one.continuation_logprobs)) == (solo_reply(one), solo_scores(one))
    bench.check_empty()


def test_nothing_to_do_and_nothing_to_read_are_refused() -> None:
    scheduler = Bench().scheduler
    scheduler.check_fits(sequence("scored", max_tokens=0, scored_from=1))
    scheduler.check_fits(sequence("scored", max_tokens=0, continuations=[(1,)]))
    with pytest.raises(RequestError, match="max_tokens must be at least 1"):
        scheduler.check_fits(sequence("nothing", max_tokens=0))
    with pytest.raises(RequestError, match="a continuation has no tokens"):
        scheduler.check_fits(sequence("empty", continuations=[(1,), ()]))


@pytest.mark.parametrize(
    ("ranks", "is_taken"), [((32, 32), True), ((5, 5, 5, 5), True), ((33,), True), ((32, 33), False)]
)
def test_a_request_has_no_more_ranks_than_a_step_has_tables_for(ranks: tuple[int, ...], is_taken: bool) -> None:
    """Each is rounded up to a power of two of at least 16."""
    scheduler = Bench(SchedulerConfig(max_ranks=64), rows=1024).scheduler
    asked = sequence("one", uses=[AdapterUse(f"v{i}", rank) for i, rank in enumerate(ranks)])
    if is_taken:
        scheduler.check_fits(asked)
        return
    with pytest.raises(RequestError, match=r"ranks 32, 33 are 96 together.* takes 64 in one request") as refused:
        scheduler.check_fits(asked)
    assert (refused.value.code, refused.value.param) == ("adapter_too_large", "adapters")
