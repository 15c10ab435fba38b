"""LoRA deltas as grouped products of the library: the path of CUDA devices, tested on the CPU.

Semantics are those of lora/ops.py. However many adapters a step uses, there are two products for each rank and each
place in a row's sum: an arena seen as [slots of that rank, rank, width] has one group of rows for each slot, most of
them empty. Gain and shift are gathered row by row. Intermediates are rounded to bf16 where `add_lora_segments` rounds
them.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import grouped_mm

from loramux_adapters.device.device import Device
from loramux_adapters.lora.ops import HAS_AFFINE, HAS_DELTA, Arena, LoraRows, add_lora_segments, check_rows
from loramux_adapters.lora.slots import SMALLEST_RANK, ScaledSlot, Slot

_ALIGNED = 8  # numbers of bf16 in the 16 bytes that the library wants rows to be a multiple of
_KEPT = 2  # plans: a step has one for its rows and one for the output head's


@dataclass(frozen=True, slots=True)
class Part:
    """The entries of one rank at one place of their rows' sums, in the order of their slots.

    Attributes:
        rows: [n] int64, none twice.
        ends: [slots of this rank] int32, where each slot's rows end.
        unit: [n] int64, which SMALLEST_RANK rows of the arena each entry's slot begins with.
        scale: [n, 1] fp32.
    """

    rank: int
    rows: torch.Tensor
    ends: torch.Tensor
    unit: torch.Tensor
    scale: torch.Tensor

    def delta(self, x: torch.Tensor, arena: Arena) -> torch.Tensor:
        """[n, out] bf16."""
        slots = len(self.ends)
        a, bt = (stack[: slots * self.rank].view(slots, self.rank, -1) for stack in (arena.a, arena.bt))
        h = grouped_mm(x.index_select(0, self.rows), a.transpose(1, 2), offs=self.ends)
        h = torch.where(self._has(HAS_DELTA, arena), h * self.scale, 0.0).to(x.dtype)
        return grouped_mm(h, bt, offs=self.ends)

    def change(self, y: torch.Tensor, arena: Arena) -> torch.Tensor:
        """[n, out] fp32: what gain and shift add to y [rows, out], of the layer itself."""
        assert arena.affine is not None
        gain, shift = arena.affine[self.unit].unbind(1)
        change = self.scale * (y.index_select(0, self.rows).float() * gain + shift)
        return torch.where(self._has(HAS_AFFINE, arena), change, 0.0)

    def _has(self, what: int, arena: Arena) -> torch.Tensor:
        """[n, 1] bool; elsewhere the slot holds what another adapter left."""
        return (arena.targeted[self.unit] & what != 0)[:, None]


class GroupedAddLora:
    """`AddLora` by grouped products. Widths that are no multiple of 8 take the tensor path."""

    name = "grouped"

    def __init__(self) -> None:
        self._plans: deque[tuple[LoraRows, list[list[Part]]]] = deque(maxlen=_KEPT)

    def __call__(self, y: torch.Tensor, x: torch.Tensor, arena: Arena, rows: LoraRows) -> None:
        if arena.a.shape[1] % _ALIGNED or arena.bt.shape[1] % _ALIGNED:
            add_lora_segments(y, x, arena, rows)
            return
        check_rows(y, x, rows)
        places = self._plan_of(rows, arena.a.shape[0], x.device)
        if len(places) == 1 and arena.affine is None:
            for part in places[0]:
                y.index_add_(0, part.rows, part.delta(x, arena))
            return
        total = torch.zeros(y.shape, dtype=torch.float32, device=y.device)
        if arena.affine is not None:
            for part in chain.from_iterable(places):
                total.index_add_(0, part.rows, part.change(y, arena))
        for place in places:  # in the order of the sums
            for part in place:
                total.index_add_(0, part.rows, part.delta(x, arena).float())
        used = torch.cat([part.rows for part in places[0]])  # every row with an adapter has a first one
        y.index_copy_(0, used, (y[used].float() + total[used]).to(y.dtype))

    def _plan_of(self, rows: LoraRows, arena_rows: int, device: torch.device) -> list[list[Part]]:
        """Made once for all layers of a step."""
        for known, plan in self._plans:
            if known is rows:
                return plan
        plan = make_plan(rows, arena_rows, device)
        self._plans.append((rows, plan))
        return plan


def make_plan(rows: LoraRows, arena_rows: int, device: torch.device) -> list[list[Part]]:
    """For each place in the sums, its entries by rank."""

    def on_device(values: npt.NDArray[Any], dtype: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(values).to(dtype).to(device)

    counts = np.diff(rows.first)
    plan: list[list[Part]] = []
    for place in range(int(counts.max())):
        having = np.flatnonzero(counts > place)
        entries = rows.first[having] + place
        parts = []
        for rank in np.unique(rows.rank[entries]):
            chosen = rows.rank[entries] == rank
            order, own, ends = _in_order(rows, entries[chosen], int(rank), arena_rows // int(rank))
            parts.append(
                Part(
                    int(rank),
                    on_device(having[chosen][order], torch.int64),
                    on_device(ends, torch.int32),
                    on_device(rows.offset[own] // SMALLEST_RANK, torch.int64),
                    on_device(rows.scale[own], torch.float32)[:, None],
                )
            )
        plan.append(parts)
    return plan


def _in_order(
    rows: LoraRows, entries: npt.NDArray[np.int32], rank: int, slots: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Entries of one rank by slot: (their order, the entries in it, where each slot's end)."""
    slot = rows.offset[entries] // rank
    order = np.argsort(slot, kind="stable")
    return order, entries[order], np.cumsum(np.bincount(slot, minlength=slots))


def grouped_add_lora(device: Device) -> GroupedAddLora | None:
    """This path if the device's library has it and it agrees there with the tensor path; None otherwise."""
    random = torch.Generator().manual_seed(0)
    a, bt = (device.put(torch.randn(64, 64, generator=random).to(torch.bfloat16)) / 8 for _ in range(2))
    has = torch.full((len(a) // SMALLEST_RANK,), HAS_DELTA, dtype=torch.uint8)
    has[2] |= HAS_AFFINE  # of the slot at row 16
    affine = device.put(torch.randn(len(has), 2, 64, generator=random) / 8)
    arena = Arena(a, bt, device.put(has), affine)
    slots = [(ScaledSlot(Slot(0, 16)),), (ScaledSlot(Slot(16, 8)), ScaledSlot(Slot(32, 32), 0.5)), ()]
    rows = LoraRows.build([(used, count) for used, count in zip(slots, (3, 2, 1), strict=True)])
    assert rows is not None
    x = device.put(torch.randn(rows.num_rows, 64, generator=random).to(torch.bfloat16))
    ours, theirs = torch.zeros_like(x), torch.zeros_like(x)
    path = GroupedAddLora()
    try:
        path(ours, x, arena, rows)
    except (RuntimeError, ValueError, TypeError):  # what the library says of a case that it does not take
        return None
    add_lora_segments(theirs, x, arena, rows)
    return path if torch.allclose(ours.float(), theirs.float(), rtol=0.05, atol=0.05) else None
