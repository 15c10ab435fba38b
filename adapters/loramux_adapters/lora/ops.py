"""Adds LoRA deltas to the output of a linear layer for a batch in which every row may use another adapter.

Semantics of every `add_lora_*` here, for each token row t of x, over its entries e in [first[t], first[t + 1]) whose
adapter targets this layer, with o = offset[e], r = rank[e]:

    y[t] += sum_e scale[e] * ((x[t] @ a[o : o + r].T) @ bt[o : o + r] + gain[o / 8] * y[t] + shift[o / 8])

where y on the right is what the layer itself gives, bias included, and an adapter has either part or both for a layer.
Gain and shift are what DoRA's magnitudes, trained biases and output scales come to (lora/affine.py); most adapters have
none.

Stacks are bf16 with alpha/r folded into `bt`, gain and shift fp32; sums are fp32, of gain and shift first, each in the
order of the entries. x and y are fp32 on the CPU.
Elsewhere they may be bf16: then the tensor path rounds each intermediate and delta to bf16 as well. With the compiled
kernel each row's bits depend on that row alone: on its adapters and its input, never on the batch around it. A scale of
1.0 changes no bit.

The idea of applying many adapters to one batch by segments is Punica's (https://arxiv.org/abs/2310.18547) and
S-LoRA's (https://arxiv.org/abs/2311.03285).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from loramux_adapters.lora.slots import SMALLEST_RANK, ScaledSlot, Slot

HAS_DELTA, HAS_AFFINE = 1, 2  # of `Arena.targeted`: A and B; gain and shift


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Arena:
    """Device memory of one linear layer for all adapters. Owner: the engine thread.

    Attributes:
        a: [arena_rows, in] bf16.
        bt: [arena_rows, out] bf16, B transposed and scaled.
        targeted: [arena_rows / 8] uint8; what the slot's adapter has for this layer: HAS_DELTA, HAS_AFFINE, both or 0.
        affine: [arena_rows / 8, 2, out] fp32, gain and shift of a slot at the first of its groups of 8 rows; None: no
            adapter here has any.
    """

    a: torch.Tensor
    bt: torch.Tensor
    targeted: torch.Tensor
    affine: torch.Tensor | None = None

    def has(self, slot: Slot) -> int:
        """What the adapter in this slot has for the layer. Waits for the device."""
        return int(self.targeted[slot.offset // SMALLEST_RANK])

    def changed(self, y: torch.Tensor, slot: Slot) -> torch.Tensor:
        """gain * y + shift in fp32, of an adapter that has them; y [rows, out], what the layer itself gives."""
        assert self.affine is not None
        gain, shift = self.affine[slot.offset // SMALLEST_RANK]
        changed: torch.Tensor = y.float() * gain + shift
        return changed


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of token rows [start, stop) that use the same adapters, with the same factors, in the same order."""

    start: int
    stop: int
    slots: tuple[ScaledSlot, ...]


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class LoraRows:
    """Which adapters each token row of one step uses.

    Attributes:
        segments: runs of rows in order; rows outside of them use the base alone.
        first: [rows + 1] int32; the entries of row t are [first[t], first[t + 1]).
        offset: [entries] int32, first arena row of the entry's adapter.
        rank: [entries] int32, arena rows of the entry's adapter.
        scale: [entries] fp32, factor of the entry's delta.
        num_rows: token rows, those without an adapter included.

    The arrays are numpy's: every call of PyTorch gives up the interpreter lock, and has to wait to get it back.
    """

    segments: tuple[Segment, ...]
    first: npt.NDArray[np.int32]
    offset: npt.NDArray[np.int32]
    rank: npt.NDArray[np.int32]
    scale: npt.NDArray[np.float32]
    num_rows: int

    @classmethod
    def build(cls, runs: Sequence[tuple[tuple[ScaledSlot, ...], int]]) -> LoraRows | None:
        """From (adapters, number of token rows) in row order; None if no row has an adapter."""
        segments: list[Segment] = []
        entries: list[ScaledSlot] = []
        first = [0]
        for slots, count in runs:
            start = len(first) - 1
            for _ in range(count):
                entries += slots
                first.append(len(entries))
            if not slots or count == 0:
                continue
            if segments and segments[-1].slots == slots and segments[-1].stop == start:
                segments[-1] = Segment(segments[-1].start, start + count, slots)
            else:
                segments.append(Segment(start, start + count, slots))
        if not segments:
            return None
        arrays = (
            np.array(first, dtype=np.int32),
            np.array([entry.slot.offset for entry in entries], dtype=np.int32),
            np.array([entry.slot.rank for entry in entries], dtype=np.int32),
            np.array([entry.scale for entry in entries], dtype=np.float32),
        )
        return cls(tuple(segments), *arrays, len(first) - 1)

    def picked(self, rows: Sequence[int]) -> LoraRows | None:
        """Of these token rows alone, in ascending order; None if none of them has an adapter."""
        runs: list[tuple[tuple[ScaledSlot, ...], int]] = []
        segments = iter(self.segments)
        segment = next(segments, None)
        for row in rows:
            while segment is not None and segment.stop <= row:
                segment = next(segments, None)
            slots = segment.slots if segment is not None and segment.start <= row else ()
            if runs and runs[-1][0] is slots:
                runs[-1] = slots, runs[-1][1] + 1
            else:
                runs.append((slots, 1))
        return LoraRows.build(runs)


