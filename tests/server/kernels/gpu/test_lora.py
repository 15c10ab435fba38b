"""LoRA deltas of kernels/gpu/lora.py against the loop of the adapter package, and equal bits in any company."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from loramux_adapters.lora.ops import Arena, LoraRows
from loramux_adapters.lora.slots import SMALLEST_RANK, ScaledSlot, Slot
from loramux_server.kernels.gpu import lora
from loramux_server.kernels.gpu.launch import launch_now
from loramux_server.kernels.gpu.lora_tables import LoraSizes, LoraTables, LoraTablesFull
from support.gpu_lora import (
    ARENA_ROWS,
    EVERY_RANK,
    INPUTS,
    SIZES,
    SLOTS,
    SUMS,
    Adapters,
    Layers,
    add,
    assert_same_bits_in_any_company,
    by_loop,
    delta_error,
    fill,
    make_arena,
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


@pytest.mark.parametrize(
    "runs",
    [
        pytest.param([((), 2), *((adapters, 1) for adapters in EVERY_RANK), ((), 1)], id="every rank"),
        pytest.param([*((adapters, 2) for adapters in SUMS), (EVERY_RANK[1], 1)], id="sums"),
        pytest.param([(EVERY_RANK[2], 19), ((), 1), (EVERY_RANK[0], 3), (EVERY_RANK[2], 14)], id="many rows"),
        pytest.param([(EVERY_RANK[1], 3)], id="one adapter"),
    ],
)
def test_it_adds_what_the_loop_adds(
    device: torch.device, act: torch.dtype, layers: Layers, runs: list[tuple[Adapters, int]]
) -> None:
    rows = step(runs)
    x = numbers(rows.num_rows, INPUTS, device, act)
    y = numbers(rows.num_rows, layers.columns, device, torch.float32)
    want = by_loop(y, x, layers.targets, rows)
    tables = make_tables(device)
    fill(tables, rows)
    got = add(y.clone(), x, layers.targets, tables)
    assert delta_error(got, want, y) < (1e-5 if act == torch.float16 else 1e-4)
    untouched = got == y
    assert untouched[:, :3].all()  # before the first layer's columns, and between those of two
    assert untouched[:, 303:308].all()
    assert not untouched[:, 3:303][np.diff(rows.first) > 0].all(1).any()
    reference = y.clone()
    lora.add_lora_reference(reference, x, layers.targets, tables)
    assert delta_error(reference, want, y) < 1e-5


@pytest.mark.parametrize("number", [1, 2])
def test_y_may_be_rounded_and_rows_may_lie_apart(
    device: torch.device, act: torch.dtype, layers: Layers, number: int
) -> None:
    rows = step([(EVERY_RANK[0], 2), ((), 1), (SUMS[0], 1)])
    targets = layers.targets[:number]
    x = numbers(rows.num_rows, INPUTS + 8, device, act)[:, 8:]
    whole = numbers(rows.num_rows, layers.columns + 7, device, act)
    before = whole.clone()
    tables = make_tables(device)
    fill(tables, rows)
    add(whole[:, : layers.columns], x, targets, tables)
    want = by_loop(before[:, : layers.columns].float(), x, targets, rows)
    assert torch.equal(whole[:, layers.columns :], before[:, layers.columns :])
    # One rounding: half of the last place of numbers below 8, beside what fp32 may differ in.
    assert (whole[:, : layers.columns].float() - want).abs().max() < 4 * torch.finfo(act).eps


def test_the_head_is_a_layer_like_others(device: torch.device, act: torch.dtype) -> None:
    head = lora.LoraTarget(make_arena(568, 1000, device))
    rows = step([((), 1), (EVERY_RANK[1], 2), (SUMS[1], 1)])
    x, y = numbers(4, 568, device, act), numbers(4, 1000, device, torch.float32)
    tables = make_tables(device, programs=2)
    fill(tables, rows)
    want = by_loop(y, x, [head], rows)
    assert delta_error(add(y.clone(), x, [head], tables), want, y) < 1e-4


def test_a_row_has_the_same_bits_alone_in_company_and_in_any_order(
    device: torch.device, act: torch.dtype, layers: Layers
) -> None:
    used: list[Adapters] = [EVERY_RANK[0], SUMS[0], EVERY_RANK[0], (), EVERY_RANK[2], SUMS[1], EVERY_RANK[0]]
    used += [EVERY_RANK[1]] * 18
    assert_same_bits_in_any_company(device, act, layers, used, alone=(0, 1, 4, 5, 20))


def test_programs_and_parts_summed_together_change_no_bit(
    device: torch.device, act: torch.dtype, layers: Layers
) -> None:
    rows = step([(SUMS[0], 2), (EVERY_RANK[1], 17)])
    x, y = (numbers(rows.num_rows, n, device, act) for n in (INPUTS, layers.columns))
    results = []
    for is_split, programs in ((True, 3), (True, 70), (False, 3)):
        tables = make_tables(device, is_split=is_split, programs=programs)
        fill(tables, rows)
        results.append(add(y.float(), x, layers.targets, tables))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_scale_is_the_factor_of_its_delta(device: torch.device, act: torch.dtype, layers: Layers) -> None:
    x = numbers(3, INPUTS, device, act)
    zeros = torch.zeros(3, layers.columns, device=device)
    slot = SLOTS[32]
    tables = make_tables(device)
    fill(tables, step([((ScaledSlot(slot, scale),), 1) for scale in (1.0, -2.0, 0.0)]))
    one, two, nothing = add(zeros, x[:1].expand(3, -1).contiguous(), layers.targets, tables)
    assert torch.equal(two, -2 * one)
    assert not nothing.any()


def test_what_lies_in_idle_rows_of_the_arena_is_never_read(
    device: torch.device, act: torch.dtype, layers: Layers
) -> None:
    rows = step([(EVERY_RANK[0], 2), (EVERY_RANK[1], 1), (SUMS[0], 1)])
    x, y = numbers(4, INPUTS, device, act), numbers(4, layers.columns, device, torch.float32)
    tables = make_tables(device)
    fill(tables, rows)
    before = add(y.clone(), x, layers.targets, tables)
    for target in layers.targets:
        for weights in (target.arena.a, target.arena.bt):
            for idle in (slice(0, 8), slice(64, None)):  # beside the slot of rank 8, and the larger ones
                weights[idle] = torch.nan
    missing = layers.targets[1].arena  # of the adapter of rank 16
    for weights in (missing.a, missing.bt):
        weights[16:32] = torch.nan
    assert torch.equal(add(y.clone(), x, layers.targets, tables), before)
    assert torch.isfinite(before).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_harms_no_other(
    device: torch.device, act: torch.dtype, layers: Layers, value: float
) -> None:
    rows = step([(EVERY_RANK[0], 3), (EVERY_RANK[2], 2)])
    x, y = numbers(5, INPUTS, device, act), numbers(5, layers.columns, device, torch.float32)
    tables = make_tables(device)
    fill(tables, rows)
    healthy = add(y.clone(), x, layers.targets, tables)
    x[1, 7] = value
    got = add(y.clone(), x, layers.targets, tables)
    others = [0, 2, 3, 4]
    assert torch.equal(got[others], healthy[others])
    assert not torch.isfinite(got[1, 3:303]).any()


def test_tables_filled_again_hold_nothing_of_the_step_before(
    device: torch.device, act: torch.dtype, layers: Layers
) -> None:
    large = step([(SUMS[2], 17), (SUMS[0], 3), (EVERY_RANK[5], 2)])
    small = step([((), 1), (EVERY_RANK[0], 1)])
    x, y = numbers(22, INPUTS, device, act), numbers(22, layers.columns, device, torch.float32)
    used, fresh = make_tables(device), make_tables(device)
    fill(used, large)
    fill(used, small)
    fill(fresh, small)
    got = add(y.clone(), x, layers.targets, used)  # rows behind the step's own: a graph has more than it fills
    assert torch.equal(got, add(y.clone(), x, layers.targets, fresh))
    assert torch.equal(got[2:], y[2:])
    fill(used, None)
    assert torch.equal(add(y.clone(), x, layers.targets, used), y)


def test_a_layer_that_no_adapter_changes_keeps_its_bits(device: torch.device, act: torch.dtype, layers: Layers) -> None:
    rows = step([((), 1), (EVERY_RANK[1], 2)])
    y = torch.full((3, layers.columns), -0.0, device=device)
    tables = make_tables(device)
    fill(tables, rows)
    add(y, numbers(3, INPUTS, device, act), layers.targets, tables)
    span = slice(layers.targets[1].column, layers.targets[1].column + 24)  # rank 16 has nothing for this one
    assert torch.signbit(y[:, span]).all()
    assert torch.signbit(y[0]).all()


def test_halves_keep_sixteen_bits_of_what_lies_between(device: torch.device, act: torch.dtype, layers: Layers) -> None:
    """What runs with bf16, whose products the interpreter does not have, with halves of fp16 instead."""
    rows = step([(EVERY_RANK[3], 3), (SUMS[0], 2)])
    arena = layers.targets[0].arena
    target = lora.LoraTarget(Arena(arena.a.to(act), arena.bt.to(act), arena.targeted))
    x, y = numbers(5, INPUTS, device, act), torch.zeros(5, 300, device=device)
    tables = make_tables(device)
    fill(tables, rows)

    def with_halves(kernel: Any, grid: tuple[int, ...], /, *args: Any, **constants: Any) -> None:
        if "HALVES" in constants:
            constants["HALVES"] = True
        launch_now(kernel, grid, *args, **constants)

    want = by_loop(y, x, [target], rows)
    assert delta_error(add(y.clone(), x, [target], tables, with_halves), want, y) < 2e-5


def test_two_launches_whose_size_does_not_depend_on_the_step(
    device: torch.device, act: torch.dtype, layers: Layers
) -> None:
    def launches(rows: LoraRows | None) -> list[Any]:
        seen: list[Any] = []

        def note(kernel: Any, grid: tuple[int, ...], /, *args: Any, **constants: Any) -> None:
            places = [arg.data_ptr() if isinstance(arg, torch.Tensor) else arg for arg in args]
            seen.append((kernel, grid, places, constants))

        fill(tables, rows)
        lora.add_lora(note, y, x, layers.targets, tables, scratch)
        return seen

    tables = make_tables(device, programs=1000)
    x, y = numbers(9, INPUTS, device, act), numbers(9, layers.columns, device, act)
    scratch = torch.empty(lora.lora_scratch(tables, INPUTS, 3), device=device)
    without = launches(None)
    assert len(without) == 2
    assert launches(step([(SUMS[0], 9)])) == without == launches(step([((), 3), (EVERY_RANK[5], 1)]))


@pytest.mark.parametrize(
    ("runs", "what"),
    [
        ([((), 49), (EVERY_RANK[0], 1)], "50 token rows"),
        ([((ScaledSlot(SLOTS[8], float(i)),), 1) for i in range(13)], "13 different sets of adapters"),
        ([((ScaledSlot(SLOTS[8]),) * 4, 1)], "4 adapters in a row"),
        ([((ScaledSlot(SLOTS[256]), ScaledSlot(SLOTS[128])), 1)], "384 ranks in a row"),
    ],
)
def test_a_step_that_is_too_large_is_refused(device: torch.device, runs: list[tuple[Adapters, int]], what: str) -> None:
    tables, staging = make_tables(device), np.ones(SIZES.numbers, np.int32)
    with pytest.raises(LoraTablesFull, match=what):
        tables.fill(staging, step(runs))
    assert not staging[:2].any()


def test_the_largest_step_fits(device: torch.device) -> None:
    """Runs of 17 rows make the most blocks, and each of their rows holds as many ranks as it may."""
    sizes = LoraSizes(rows=60, runs=6, entries=2, ranks=32)
    tables = make_tables(device, sizes)
    pair = SLOTS[8], SLOTS[16]
    runs = [
        (tuple(ScaledSlot(slot, float(i)) for slot in pair), count) for i, count in enumerate([17, 17, 17, 7, 1, 1])
    ]
    staging = np.zeros(sizes.numbers, np.int32)
    assert tables.fill(staging, step(runs)) == sizes.numbers
    assert staging[:2].tolist() == [sizes.tiles, sizes.blocks]


def test_tables_say_of_any_step_what_the_loop_does(device: torch.device, act: torch.dtype) -> None:
    """Against the slow reference, so that many steps can be tried."""
    random = np.random.default_rng(5)
    target = lora.LoraTarget(make_arena(32, 24, device))
    target.arena.targeted[:] = torch.from_numpy(random.integers(0, 2, ARENA_ROWS // SMALLEST_RANK)).to(device)
    slots = [Slot(offset, rank) for rank in (8, 16, 64, 256) for offset in range(0, ARENA_ROWS, 4 * rank)]
    tables = make_tables(device, LoraSizes(rows=64, runs=64, entries=3, ranks=768))
    for _ in range(30):
        choice: list[Adapters] = [()]
        for _ in range(random.integers(1, 6)):
            chosen = random.choice(len(slots), random.integers(1, 4))
            choice.append(tuple(ScaledSlot(slots[i], float(random.normal())) for i in chosen))
        runs = [(choice[random.integers(len(choice))], int(random.integers(0, 9))) for _ in range(7)]
        rows = LoraRows.build(runs)
        if rows is None:
            continue
        fill(tables, rows)
        x, y = numbers(rows.num_rows, 32, device, act), numbers(rows.num_rows, 24, device, torch.float32)
        want = by_loop(y, x, [target], rows)
        lora.add_lora_reference(y, x, [target], tables)
        torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)


def test_a_stack_that_does_not_fit_is_refused(device: torch.device, act: torch.dtype, layers: Layers) -> None:
    tables = make_tables(device)
    fill(tables, step([(EVERY_RANK[0], 3)]))
    x, y = numbers(3, INPUTS, device, act), numbers(3, layers.columns, device, torch.float32)
    targets = layers.targets
    for message, changed in (
        ("2 rows, the step has 3", (y[:2], x[:2], targets)),
        ("one to 3 layers", (y, x, [])),
        ("does not fit", (y[:, :200], x, targets)),
        ("does not fit", (y, x[:, :-8], targets)),
        ("bf16 or fp16", (y, x.float(), targets)),
        ("close together", (y, x[:, :1].expand(-1, INPUTS), targets)),
        ("rows have to lie close", (y, x, [lora.LoraTarget(_every_other(targets[0].arena))])),
        ("or none has", (y, x, [targets[0], _with_affine(targets[1], torch.float32, 24)])),
        ("gain and shift are", (y, x, [_with_affine(targets[0], torch.float16, 300)])),
        ("gain and shift are", (y, x, [_with_affine(targets[0], torch.float32, 299)])),
    ):
        with pytest.raises(ValueError, match=message):
            add(*changed, tables)
    with pytest.raises(ValueError, match="lora_scratch says"):
        lora.add_lora(launch_now, y, x, targets, tables, torch.empty(8, device=device))
    with pytest.raises(ValueError, match="LoRA tables are"):
        LoraTables(SIZES, tables.tensor[:-1], programs=1)
    with pytest.raises(ValueError, match="a staging array is"):
        tables.fill(np.zeros(SIZES.numbers), None)  # type: ignore[arg-type]


def _every_other(arena: Arena) -> Arena:
    return Arena(arena.a[::2], arena.bt[::2], arena.targeted)


def _with_affine(target: lora.LoraTarget, dtype: torch.dtype, outputs: int) -> lora.LoraTarget:
    arena = target.arena
    affine = torch.zeros(len(arena.targeted), 2, outputs, dtype=dtype, device=arena.a.device)
    return lora.LoraTarget(Arena(arena.a, arena.bt, arena.targeted, affine), target.column)
