"""Copies an adapter's weights from host memory into the arenas of the layers it changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from loramux_adapters.lora.ops import Arena
from loramux_adapters.lora.slots import SMALLEST_RANK, Slot

Weights = tuple[torch.Tensor, torch.Tensor]  # A [rank, in], B transposed [rank, out], bf16
Filling = Sequence[tuple[Arena, Weights | None]]
CopySlot = Callable[[Slot, Filling], None]


def copy_slot(slot: Slot, filling: Filling) -> None:
    """The slow reference and the path of devices without a kernel.

    For each arena, rows of `slot` that the weights do not fill become zero: all of them where there are none.
    """
    groups = slice(slot.offset // SMALLEST_RANK, (slot.offset + slot.rank) // SMALLEST_RANK)
    for arena, weights in filling:
        filled = slot.offset
        if weights is not None:
            a, bt = weights
            filled += a.shape[0]
            arena.a[slot.offset : filled] = a
            arena.bt[slot.offset : filled] = bt
        if filled < slot.offset + slot.rank:
            arena.a[filled : slot.offset + slot.rank] = 0
            arena.bt[filled : slot.offset + slot.rank] = 0
        arena.targeted[groups] = weights is not None
