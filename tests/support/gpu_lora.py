"""A stack of small layers with adapters of every rank, and steps for the LoRA kernels of graphics processors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from loramux_adapters.lora.ops import Arena, LoraRows, add_lora_loop
from loramux_adapters.lora.slots import SMALLEST_RANK, ScaledSlot, Slot
from loramux_server.kernels.gpu import cuts, lora
from loramux_server.kernels.gpu.launch import launch_now
from loramux_server.kernels.gpu.lora_tables import LoraSizes, LoraTables

ARENA_ROWS = 512
INPUTS = 184  # two parts of a sum as `layers` has them, the second one short, and no multiple of any tile
SIZES = LoraSizes(rows=48, runs=12, entries=3, ranks=320)
Adapters = tuple[ScaledSlot, ...]

SLOTS = {8: Slot(8, 8), 16: Slot(16, 16), 32: Slot(32, 32), 64: Slot(64, 64), 128: Slot(128, 128), 256: Slot(256, 256)}
EVERY_RANK: list[Adapters] = [(ScaledSlot(slot),) for slot in SLOTS.values()]
SUMS: list[Adapters] = [
    (ScaledSlot(SLOTS[8], 0.5), ScaledSlot(SLOTS[32], -1.5)),
    (ScaledSlot(SLOTS[32], -1.5), ScaledSlot(SLOTS[8], 0.5)),
    (ScaledSlot(SLOTS[16]), ScaledSlot(SLOTS[256], 0.25), ScaledSlot(SLOTS[8], 0.0)),
]


class Layers(NamedTuple):
    """A stack, what it writes into, and the inputs it reads."""

    targets: list[lora.LoraTarget]
    columns: int


def make_layers(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Layers:
    """Three layers with a gap between their columns; the widest takes two turns. Rank 16 misses the second layer.

    Parts are shorter than outside of tests, which the interpreter takes long for.
    """
    monkeypatch.setattr(cuts, "LORA_PART", 128)
    monkeypatch.setattr(lora, "STEP", dict.fromkeys(lora.STEP, 128))
    targets, column = [], 3
    for index, out in enumerate((300, 24, 40)):
        targets.append(lora.LoraTarget(make_arena(INPUTS, out, device, seed=index), column))
        column += out + 5
    targets[1].arena.targeted[SLOTS[16].offset // SMALLEST_RANK : 4] = 0
    return Layers(targets, column)


def make_arena(inputs: int, outputs: int, device: torch.device, seed: int = 0) -> Arena:
    random = torch.Generator().manual_seed(seed)
    a = torch.randn(ARENA_ROWS, inputs, generator=random) / inputs**0.5
    bt = torch.randn(ARENA_ROWS, outputs, generator=random) * 0.1
    targeted = torch.ones(ARENA_ROWS // SMALLEST_RANK, dtype=torch.uint8)
    return Arena(a.bfloat16().to(device), bt.bfloat16().to(device), targeted.to(device))


def make_tables(
    device: torch.device, sizes: LoraSizes = SIZES, *, is_split: bool = True, programs: int = 7
) -> LoraTables:
    """Nothing that a step does not fill may matter, so the table begins with what would be read out of bounds."""
    table = torch.full((sizes.numbers,), 2**30, dtype=torch.int32, device=device)
    return LoraTables(sizes, table, is_split=is_split, programs=programs)


def fill(tables: LoraTables, rows: LoraRows | None) -> None:
    """As a device does: only what was written is copied, and behind it lies what would be out of bounds."""
    staging = np.full(tables.sizes.numbers, 2**30, np.int32)
    used = tables.fill(staging, rows)
    tables.tensor[:used].copy_(torch.from_numpy(staging[:used]))


def add(
    y: torch.Tensor,
    x: torch.Tensor,
    targets: Sequence[lora.LoraTarget],
    tables: LoraTables,
    launch: Any = launch_now,
) -> torch.Tensor:
    size = lora.lora_scratch(tables, x.shape[1], len(targets))
    scratch = torch.full((size,), torch.nan, dtype=torch.float32, device=x.device)
    lora.add_lora(launch, y, x, targets, tables, scratch)
    return y


def step(runs: list[tuple[Adapters, int]]) -> LoraRows:
    rows = LoraRows.build(runs)
    assert rows is not None
    return rows


def numbers(rows: int, columns: int, like: torch.device, dtype: torch.dtype, seed: int = 9) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(like, dtype)


def by_loop(y: torch.Tensor, x: torch.Tensor, targets: Sequence[lora.LoraTarget], rows: LoraRows) -> torch.Tensor:
    y = y.clone()
    for target in targets:
        span = slice(target.column, target.column + target.arena.bt.shape[1])
        add_lora_loop(y[:, span], x, target.arena, rows)
    return y


def delta_error(got: torch.Tensor, want: torch.Tensor, before: torch.Tensor) -> float:
    """Of the deltas alone, as a part of their size."""
    return float((got.float() - want.float()).norm() / (want.float() - before.float()).norm())


def assert_same_bits_in_any_company(
    device: torch.device, act: torch.dtype, layers: Layers, used: Sequence[Adapters], alone: Sequence[int]
) -> None:
    """Rows of these adapters in two other orders, and those at `alone` by themselves, have the bits that they have."""
    x = numbers(len(used), INPUTS, device, act)
    y = numbers(len(used), layers.columns, device, torch.float32)
    tables = make_tables(device, programs=5)
    fill(tables, step([(adapters, 1) for adapters in used]))
    together = add(y.clone(), x, layers.targets, tables)
    for order in (list(reversed(range(len(used)))), torch.randperm(len(used)).tolist()):
        fill(tables, step([(used[t], 1) for t in order]))
        assert torch.equal(add(y[order], x[order], layers.targets, tables), together[order])
    few = make_tables(device, LoraSizes(rows=1, runs=1, entries=2, ranks=64))
    for t in alone:
        fill(few, step([(used[t], 1)]))
        assert torch.equal(add(y[t : t + 1].clone(), x[t : t + 1], layers.targets, few)[0], together[t])
