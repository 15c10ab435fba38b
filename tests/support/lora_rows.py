"""Rows of a step with random adapters, and one layer's memory for them."""

from __future__ import annotations

import torch

from loramux_adapters.lora.ops import Arena, LoraRows
from loramux_adapters.lora.slots import SMALLEST_RANK, ScaledSlot, Slot

ROWS = 512  # of the arena
SCALES = [0.7, -1.5, 1.0, 0.0, 0.25]
RANKS = [8, 16, 32, 64, 8, 16, 32, 8, 8, 16, 8, 8]


def make_arena(inputs: int, outputs: int, *, affine: bool = False) -> Arena:
    """`affine`: one slot of three has gain and shift alone, one has A and B too."""
    generator = torch.Generator().manual_seed(0)
    groups = ROWS // SMALLEST_RANK
    targeted = torch.ones(groups, dtype=torch.uint8)
    if affine:
        targeted = 1 + torch.arange(groups, dtype=torch.uint8) % 3
    return Arena(
        (torch.randn(ROWS, inputs, generator=generator) / inputs**0.5).bfloat16(),
        (torch.randn(ROWS, outputs, generator=generator) * 0.1).bfloat16(),
        targeted,
        torch.randn(groups, 2, outputs, generator=generator) * 0.3 if affine else None,
    )


def make_rows(counts: list[int], base_rows: int = 2) -> LoraRows:
    slots: list[tuple[tuple[ScaledSlot, ...], int]] = [((), base_rows)]
    offset = 0
    for count, rank in zip(counts, RANKS, strict=False):
        offset = -(-offset // rank) * rank
        slots.append(((ScaledSlot(Slot(offset, rank)),), count))
        offset += rank
    rows = LoraRows.build(slots)
    assert rows is not None
    return rows


def make_sums(counts: list[int], ranks: list[int], base_rows: int = 2) -> LoraRows:
    """Rows of one to five adapters of these ranks each, which several of them share, with factors of any sign."""
    slots, offset = [], 0
    for rank in ranks:
        offset = -(-offset // rank) * rank
        slots.append(Slot(offset, rank))
        offset += rank
    assert offset <= ROWS
    runs: list[tuple[tuple[ScaledSlot, ...], int]] = [((), base_rows)]
    for index, count in enumerate(counts):
        chosen = [slots[(index + step) % len(slots)] for step in range(1 + index % min(5, len(slots)))]
        runs.append((tuple(ScaledSlot(slot, SCALES[(index + i) % 5]) for i, slot in enumerate(chosen)), count))
    rows = LoraRows.build(runs)
    assert rows is not None
    return rows
