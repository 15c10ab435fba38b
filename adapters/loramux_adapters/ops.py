"""Adds LoRA deltas to the output of a linear layer for a batch in which every row may use another adapter.

Semantics of every `add_lora_*` here, for each token row t of x that has an adapter which targets this layer, with
o = offset[t], r = rank[t]:

    y[t] += (x[t] @ a[o : o + r].T) @ bt[o : o + r]

Stacks are bf16 with alpha/r folded into `bt`; sums are fp32. The compiled kernel keeps the rank-r intermediate in
fp32 and rounds once, into y; the tensor path rounds the intermediate and the delta to bf16 as well. With the compiled
kernel each row's bits depend on that row alone: on its adapter and its input, never on the batch around it.

The idea of applying many adapters to one batch by segments is Punica's (https://arxiv.org/abs/2310.18547) and
S-LoRA's (https://arxiv.org/abs/2311.03285).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from loramux_adapters.native import load_library
from loramux_adapters.slots import SMALLEST_RANK, Slot


@dataclass(frozen=True, slots=True)
class Arena:
    """Device memory of one linear layer for all adapters. Owner: the engine thread.

    Attributes:
        a: [arena_rows, in] bf16.
        bt: [arena_rows, out] bf16, B transposed and scaled.
        targeted: [arena_rows / 8] uint8; 0 where the slot's adapter has no weights for this layer.
    """

    a: torch.Tensor
    bt: torch.Tensor
    targeted: torch.Tensor


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of token rows [start, stop) that use the adapter in `slot`."""

    start: int
    stop: int
    slot: Slot


@dataclass(frozen=True, slots=True)
class LoraRows:
    """Which adapter each token row of one step uses.

    Attributes:
        segments: runs of rows in order; rows outside of them use the base alone.
        offset: [rows] int32, first arena row of the row's adapter; 0 without one.
        rank: [rows] int32, arena rows of the row's adapter; 0 without one.
    """

    segments: tuple[Segment, ...]
    offset: torch.Tensor
    rank: torch.Tensor

    @classmethod
    def build(cls, slots: Sequence[tuple[Slot | None, int]]) -> LoraRows | None:
        """From (slot, number of token rows) in row order; None if no row has an adapter."""
        segments: list[Segment] = []
        offsets: list[int] = []
        ranks: list[int] = []
        for slot, count in slots:
            start = len(offsets)
            offsets += [slot.offset if slot else 0] * count
            ranks += [slot.rank if slot else 0] * count
            if slot is None or count == 0:
                continue
            if segments and segments[-1].slot == slot and segments[-1].stop == start:
                segments[-1] = Segment(segments[-1].start, start + count, slot)
            else:
                segments.append(Segment(start, start + count, slot))
        if not segments:
            return None
        return cls(tuple(segments), torch.tensor(offsets, dtype=torch.int32), torch.tensor(ranks, dtype=torch.int32))


AddLora = Callable[[torch.Tensor, torch.Tensor, Arena, LoraRows], None]


def add_lora_loop(y: torch.Tensor, x: torch.Tensor, arena: Arena, rows: LoraRows) -> None:
    """The slow reference: one row at a time, all in fp32, one rounding at the end. y [rows, out] changed in place."""
    for segment in rows.segments:
        slot = segment.slot
        if not arena.targeted[slot.offset // SMALLEST_RANK]:
            continue
        a = arena.a[slot.offset : slot.offset + slot.rank].float()
        bt = arena.bt[slot.offset : slot.offset + slot.rank].float()
        for t in range(segment.start, segment.stop):
            y[t] = (y[t].float() + (x[t].float() @ a.T) @ bt).to(y.dtype)


def add_lora_segments(y: torch.Tensor, x: torch.Tensor, arena: Arena, rows: LoraRows) -> None:
    """The tensor path of every device: two products per adapter in the batch, on views of the resident stacks."""
    _check_rows(y, x, rows)
    for segment in rows.segments:
        slot = segment.slot
        if not arena.targeted[slot.offset // SMALLEST_RANK]:
            continue
        a = arena.a[slot.offset : slot.offset + slot.rank]
        bt = arena.bt[slot.offset : slot.offset + slot.rank]
        y[segment.start : segment.stop] += (x[segment.start : segment.stop] @ a.T) @ bt


class NativeAddLora:
    """The compiled CPU kernel (csrc/lora.cpp): rows in parallel, each read of an adapter straight from its slot.

    Needs bf16 tensors on the CPU with dense rows.
    """

    def __init__(self, library: ctypes.CDLL, *, portable: bool | None = None) -> None:
        self._call = library.loramux_add_lora
        pointer, size, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
        self._call.argtypes = [pointer] * 7 + [size] * 3 + [flag] * 2
        self._call.restype = None
        vector = bool(library.loramux_lora_has_avx512bf16())
        self.portable = not vector if portable is None else portable
        self.name = "native portable" if self.portable else "native AVX512-BF16"

    def __call__(self, y: torch.Tensor, x: torch.Tensor, arena: Arena, rows: LoraRows) -> None:
        if not (y.is_contiguous() and x.is_contiguous() and y.dtype == x.dtype == torch.bfloat16):
            raise ValueError("the compiled LoRA kernel takes dense bf16 rows")
        _check_rows(y, x, rows)
        self._call(
            y.data_ptr(),
            x.data_ptr(),
            arena.a.data_ptr(),
            arena.bt.data_ptr(),
            rows.offset.data_ptr(),
            rows.rank.data_ptr(),
            arena.targeted.data_ptr(),
            x.shape[0],
            x.shape[1],
            y.shape[1],
            self.portable,
            torch.get_num_threads(),
        )


def _check_rows(y: torch.Tensor, x: torch.Tensor, rows: LoraRows) -> None:
    """A layer that runs on other rows than the step's tokens would get other requests' adapters."""
    if not x.shape[0] == y.shape[0] == rows.offset.shape[0]:
        raise ValueError(f"the layer runs on {x.shape[0]} rows, the step has {rows.offset.shape[0]}")


def native_library() -> ctypes.CDLL | None:
    """The compiled kernels of this package, where they were built."""
    return load_library(Path(__file__).parent, "_kernels")


def select_add_lora(device: torch.device, dtype: torch.dtype) -> tuple[AddLora, str]:
    """The path used on this device, and its name for the start-up report and the numerics id."""
    if device.type == "cpu" and dtype == torch.bfloat16 and (library := native_library()) is not None:
        kernel = NativeAddLora(library)
        return kernel, kernel.name
    return add_lora_segments, "tensor"
