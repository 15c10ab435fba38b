"""Which rows come in which batch, and how a batch is computed in parts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramux_adapters.training.data.batches import MEGABATCH, epoch_order, parts

LENGTHS = st.lists(st.integers(1, 500), min_size=1, max_size=120)


def flat(batches: list[list[int]]) -> list[int]:
    return [row for batch in batches for row in batch]


@given(LENGTHS, st.integers(1, 20), st.integers(0, 2**40), st.integers(0, 100), st.sampled_from(["length", "shuffle"]))
def test_every_row_comes_once_in_full_batches_but_one(
    lengths: list[int], size: int, seed: int, epoch: int, batching: str
) -> None:
    batches = epoch_order(lengths, size, seed=seed, epoch=epoch, batching=batching)

    assert sorted(flat(batches)) == list(range(len(lengths)))
    short = [len(batch) for batch in batches if len(batch) != size]
    assert len(short) <= 1 and all(0 < length < size for length in short)
    assert batches == epoch_order(lengths, size, seed=seed, epoch=epoch, batching=batching)


@pytest.mark.parametrize("batching", ["length", "shuffle"])
def test_epochs_and_seeds_have_orders_of_their_own(batching: str) -> None:
    lengths = list(range(1, 101))
    orders = [
        epoch_order(lengths, 8, seed=seed, epoch=epoch, batching=batching)
        for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1), (0, 11), (1, 2))
    ]

    assert len({str(order) for order in orders}) == len(orders)


def test_an_order_is_what_it_was_when_checkpoints_were_written() -> None:
    """A change of these numbers breaks the resuming of every run that is under way."""
    assert epoch_order([5, 1, 4, 2, 3, 9], 2, seed=7, epoch=1, batching="shuffle") == [[0, 1], [2, 4], [3, 5]]
    assert epoch_order([5, 1, 4, 2, 3, 9], 2, seed=7, epoch=1, batching="length") == [[0, 5], [4, 2], [1, 3]]


def test_batches_by_length_hold_rows_of_similar_length_and_still_mix() -> None:
    lengths = [1 + (index * 7919) % 400 for index in range(16 * MEGABATCH * 4)]

    def spread(batching: str) -> float:
        batches = epoch_order(lengths, 16, seed=0, epoch=0, batching=batching)
        return sum(max(lengths[row] for row in batch) - min(lengths[row] for row in batch) for batch in batches)

    assert spread("length") < spread("shuffle") / 4
    means = [
        sum(lengths[row] for row in batch) / len(batch)
        for batch in epoch_order(lengths, 16, seed=0, epoch=0, batching="length")
    ]
    assert means != sorted(means) and means != sorted(means, reverse=True)
    first, second = (
        {frozenset(batch) for batch in epoch_order(lengths, 16, seed=0, epoch=epoch, batching="length")}
        for epoch in (0, 1)
    )
    assert len(first & second) == 0


@given(LENGTHS, st.integers(1, 16))
def test_parts_hold_every_row_once_and_differ_by_no_more_than_the_longest(
    lengths: list[int], accumulation: int
) -> None:
    batch = list(reversed(range(len(lengths))))
    made = parts(batch, accumulation, lengths)

    assert sorted(flat(made)) == sorted(batch)
    assert len(made) == min(accumulation, len(batch)) and all(made)
    assert all(part == sorted(part, reverse=True) for part in made), "rows keep the order they have in the batch"
    tokens = [sum(lengths[row] for row in part) for part in made]
    assert max(tokens) - min(tokens) <= max(lengths)


def test_one_part_is_the_batch_itself_and_rows_of_one_length_are_dealt_out_evenly() -> None:
    assert parts([4, 2, 9], 1, [1] * 10) == [[4, 2, 9]]
    assert sorted(map(len, parts(range(10), 3, [5] * 10))) == [3, 3, 4]
