"""Copies an adapter's weights from host memory into the arenas of the layers it changes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple, Protocol

import torch

from loramux_adapters.device.device import Device, Event, WorkStream
from loramux_adapters.lora.ops import HAS_AFFINE, HAS_DELTA, Arena
from loramux_adapters.lora.slots import SMALLEST_RANK, Slot


class LayerWeights(NamedTuple):
    """What an adapter has for one layer.

    Attributes:
        a, bt: A [rank, in] and B transposed [rank, out], bf16; rank 0 where it has gain and shift alone.
        affine: [2, out] fp32, gain and shift of the layer's own output; None: none.
    """

    a: torch.Tensor
    bt: torch.Tensor
    affine: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def has(self) -> int:
        """As `Arena.targeted` says it."""
        return (HAS_DELTA if self.rank else 0) + (0 if self.affine is None else HAS_AFFINE)


Filling = Sequence[tuple[Arena, LayerWeights | None]]
STAGING_BYTES = 16 << 20  # of a buffer; there are two


class CopySlot(Protocol):
    def __call__(self, slot: Slot, filling: Filling, *, in_use: bool = True) -> None:
        """For each arena, rows of `slot` that the weights do not fill become zero: all of them where there are none.

        `in_use`: steps that were started before may still read what the slot holds, so the copy waits for them.
        """


def copy_slot(slot: Slot, filling: Filling, *, in_use: bool = True) -> None:
    """The slow reference, and the path of a CPU without compiled code, where every step is done."""
    groups = slice(slot.offset // SMALLEST_RANK, (slot.offset + slot.rank) // SMALLEST_RANK)
    for arena, weights in filling:
        filled = slot.offset
        if weights is not None:
            filled += weights.rank
            arena.a[slot.offset : filled] = weights.a
            arena.bt[slot.offset : filled] = weights.bt
            if weights.affine is not None:
                _room(arena)[groups.start] = weights.affine
        if filled < slot.offset + slot.rank:
            arena.a[filled : slot.offset + slot.rank] = 0
            arena.bt[filled : slot.offset + slot.rank] = 0
        arena.targeted[groups] = 0 if weights is None else weights.has


def _room(arena: Arena) -> torch.Tensor:
    assert arena.affine is not None, "the upload check lets none through that there is no room for"
    return arena.affine


class StagedCopySlot:
    """The same for a device with memory of its own: through pinned memory, on a stream beside the steps'.

    Where the slot is in use, it begins when all steps that were started before it are done; else at once, behind the
    copies before it. Steps that are started after it begin when it is done. The host only waits for a buffer that is
    still being read. Owner: the engine thread.
    """

    def __init__(self, device: Device, staging_bytes: int = STAGING_BYTES) -> None:
        """`staging_bytes`: of each of two buffers of pinned memory, which are taken at the first copy."""
        self._device = device
        self._size = staging_bytes // torch.bfloat16.itemsize
        self._buffers: list[torch.Tensor] = []  # [size] bf16
        self._read: list[Event | None] = [None, None]  # when what was copied from a buffer has left it
        self._current = self._used = 0

    def __call__(self, slot: Slot, filling: Filling, *, in_use: bool = True) -> None:
        """Raises DeviceFull: there is no pinned memory for the buffers."""
        while len(self._buffers) < len(self._read):
            self._buffers.append(self._device.pinned((self._size,), torch.bfloat16))
        groups = slice(slot.offset // SMALLEST_RANK, (slot.offset + slot.rank) // SMALLEST_RANK)
        end = slot.offset + slot.rank
        if in_use:
            self._stream.wait(self._device.main.record())
        with self._device.on(self._stream):
            for arena, weights in filling:
                filled = slot.offset
                if weights is not None:
                    filled += weights.rank
                    for rows, source in ((arena.a, weights.a), (arena.bt, weights.bt)):
                        self._copy(rows[slot.offset : filled].view(-1), source.view(-1))
                    if weights.affine is not None:  # as pairs of 16 bits
                        numbers = _room(arena)[groups.start].view(torch.bfloat16)
                        self._copy(numbers.view(-1), weights.affine.view(torch.bfloat16).view(-1))
                if filled < end:
                    self._device.fill(arena.a[filled:end], 0.0)
                    self._device.fill(arena.bt[filled:end], 0.0)
                self._device.fill(arena.targeted[groups], 0.0 if weights is None else float(weights.has))
        self._read[self._current] = done = self._stream.record()
        self._device.main.wait(done)

    @cached_property
    def _stream(self) -> WorkStream:
        return self._device.stream()

    def _copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        """to[n] = source[n], through the buffers."""
        first = 0
        while first < len(source):
            if self._used == self._size:
                self._take_next()
            count = min(len(source) - first, self._size - self._used)
            staged = self._buffers[self._current][self._used : self._used + count]
            staged.copy_(source[first : first + count])
            self._device.copy(to[first : first + count], staged)
            self._used += count
            first += count

    def _take_next(self) -> None:
        self._read[self._current] = self._stream.record()
        self._current, self._used = (self._current + 1) % len(self._buffers), 0
        event = self._read[self._current]
        if event is not None:
            event.synchronize()
