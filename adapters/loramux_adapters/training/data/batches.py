"""Which examples come in which batch: decided by seed and epoch alone, so a resumed run goes on as it would have."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from loramux_adapters.training.recipe import BATCHINGS

MEGABATCH = 8  # batches that are sorted by length together; with more, all rows of one kind would share a batch


def epoch_order(lengths: Sequence[int], batch_size: int, *, seed: int, epoch: int, batching: str) -> list[list[int]]:
    """The batches of one epoch. Every row comes once; one batch is smaller if they do not come out even.

    Args:
        lengths: tokens of each row.
        batching: "shuffle": any order. "length": random megabatches, each sorted by length and cut into batches, which
            then come in random order.
    Returns:
        Indices into `lengths`, batch by batch.
    """
    assert batch_size >= 1 and batching in BATCHINGS
    # of a seeded generator, only `random()` is promised to stay the same from one Python to the next
    draw = random.Random(f"{seed}/{epoch}").random
    order = _shuffled(len(lengths), draw)
    if batching == "length":
        step = batch_size * MEGABATCH
        megabatches = [order[start : start + step] for start in range(0, len(order), step)]
        order = [row for rows in megabatches for row in sorted(rows, key=lambda row: lengths[row])]
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return [batches[index] for index in _shuffled(len(batches), draw)] if batching == "length" else batches


def parts(batch: Sequence[int], accumulation: int, lengths: Sequence[int]) -> list[list[int]]:
    """The batch's rows in at most `accumulation` parts of nearly equal token counts, none empty.

    The longest row goes first, always into the part that has the fewest tokens so far.

    Args:
        batch: indices into `lengths`.
        lengths: tokens of every row.
    """
    assert accumulation >= 1
    tokens = {row: lengths[row] for row in batch}
    assert len(tokens) == len(batch), "a row comes once in a batch"
    bins: list[list[int]] = [[] for _ in range(min(accumulation, len(batch)))]
    for row in sorted(batch, key=lambda row: -tokens[row]):
        lightest = min(bins, key=lambda rows: (sum(tokens[other] for other in rows), len(rows)))
        lightest.append(row)
    place = {row: index for index, row in enumerate(batch)}
    return [sorted(rows, key=place.__getitem__) for rows in bins]


def _shuffled(count: int, draw: Callable[[], float]) -> list[int]:
    return [value for _, value in sorted((draw(), value) for value in range(count))]
