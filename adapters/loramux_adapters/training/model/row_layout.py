"""Where the rows of a packed batch lie, and which of them are computed together."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

_EVEN = 0.75  # rows are padded to the longest of their group; a row shorter than this share of it starts a new group
_GROUP_ROWS = 64


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """What a layer asks for: `softcap` 0 and `window` 0 mean none."""

    scaling: float
    softcap: float = 0.0
    window: int = 0


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Rows that are padded to one length and attended together.

    Attributes:
        first: tokens that come before each of them and are shared with all other rows.
        tokens: [rows, longest] int64, index of each token in the packed batch; a pad repeats the row's last token.
        keys: [rows, first + longest] int64, the same with the shared tokens in front.
        real: [rows, longest] bool, which of `tokens` are no pads.
    """

    first: int
    tokens: torch.Tensor
    keys: torch.Tensor
    real: torch.Tensor


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Where the rows of a batch lie. One object per forward, given to the model as keyword `loramux_rows`.

    Attributes:
        shared: tokens that every row begins with; they come first, once.
        lengths: each row's further tokens, in order.
        plans: what was computed from it for the layers, by what it depends on.
    """

    shared: int
    lengths: tuple[int, ...]
    plans: dict[object, object] = field(default_factory=dict, compare=False, repr=False)

    def spans(self) -> torch.Tensor:
        """[3, rows] int64: each row's first own token, its own tokens, the shared tokens in front of it.

        The shared beginning is a row of its own, and the first.
        """
        found = self.plans.get("spans")
        if not isinstance(found, torch.Tensor):
            lengths = torch.tensor([*([self.shared] * (self.shared > 0)), *self.lengths], dtype=torch.int64)
            firsts = torch.full_like(lengths, self.shared)
            firsts[: int(self.shared > 0)] = 0
            found = self.plans["spans"] = torch.stack([lengths.cumsum(0) - lengths, lengths, firsts])
        return found

    def groups(self) -> list[RowGroup]:
        """All rows, the shared beginning as a row of its own, in groups of similar length."""
        starts, start = [], self.shared
        for length in self.lengths:
            starts.append(start)
            start += length
        found = [_group(0, [(0, self.shared)])] if self.shared else []
        together: list[tuple[int, int]] = []
        for length, start in sorted(((-length, start) for length, start in zip(self.lengths, starts, strict=True))):
            if together and (-length < _EVEN * together[0][1] or len(together) == _GROUP_ROWS):
                found.append(_group(self.shared, together))
                together = []
            together.append((start, -length))
        return [*found, *([_group(self.shared, together)] if together else [])]


def _group(first: int, spans: list[tuple[int, int]]) -> RowGroup:
    """Spans are (start, length), the longest first."""
    steps = torch.arange(spans[0][1])
    lengths = torch.tensor([length for _, length in spans])[:, None]
    tokens = torch.tensor([start for start, _ in spans])[:, None] + steps.minimum(lengths - 1)
    keys = torch.cat([torch.arange(first).expand(len(spans), -1), tokens], dim=1)
    return RowGroup(first, tokens, keys, steps < lengths)


def hidden(first: int, length: int, window: int, device: torch.device) -> torch.Tensor:
    """[length, first + length]: True where the query at position first + t must not see the key at position s."""
    distance = (
        torch.arange(first, first + length, device=device)[:, None] - torch.arange(first + length, device=device)[None]
    )
    out = distance < 0
    return out | (distance >= window) if window else out
