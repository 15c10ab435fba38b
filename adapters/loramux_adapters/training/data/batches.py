"""What a training step holds: which examples come in which batch, and their tokens packed for the model.

Seed and epoch alone decide the order, so a resumed run goes on as it would have.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

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


IGNORED = -100  # a label that no loss is taken on


@dataclass(frozen=True, slots=True)
class Row:
    """One example as tokens.

    Attributes:
        ids: prompt and answer, end token included.
        learn: for each token, whether the model is to learn to say it (the assistant's tokens and their end token).
        cut: tokens that truncation took away.
    """

    ids: tuple[int, ...]
    learn: tuple[bool, ...]
    cut: int = 0


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Rows packed end to end, without padding. No token attends to another row's.

    Attributes:
        ids: [tokens] int64.
        positions: [tokens] int64, from 0 in each row.
        labels: [tokens] int64; the token that FOLLOWS this one if it is to be learned, else IGNORED (already shifted).
        lengths: tokens of each row; their sum is `tokens`.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, rows: Sequence[Row]) -> TokenBatch:
        labels: list[int] = []
        for row in rows:
            following = zip(row.ids[1:], row.learn[1:], strict=True)
            labels += [token if learn else IGNORED for token, learn in following] + [IGNORED]
        return cls(
            ids=torch.tensor([token for row in rows for token in row.ids]),
            positions=torch.cat([torch.arange(len(row.ids)) for row in rows]),
            labels=torch.tensor(labels),
            lengths=tuple(len(row.ids) for row in rows),
        )

    @property
    def learned(self) -> int:
        """Tokens that a loss is taken on."""
        return int((self.labels != IGNORED).sum())
