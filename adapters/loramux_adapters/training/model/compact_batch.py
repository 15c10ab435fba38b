"""What of a batch has to be computed for its loss, and nothing else.

Attention is causal: what follows a row's last learned token changes nothing, and what all rows begin with (a system
prompt, an instruction) has the same states and the same gradients in each. So the first is cut off and the second is
computed once. Short messages behind a chat template lose a third of their tokens that way; the loss is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loramux_adapters.training.data.batches import IGNORED, TokenBatch
from loramux_adapters.training.model.row_layout import PackedRows


@dataclass(frozen=True, slots=True)
class CompactBatch:
    """The tokens that go through the model.

    Attributes:
        ids, positions: [tokens] int64; first what all rows share, then the rest of each row.
        learned: [learned] int64, the indices into `ids` at which a loss is taken.
        labels: [learned] int64, the token to be said there.
        rows: where the rows lie.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    learned: torch.Tensor
    labels: torch.Tensor
    rows: PackedRows

    @classmethod
    def of(cls, batch: TokenBatch, *, share: bool) -> CompactBatch:
        """`share`: compute a common beginning once. Rows without a learned token are left out."""
        parts = zip(
            *(torch.split(x, list(batch.lengths)) for x in (batch.ids, batch.positions, batch.labels)), strict=True
        )
        rows = [(ids, positions, labels) for ids, positions, labels in parts if bool((labels != IGNORED).any())]
        ends = [int((labels != IGNORED).nonzero()[-1]) + 1 for _, _, labels in rows]
        first = min((int((labels != IGNORED).nonzero()[0]) for _, _, labels in rows), default=0)
        shared = _common([ids for ids, _, _ in rows], first) if share and len(rows) > 1 else 0
        spans = [(0, 0, shared)] * (shared > 0) + [(row, shared, end) for row, end in enumerate(ends)]
        empty = batch.ids.new_empty(0)
        ids, positions, labels = (
            torch.cat([empty, *(rows[row][column][start:end] for row, start, end in spans)]) for column in range(3)
        )
        learned = (labels != IGNORED).nonzero()[:, 0]
        return cls(ids, positions, learned, labels[learned], PackedRows(shared, tuple(end - shared for end in ends)))


def _common(rows: Sequence[torch.Tensor], most: int) -> int:
    """How many tokens all rows begin with, up to `most`, which is no more than any row has."""
    stacked = torch.stack([ids[:most] for ids in rows])
    return int((stacked == stacked[0]).all(0).long().cumprod(0).sum())
