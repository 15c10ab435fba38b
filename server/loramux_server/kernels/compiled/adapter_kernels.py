"""What is compiled of an adapter's life: reading its numbers, copying them to a slot, adding its deltas.

References and tensor paths lie in the adapter package, which is handed these where they can run.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch

from loramux_adapters.lora import ops
from loramux_adapters.lora.slot_copy import Filling
from loramux_adapters.lora.slots import Slot
from loramux_adapters.lora.weights import PlacedPair
from loramux_server.kernels.compiled.abi import FilePair, LoraArena, LoraEntries, SlotWeights
from loramux_server.kernels.compiled.library import Compiled, NativeLibrary

_KINDS = {"F32": 0, "F16": 1, "BF16": 2}  # as csrc/adapter_copy.cpp numbers them
_SLOT_WEIGHTS, _FILE_PAIR = np.dtype(SlotWeights), np.dtype(FilePair)  # arrays of them are made at once


def arena_of(arena: ops.Arena) -> LoraArena:
    """An arena as compiled code sees it; the tensors never move."""
    places = (tensor.data_ptr() for tensor in (arena.a, arena.bt, arena.targeted))
    affine = None if arena.affine is None else arena.affine.data_ptr()
    return LoraArena(*places, affine, arena.a.shape[1], arena.bt.shape[1])


def rows_of(rows: ops.LoraRows) -> LoraEntries:
    """A step's rows as compiled code sees them, as long as `rows` lives."""
    return LoraEntries(
        *(array.ctypes.data for array in (rows.first, rows.offset, rows.rank, rows.scale)), rows.num_rows
    )


class _Addresses:
    """Where each arena, and each step's rows, lie as compiled code sees them: put together once, while they live."""

    def __init__(self) -> None:
        self._arenas: WeakKeyDictionary[ops.Arena, LoraArena] = WeakKeyDictionary()
        self._rows: WeakKeyDictionary[ops.LoraRows, LoraEntries] = WeakKeyDictionary()

    def __len__(self) -> int:
        return len(self._arenas) + len(self._rows)

    def arena(self, arena: ops.Arena) -> int:
        if (found := self._arenas.get(arena)) is None:
            found = self._arenas[arena] = arena_of(arena)
        return ctypes.addressof(found)

    def rows(self, rows: ops.LoraRows) -> int:
        if (found := self._rows.get(rows)) is None:
            found = self._rows[rows] = rows_of(rows)
        return ctypes.addressof(found)


class NativeAddLora:
    """`AddLora` in compiled code (csrc/exact/lora.h): rows in parallel, each adapter read straight from its slot.

    Takes fp32 on the CPU; rows of y may lie apart, as a padded head gives them. One thread uses it.
    """

    def __init__(self, compiled: Compiled) -> None:
        self._call = compiled.function("loramux_exact_add_lora")
        self.addresses = _Addresses()
        self.isa = compiled.isa

    def __call__(self, y: torch.Tensor, x: torch.Tensor, arena: ops.Arena, rows: ops.LoraRows) -> None:
        if y.stride(1) != 1 or not y.dtype == x.dtype == torch.float32:
            raise ValueError("the compiled LoRA kernel takes fp32, and rows whose numbers lie close together")
        ops.check_rows(y, x, rows)
        x = x.contiguous()
        at, step = self.addresses.arena(arena), self.addresses.rows(rows)
        self._call(y.data_ptr(), y.stride(0), x.data_ptr(), at, step, self.isa, torch.get_num_threads())


class NativeCopySlot:
    """`CopySlot` in one call (csrc/adapter_copy.cpp): the engine thread gives up the interpreter lock once, not 2,000
    times."""

    def __init__(self, library: NativeLibrary) -> None:
        self._call = library.function("loramux_copy_slot")
        self._addresses = _Addresses()

    def __call__(self, slot: Slot, filling: Filling, *, in_use: bool = True) -> None:
        arenas = np.array([self._addresses.arena(arena) for arena, _ in filling], dtype=np.uint64)
        parts = [
            (0, 0, 0, 0)
            if part is None
            else (
                part.a.data_ptr(),
                part.bt.data_ptr(),
                0 if part.affine is None else part.affine.data_ptr(),
                part.rank,
            )
            for _, part in filling
        ]
        weights = np.array(parts, dtype=_SLOT_WEIGHTS)
        self._call(arenas.ctypes.data, weights.ctypes.data, len(filling), slot.offset, slot.rank)


class NativeConvertPairs:
    """`ConvertPairs` in one call (csrc/adapter_copy.cpp)."""

    def __init__(self, library: NativeLibrary) -> None:
        self._call = library.function("loramux_convert_pairs")

    def __call__(
        self,
        to: torch.Tensor,
        content: npt.NDArray[np.uint8],
        pairs: Sequence[PlacedPair],
        scales: Sequence[float],
    ) -> list[bool]:
        places = np.array(
            [
                (p.a_offset, _KINDS[p.a_dtype], p.b_offset, _KINDS[p.b_dtype], p.rank, p.inputs, p.outputs)
                for p in pairs
            ],
            dtype=_FILE_PAIR,
        )
        factors = np.array(scales, dtype=np.float32)
        finite = np.ones(len(pairs), dtype=np.bool_)
        at = places.ctypes.data
        self._call(to.data_ptr(), finite.ctypes.data, content.ctypes.data, at, factors.ctypes.data, len(pairs))
        return finite.tolist()
