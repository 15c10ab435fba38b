"""KV blocks are handed out once each, all or nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramux_server.engine.kv_blocks import KVBlocks


def test_blocks_are_counted_by_rounding_up() -> None:
    blocks = KVBlocks(10, 16)
    assert [blocks.blocks_for(tokens) for tokens in (0, 1, 16, 17, 32)] == [0, 1, 1, 2, 2]


def test_an_allocation_takes_distinct_blocks_and_counts_them_as_used() -> None:
    blocks = KVBlocks(5, 1)
    first, second = blocks.allocate(2), blocks.allocate(3)
    assert first is not None and second is not None
    assert sorted(first + second) == [0, 1, 2, 3, 4]
    assert blocks.used == 5


def test_an_allocation_that_does_not_fit_takes_nothing() -> None:
    blocks = KVBlocks(3, 1)
    blocks.allocate(2)
    assert not blocks.can_allocate(2)
    assert blocks.allocate(2) is None
    assert blocks.used == 2


def test_freed_blocks_are_used_again() -> None:
    blocks = KVBlocks(2, 1)
    taken = blocks.allocate(2)
    assert taken is not None
    blocks.free(taken)
    assert blocks.used == 0
    assert sorted(blocks.allocate(2) or []) == [0, 1]


def test_freeing_a_block_twice_is_a_bug() -> None:
    blocks = KVBlocks(2, 1)
    taken = blocks.allocate(1)
    assert taken is not None
    blocks.free(taken)
    with pytest.raises(AssertionError, match="freed twice"):
        blocks.free(taken)


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 16), (16, 0)])
def test_a_cache_without_room_is_refused(num_blocks: int, block_size: int) -> None:
    with pytest.raises(ValueError, match="needs blocks"):
        KVBlocks(num_blocks, block_size)


@given(st.lists(st.integers(-4, 4), max_size=60), st.integers(1, 12))
def test_no_block_is_lost_or_shared_whatever_the_order_of_calls(steps: list[int], num_blocks: int) -> None:
    blocks = KVBlocks(num_blocks, 2)
    held: list[list[int]] = []
    for step in steps:
        if step >= 0:
            taken = blocks.allocate(step)
            assert (taken is None) == (step > num_blocks - sum(map(len, held)))
            held += [taken] if taken is not None else []
        elif held:
            blocks.free(held.pop(step % len(held)))
        blocks.check_integrity()
        flat = [block for taken in held for block in taken]
        assert len(flat) == len(set(flat)) == blocks.used