AddLora = Callable[[torch.Tensor, torch.Tensor, Arena, LoraRows], None]


def add_lora_loop(y: torch.Tensor, x: torch.Tensor, arena: Arena, rows: LoraRows) -> None:
    """The slow reference: one row at a time, all in fp32, one rounding at the end. y [rows, out] changed in place."""
    for segment in rows.segments:
        for t in range(segment.start, segment.stop):
            total = y[t].float().clone()  # y itself stays what the layer gives
            for entry in segment.slots:
                if arena.has(entry.slot) & HAS_AFFINE:
                    total += entry.scale * arena.changed(y[t : t + 1], entry.slot)[0]
            for entry in segment.slots:
                if arena.has(entry.slot) & HAS_DELTA:
                    a, bt = _weights(arena, entry.slot)
                    total += entry.scale * (x[t].float() @ a.float().T) @ bt.float()
            y[t] = total.to(y.dtype)


def add_lora_segments(y: torch.Tensor, x: torch.Tensor, arena: Arena, rows: LoraRows) -> None:
    """The tensor path of every device: two products per adapter and segment, on views of the resident stacks."""
    check_rows(y, x, rows)
    for segment in rows.segments:
        run = slice(segment.start, segment.stop)
        inputs = x[run]
        if x.dtype == torch.float32:  # the library takes other code, with other last bits, for fewer than four rows
            inputs = functional.pad(inputs, (0, 0, 0, (segment.start - segment.stop) % 4))
        delta: torch.Tensor | None = None  # of the first adapter in x's dtype, of several in fp32
        if arena.affine is not None:
            for entry in segment.slots:
                if arena.has(entry.slot) & HAS_AFFINE:
                    part = entry.scale * arena.changed(y[run], entry.slot)
                    delta = part if delta is None else delta + part
        for entry in segment.slots:
            if arena.has(entry.slot) & HAS_DELTA:
                a, bt = (weights.to(x.dtype) for weights in _weights(arena, entry.slot))
                part = (((inputs @ a.T) * entry.scale) @ bt)[: segment.stop - segment.start]
                delta = part if delta is None else delta.float() + part.float()
        if delta is not None:
            y[run] += delta


def _weights(arena: Arena, slot: Slot) -> tuple[torch.Tensor, torch.Tensor]:
    """A [rank, in] and B transposed [rank, out], as views."""
    window = slice(slot.offset, slot.offset + slot.rank)
    return arena.a[window], arena.bt[window]


def check_rows(y: torch.Tensor, x: torch.Tensor, rows: LoraRows) -> None:
    """A layer that runs on other rows than the step's tokens would get other requests' adapters."""
    if not x.shape[0] == y.shape[0] == rows.num_rows:
        raise ValueError(f"the layer runs on {x.shape[0]} rows, the step has {rows.num_rows}")
