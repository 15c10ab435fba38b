"""Sequences that share a prompt: the first reads it, the others find it."""

from __future__ import annotations

from typing import Any

import pytest

from loramux_server.engine.scheduling.admission import SchedulerConfig
from loramux_server.engine.scheduling.sequence import Sequence
from support.fakes_engine import sequence, solo_reply
from support.fakes_rig import Rig
from support.fakes_scheduler import Bench


def shared(count: int, *, prompt: int = 10, **more: Any) -> list[Sequence]:
    """A sequence and others that share its prompt, which has two whole blocks of 4 and a part of a third."""
    return [
        sequence(f"s{index}", prompt=prompt, shares_prompt_with="s0" if index else None, **more)
        for index in range(count)
    ]


def test_who_shares_a_prompt_waits_until_it_is_read_and_finds_its_blocks() -> None:
    bench = Bench(SchedulerConfig(max_batch_tokens=6), max_kept=64)
    first, *others = shared(3, max_tokens=20, version="v")
    bench.add(first, *others)
    bench.step()
    assert (bench.running, bench.waiting) == (["s0"], ["s1", "s2"])
    assert sum(map(len, bench.scheduler.lines)) == 2, "they count as waiting"
    bench.step()
    assert bench.running == ["s0"] and first.num_computed == 10
    bench.step()
    assert bench.running == ["s0", "s1", "s2"]
    assert [one.num_cached for one in (first, *others)] == [0, 8, 8]
    assert first.blocks[:2] == others[0].blocks[:2] == others[1].blocks[:2]
    assert not {first.blocks[2], others[0].blocks[2]} & {others[1].blocks[2]}


@pytest.mark.parametrize("kept", [0, 64])
def test_who_has_no_whole_block_to_share_or_no_cache_of_blocks_starts_at_once(kept: int) -> None:
    bench = Bench(max_kept=kept)
    bench.add(*shared(3, prompt=4 if kept else 10))  # the last token of a prompt is always computed
    bench.step()
    assert bench.running == ["s0", "s1", "s2"]


@pytest.mark.parametrize("how", ["aborted waiting", "aborted running", "broken"])
def test_who_waits_for_a_prompt_goes_on_alone_when_the_other_ends(how: str) -> None:
    bench = Bench(SchedulerConfig(max_batch_tokens=4), max_kept=64)
    bench.add(*shared(3))
    if how == "aborted running":
        bench.step()
    if how == "broken":
        bench.step(fails=True)
    else:
        bench.abort(["s0"])
    assert bench.waiting == ["s1", "s2"]
    bench.run(20)
    assert bench.ended == {"s0": how.split(" ")[0], "s1": "done", "s2": "done"}


def test_all_that_share_a_prompt_can_be_aborted_together_and_fail_together() -> None:
    bench = Bench(max_kept=64, instant=False)
    bench.add(*shared(3))
    bench.abort(["s0", "s1", "s2"])
    assert not bench.has_work
    bench.host.broken = {"v"}
    bench.add(*[replace_id(one) for one in shared(3, version="v")])
    bench.step()
    bench.host.end_load("v")
    bench.step()
    assert [bench.ended[f"again s{index}"] for index in range(3)] == ["failed"] * 3 and not bench.has_work


def replace_id(one: Sequence) -> Sequence:
    one.id = f"again {one.id}"
    if one.shares_prompt_with is not None:
        one.shares_prompt_with = f"again {one.shares_prompt_with}"
    return one


def test_who_waits_for_a_prompt_holds_no_seat_and_stops_nobody() -> None:
    bench = Bench(SchedulerConfig(max_num_seqs=2, max_batch_tokens=6, max_passed_over=0), max_kept=64)
    bench.add(*shared(3, prompt=13, max_tokens=30))
    bench.add(sequence("other", prompt=2, max_tokens=9), sequence("own", prompt=2, background=True, max_tokens=9))
    bench.run(2)
    assert bench.running == ["s0"], "it takes all tokens of a step"
    bench.step()
    assert bench.running == ["s0", "other", "own"] and bench.waiting == ["s1", "s2"]
    bench.run(9)
    assert bench.running == ["s0", "s1"]


def test_a_released_sequence_takes_the_place_that_it_came_for() -> None:
    bench = Bench(SchedulerConfig(max_num_seqs=1), max_kept=64)
    bench.add(*shared(2, max_tokens=2), sequence("behind"))
    bench.step()
    bench.add(sequence("far behind"))
    assert bench.waiting == ["s1", "behind", "far behind"]
    order = []
    while bench.has_work:
        bench.step()
        order += [id for id in bench.running if id not in order]
    assert order == ["s1", "behind", "far behind"]


@pytest.mark.parametrize("ahead", [False, True])
def test_a_client_hears_what_was_found_and_the_reply_that_each_has_alone(ahead: bool) -> None:
    rig = Rig(config=SchedulerConfig(max_batch_tokens=6), block_size=4, max_kept=8, ahead=ahead).start()
    made = shared(4)
    rig.engine.submit(*made)
    for one in made:
        rig.deliveries.final(one.id)
        assert rig.deliveries.tokens(one.id) == solo_reply(one)
    rig.stop()
    assert [rig.deliveries.of(one.id)[0].cached_tokens for one in made] == [0, 8, 8, 8]
