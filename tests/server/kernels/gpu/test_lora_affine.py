"""Gain and shift of a layer by kernels/gpu/lora.py: against the adapter package's loop, equal bits in any company."""

from __future__ import annotations

import pytest
import torch

from loramux_adapters.lora.ops import HAS_AFFINE, HAS_DELTA, Arena
from loramux_adapters.lora.slots import SMALLEST_RANK
from loramux_server.kernels.gpu import lora
from loramux_server.kernels.gpu.launch import launch_now
from loramux_server.kernels.gpu.step import plain
from support.gpu_lora import (
    ARENA_ROWS,
    EVERY_RANK,
    INPUTS,
    SLOTS,
    SUMS,
    Adapters,
    Layers,
    add,
    assert_same_bits_in_any_company,
    by_loop,
    delta_error,
    fill,
    make_layers,
    make_tables,
    numbers,
    step,
)

# What the interpreter does with the bounds of a loop that come from memory.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")


@pytest.fixture
def layers(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Layers:
    return make_layers(device, monkeypatch)


HAS = {8: HAS_DELTA | HAS_AFFINE, 16: HAS_DELTA, 32: HAS_AFFINE, 64: HAS_DELTA | HAS_AFFINE, 128: 0, 256: HAS_DELTA}


@pytest.fixture
def roomy(layers: Layers) -> Layers:
    """The same with room for gain and shift; what adapters have follows from their rank, and idle groups are NaN.

    Rank 16 misses the second layer, rank 64 has gain and shift alone there.
    """
    targets = []
    for index, target in enumerate(layers.targets):
        arena, random = target.arena, torch.Generator().manual_seed(40 + index)
        has = torch.ones(ARENA_ROWS // SMALLEST_RANK, dtype=torch.uint8)
        affine = torch.full((len(has), 2, arena.bt.shape[1]), torch.nan)
        for rank, slot in SLOTS.items():
            group = slot.offset // SMALLEST_RANK
            has[group : group + rank // SMALLEST_RANK] = HAS[rank]
            if HAS[rank] & HAS_AFFINE:
                affine[group] = torch.randn(2, arena.bt.shape[1], generator=random) * 0.3
        if index == 1:
            has[SLOTS[16].offset // SMALLEST_RANK : 4] = 0
            has[SLOTS[64].offset // SMALLEST_RANK : 16] = HAS_AFFINE
        device = arena.a.device
        targets.append(lora.LoraTarget(Arena(arena.a, arena.bt, has.to(device), affine.to(device)), target.column))
    return Layers(targets, layers.columns)


MIXES = [
    pytest.param([((), 2), *((adapters, 1) for adapters in EVERY_RANK), ((), 1)], id="every rank"),
    pytest.param([*((adapters, 2) for adapters in SUMS), (EVERY_RANK[1], 1)], id="sums"),
    pytest.param([(EVERY_RANK[2], 19), ((), 1), (EVERY_RANK[0], 3), (EVERY_RANK[2], 14)], id="many rows"),
    pytest.param([(EVERY_RANK[2], 3)], id="gain and shift alone"),
]


@pytest.mark.parametrize("rounded", [False, True], ids=["fp32", "act"])
@pytest.mark.parametrize("runs", MIXES)
def test_gain_and_shift_are_those_of_the_loop(
    device: torch.device, act: torch.dtype, roomy: Layers, runs: list[tuple[Adapters, int]], rounded: bool
) -> None:
    rows = step(runs)
    x = numbers(rows.num_rows, INPUTS, device, act)
    y = numbers(rows.num_rows, roomy.columns, device, act if rounded else torch.float32)
    want = by_loop(y.float(), x, roomy.targets, rows)
    tables = make_tables(device)
    fill(tables, rows)
    got, reference, by_operations = add(y.clone(), x, roomy.targets, tables), y.clone(), y.clone()
    lora.add_lora_reference(reference, x, roomy.targets, tables)
    plain.add_lora(launch_now, by_operations, x, roomy.targets, tables, None)
    for result in (got, reference, by_operations):
        if rounded:  # one rounding of numbers below 8
            assert (result.float() - want).abs().max() < 4 * torch.finfo(act).eps
        else:
            assert delta_error(result, want, y) < (1e-5 if act == torch.float16 else 1e-4)
    assert torch.equal(got[:, :3], y[:, :3]) and torch.equal(got[:, 303:308], y[:, 303:308])


def test_rows_with_gain_and_shift_have_the_same_bits_alone_in_company_and_in_any_order(
    device: torch.device, act: torch.dtype, roomy: Layers
) -> None:
    used: list[Adapters] = [EVERY_RANK[0], SUMS[0], EVERY_RANK[1], (), EVERY_RANK[2], SUMS[1], EVERY_RANK[4]]
    used += [EVERY_RANK[3]] * 18
    assert_same_bits_in_any_company(device, act, roomy, used, alone=(0, 1, 2, 4, 5, 20))


def test_room_for_gain_and_shift_changes_no_bit_of_rows_without(
    device: torch.device, act: torch.dtype, layers: Layers
) -> None:
    """Beside rows that have them, and where an adapter has neither for a layer: not even the sign of a zero."""
    rows = step([((), 2), (EVERY_RANK[0], 2), (EVERY_RANK[1], 18), (SUMS[0], 1), (EVERY_RANK[5], 1)])
    x = numbers(rows.num_rows, INPUTS, device, act)
    y = torch.full((rows.num_rows, layers.columns), -0.0, device=device)
    tables = make_tables(device)
    fill(tables, rows)
    before = add(y.clone(), x, layers.targets, tables)
    roomy = []
    for target in layers.targets:
        arena = target.arena
        affine = torch.full((len(arena.targeted), 2, arena.bt.shape[1]), torch.nan, device=device)
        has = arena.targeted.clone()
        group = SLOTS[256].offset // SMALLEST_RANK
        affine[group] = 0.5
        has[group] = HAS_DELTA | HAS_AFFINE  # of the last row
        roomy.append(lora.LoraTarget(Arena(arena.a, arena.bt, has, affine), target.column))
    after = add(y.clone(), x, roomy, tables)
    assert torch.equal(after[:-1].view(torch.int32), before[:-1].view(torch.int32))
    assert not torch.equal(after[-1], before[-1])


def test_programs_and_parts_change_no_bit_of_gain_and_shift(
    device: torch.device, act: torch.dtype, roomy: Layers
) -> None:
    rows = step([(SUMS[0], 2), (EVERY_RANK[3], 17)])
    x, y = (numbers(rows.num_rows, n, device, act) for n in (INPUTS, roomy.columns))
    results = []
    for is_split, programs in ((True, 3), (True, 70), (False, 3)):
        tables = make_tables(device, is_split=is_split, programs=programs)
        fill(tables, rows)
        results.append(add(y.float(), x, roomy.targets, tables))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
