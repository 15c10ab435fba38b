"""Prompts that begin alike share keys and values: as much as is allowed, and never what another adapter computed."""

from __future__ import annotations

import pytest

from loramux_server.engine.scheduling.kv_blocks import extend_keys
from loramux_server.engine.scheduling.sequence import AdapterUse, Sequence
from support.fakes_engine import sequence, solo_reply
from support.fakes_rig import Rig
from support.fakes_scheduler import Bench, rows_of


def done(bench: Bench, one: Sequence) -> Sequence:
    bench.add(one)
    bench.run(30)
    assert bench.ended[one.id] == "done" and one.output == solo_reply(one)
    return one


def test_a_prompt_that_begins_like_an_earlier_one_computes_only_the_rest() -> None:
    bench = Bench(max_kept=8, block_size=4)
    done(bench, sequence("first", text="x", prompt=10))
    second = sequence("second", text="x", prompt=14)
    bench.add(second)
    assert rows_of(bench.step()) == [("second", 6, True)]
    assert second.num_cached == 8
    bench.run(9)
    assert second.output == solo_reply(second)


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    bench = Bench(max_kept=8, block_size=4)
    done(bench, sequence("first", text="x", prompt=8))
    assert done(bench, sequence("same", text="x", prompt=8)).num_cached == 4


def test_replies_are_kept_too_so_that_a_talk_goes_on_where_it_was() -> None:
    bench = Bench(max_kept=8, block_size=4)
    first = done(bench, sequence("first", prompt=6, max_tokens=7))
    second = sequence("second", prompt=1)
    second.prompt[:] = [*first.prompt, *first.output, 3, 4]
    assert done(bench, second).num_cached == 12


@pytest.mark.parametrize(
    "other",
    [(), (AdapterUse("a", 8, scale=0.5),), (AdapterUse("b", 8),), (AdapterUse("a", 8), AdapterUse("b", 8))],
)
def test_nothing_is_shared_between_different_adapters_or_factors(other: tuple[AdapterUse, ...]) -> None:
    bench = Bench(max_kept=8, block_size=4)
    done(bench, sequence("first", text="x", prompt=10, uses=[AdapterUse("a", 8)]))
    assert done(bench, sequence("other", text="x", prompt=10, uses=other)).num_cached == 0
    assert done(bench, sequence("same", text="x", prompt=10, uses=[AdapterUse("a", 8)])).num_cached == 8


def test_sequences_that_run_together_share_what_one_of_them_has_computed() -> None:
    bench = Bench(max_kept=8, block_size=4)
    first, second = (sequence(name, text="x", prompt=10, max_tokens=20) for name in ("first", "second"))
    bench.add(first)
    bench.step()
    bench.add(second)
    bench.step()
    assert second.num_cached == 8 and second.blocks[:2] == first.blocks[:2]
    bench.run(30)
    assert [first.output, second.output] == [solo_reply(first), solo_reply(second)]


def test_the_servers_own_work_shares_within_its_group_alone_and_leaves_first() -> None:
    bench = Bench(max_kept=6, block_size=4)
    done(bench, sequence("first", text="x", prompt=10))
    probes = [sequence(name, text="x", prompt=10, background=True) for name in ("one", "two", "other")]
    for probe, group in zip(probes, ("a", "a", "b"), strict=True):
        probe.cache_group = group
    assert [done(bench, probe).num_cached for probe in probes] == [0, 8, 0]
    assert done(bench, sequence("again", text="x", prompt=10)).num_cached == 8


def test_a_step_that_fails_leaves_nothing_to_share() -> None:
    bench = Bench(max_kept=8, block_size=4)
    bench.add(sequence("first", text="x", prompt=10))
    bench.step(fails=True)
    assert bench.blocks.kept == 0
    assert done(bench, sequence("second", text="x", prompt=10)).num_cached == 0


def test_it_is_off_where_nothing_may_be_kept() -> None:
    bench = Bench(max_kept=0, block_size=4)
    first, second = (sequence(name, text="x", prompt=10, max_tokens=20) for name in ("first", "second"))
    bench.add(first)
    bench.step()
    bench.add(second)
    bench.step()
    assert second.num_cached == 0


def test_keys_tell_tokens_order_adapters_and_factors_apart() -> None:
    def keys(tokens: list[int], *uses: AdapterUse) -> tuple[bytes, ...]:
        one = sequence("one", uses=uses)
        one.prompt[:] = tokens
        extend_keys(one, 2, len(tokens))
        return tuple(one.keys)

    a, b = AdapterUse("a", 8), AdapterUse("b", 8)
    several = [
        keys([1, 2, 3, 4]),
        keys([2, 1, 3, 4]),
        keys([1, 2, 3, 4], a),
        keys([1, 2, 3, 4], b),
        keys([1, 2, 3, 4], a, b),
        keys([1, 2, 3, 4], AdapterUse("a", 8, scale=-1.0)),
    ]
    assert len({key for chain in several for key in chain}) == 12
    assert keys([1, 2, 3, 4, 5]) == several[0] and keys([1, 2, 9, 9])[0] == several[0][0]


def test_what_was_found_is_reported_and_told_to_the_client() -> None:
    rig = Rig(block_size=4, max_kept=8).start()
    for name in ("first", "second"):
        rig.engine.submit(sequence(name, text="x", prompt=10))
        rig.deliveries.final(name)
    rig.stop()
    assert rig.metrics.of("prefix_looked_up") == [(0, 10), (8, 10)]
    assert sum(prompt for _, prompt, _ in rig.metrics.of("tokens")) == 20  # type: ignore[misc]
    assert [rig.deliveries.of(name)[0].cached_tokens for name in ("first", "second")] == [0, 8]
    assert rig.engine.stats.kv_blocks_kept > 0
