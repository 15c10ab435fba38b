"""KV blocks are handed out once each, all or nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramux_server.engine.scheduling.kv_blocks import KVBlocks


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


def filled(blocks: KVBlocks, *keys: bytes) -> list[int]:
    """Blocks of a sequence whose content is known by these keys, in use."""
    taken = blocks.allocate(len(keys))
    assert taken is not None
    for block, key in zip(taken, keys, strict=True):
        blocks.publish(block, key)
    return taken


def test_what_is_known_is_shared_while_it_is_used_and_kept_afterwards() -> None:
    blocks = KVBlocks(4, 1, max_kept=4)
    first = filled(blocks, b"a", b"b")
    found = blocks.find([b"a", b"b", b"c"])
    assert found == first
    second = blocks.allocate(3, found)
    assert second is not None and second[:2] == first and blocks.used == 3
    blocks.free(first)
    assert blocks.used == 3 and blocks.kept == 0
    blocks.free(second)
    assert (blocks.used, blocks.kept, blocks.find([b"a", b"b"])) == (0, 2, first)


def test_the_beginning_that_is_not_known_hides_what_follows() -> None:
    blocks = KVBlocks(4, 1, max_kept=4)
    filled(blocks, b"a", b"b")
    assert blocks.find([b"x", b"b"]) == []


def test_room_is_made_by_forgetting_what_was_not_used_for_the_longest_time_ends_of_texts_first() -> None:
    blocks = KVBlocks(4, 1, max_kept=4)
    blocks.free(filled(blocks, b"a", b"b"))
    blocks.free(filled(blocks, b"c", b"d"))
    assert blocks.allocate(1) is not None
    assert [len(blocks.find([key])) for key in (b"a", b"b", b"c", b"d")] == [1, 0, 1, 1]
    blocks.check_integrity()


def test_no_more_is_kept_than_allowed() -> None:
    blocks = KVBlocks(4, 1, max_kept=1)
    blocks.free(filled(blocks, b"a", b"b", b"c"))
    assert blocks.kept == 1 and blocks.find([b"a", b"b"]) == blocks.find([b"a"]) != []


def test_what_is_wanted_for_its_content_is_not_counted_as_room() -> None:
    blocks = KVBlocks(2, 1, max_kept=2)
    blocks.free(filled(blocks, b"a", b"b"))
    assert blocks.allocate(3, blocks.find([b"a", b"b"])) is None
    assert blocks.kept == 2
    assert blocks.allocate(2, blocks.find([b"a"])) is not None


def test_the_same_content_computed_twice_is_known_once() -> None:
    blocks = KVBlocks(2, 1, max_kept=2)
    first, second = filled(blocks, b"a"), filled(blocks, b"a")
    blocks.free(second)
    assert blocks.kept == 0 and blocks.find([b"a"]) == first
