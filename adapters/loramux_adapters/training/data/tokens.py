"""Examples as tokens: what the data side hands to the model side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

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
