"""Copies an adapter's weights from host memory into the arenas of the layers it changes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import numpy as np
import torch

from loramux_adapters.lora.ops import Arena, native_library
from loramux_adapters.lora.slots import SMALLEST_RANK, Slot
from loramux_adapters.native import bind

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


class NativeCopySlot:
    """The same in one call (csrc/copy.cpp): the engine thread gives up the interpreter lock once, not 2,000 times."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._call = bind(library.loramux_fill_slot, "ppnnn")

    def __call__(self, slot: Slot, filling: Filling) -> None:
        arenas = np.array([arena.native for arena, _ in filling], dtype=np.uint64)
        places = [
            (0, 0, 0) if weights is None else (weights[0].data_ptr(), weights[1].data_ptr(), weights[0].shape[0])
            for _, weights in filling
        ]
        weights = np.array(places, dtype=np.int64)
        self._call(arenas.ctypes.data, weights.ctypes.data, len(filling), slot.offset, slot.rank)


def select_copy_slot(device: torch.device) -> CopySlot:
    """The path used on this device."""
    library = native_library() if device.type == "cpu" else None
    return copy_slot if library is None else NativeCopySlot(library)
