"""Every way to add LoRA deltas against the slow loop, over ranks, shapes, popularity and missing targets."""

from __future__ import annotations

import pytest
import torch

from loramux_adapters.device.cpu import CpuDevice
from loramux_adapters.lora.ops import (
    HAS_AFFINE,
    HAS_DELTA,
    AddLora,
    LoraRows,
    add_lora_loop,
    add_lora_segments,
)
from loramux_adapters.lora.slots import SMALLEST_RANK, ScaledSlot, Slot
from loramux_server.kernels.choice import choose_kernels
from loramux_server.kernels.compiled.adapter_kernels import NativeAddLora
from loramux_server.kernels.compiled.library import Compiled, native_library
from loramux_server.kernels.grouped_lora import GroupedAddLora, grouped_add_lora
from support.lora_rows import RANKS, make_arena, make_rows, make_sums

# how many of 24 rows each of the adapters gets; style after Punica's benchmarks
POPULARITY = {
    "distinct": [1] * 12,
    "uniform": [3] * 8,
    "zipf": [12, 6, 3, 2, 1],
    "identical": [24],
    "skewed": [20, 1, 1, 1, 1],
}


def paths() -> dict[str, AddLora]:
    found: dict[str, AddLora] = {"segments": add_lora_segments, "grouped": GroupedAddLora()}
    if (library := native_library()) is not None:
        for isa in library.isas:
            found[f"native {isa.label}"] = NativeAddLora(Compiled(library, isa))
    return found


PATHS = list(paths())
NATIVE = [path for path in PATHS if path.startswith("native")]


def rows_for(path: str, *size: int) -> torch.Tensor:
    """Random numbers of the dtype that this path is given: fp32 on the CPU, bf16 where CUDA's would run."""
    values = torch.randn(*size)
    return values if path.startswith("native") else values.bfloat16()


def test_the_compiled_kernel_was_built_so_that_the_tests_below_cover_it() -> None:
    assert native_library() is not None
    assert choose_kernels(CpuDevice()).lora == "native" and len(NATIVE) > 1


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("popularity", POPULARITY)
@pytest.mark.parametrize(("inputs", "outputs"), [(576, 192), (64, 320), (50, 33)])
def test_a_fast_path_equals_the_loop(path: str, popularity: str, inputs: int, outputs: int) -> None:
    arena, rows = make_arena(inputs, outputs), make_rows(POPULARITY[popularity])
    arena.targeted[rows.segments[-1].slots[0].slot.offset // SMALLEST_RANK] = 0
    x, y = rows_for(path, rows.num_rows, inputs), rows_for(path, rows.num_rows, outputs)
    expected, got = y.clone(), y.clone()
    add_lora_loop(expected, x, arena, rows)
    paths()[path](got, x, arena, rows)
    # fp32 sums of values up to about 8 in another order (compiled), three bf16 roundings (tensor)
    exact = path.startswith("native")
    assert (got.float() - expected.float()).abs().max() <= (1e-5 if exact else 0.1)
    assert (got.float() - expected.float()).abs().mean() <= (1e-6 if exact else 0.004)
    assert torch.equal(got[:2], y[:2]), "rows without an adapter are untouched"
    last = rows.segments[-1]
    assert torch.equal(got[last.start : last.stop], y[last.start : last.stop]), "a layer it does not target neither"


@pytest.mark.parametrize("path", NATIVE)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("composed", [False, True])
def test_a_row_has_the_same_bits_alone_and_in_any_batch(path: str, threads: int, composed: bool) -> None:
    rows = make_sums(POPULARITY["zipf"], RANKS) if composed else make_rows(POPULARITY["zipf"])
    arena = make_arena(576, 192)
    x, y = torch.randn(rows.num_rows, 576), torch.randn(rows.num_rows, 192)
    together = y.clone()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        paths()[path](together, x, arena, rows)
    finally:
        torch.set_num_threads(before)
    for segment in rows.segments:
        for t in range(segment.start, segment.stop):
            alone, row = y[t : t + 1].clone(), LoraRows.build([(segment.slots, 1)])
            assert row is not None
            paths()[path](alone, x[t : t + 1].contiguous(), arena, row)
            assert torch.equal(alone[0], together[t])


@pytest.mark.parametrize("path", [*NATIVE, "segments"])
def test_a_broken_adapter_harms_only_its_own_rows(path: str) -> None:
    arena, rows = make_arena(64, 96), make_rows([2, 2, 2])
    x, y = rows_for(path, 8, 64), rows_for(path, 8, 96)
    clean = y.clone()
    paths()[path](clean, x, arena, rows)
    slot = rows.segments[1].slots[0].slot
    arena.a[slot.offset] = float("nan")
    arena.bt[slot.offset + 1] = float("inf")
    broken = y.clone()
    paths()[path](broken, x, arena, rows)
    assert broken[4:6].isnan().any(-1).all()
    keep = [0, 1, 2, 3, 6, 7]
    assert torch.equal(broken[keep], clean[keep])


def test_the_compiled_kernel_refuses_what_it_would_misread() -> None:
    arena, rows = make_arena(64, 96), make_rows([1], base_rows=0)
    native = paths()[NATIVE[-1]]
    with pytest.raises(ValueError, match="takes fp32"):
        native(torch.zeros(1, 96).bfloat16(), torch.zeros(1, 64).bfloat16(), arena, rows)
    with pytest.raises(ValueError, match="lie close together"):
        native(torch.zeros(96, 2).T[:1], torch.zeros(1, 64), arena, rows)
    with pytest.raises(ValueError, match="the step has"):
        native(torch.zeros(2, 96), torch.zeros(2, 64), arena, rows)


def test_grouped_products_are_tried_before_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = CpuDevice()
    assert isinstance(grouped_add_lora(cpu), GroupedAddLora)

    def wrong(x: torch.Tensor, w: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        return torch.ones(x.shape[0], w.shape[2]).bfloat16()

    def unable(x: torch.Tensor, w: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("not on this device")

    def of_other_arguments(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return x

    for kernel in (wrong, unable, of_other_arguments):
        monkeypatch.setattr("loramux_server.kernels.grouped_lora.grouped_mm", kernel)
        assert grouped_add_lora(cpu) is None


def test_grouped_products_are_made_for_a_step_once_and_for_its_rows_alone() -> None:
    path, arena = GroupedAddLora(), make_arena(64, 96)
    for counts in ([3, 1], [1, 2], [3, 1]):
        rows = make_rows(counts)
        x, y = torch.randn(rows.num_rows, 64).bfloat16(), torch.zeros(rows.num_rows, 96).bfloat16()
        expected = y.clone()
        for _ in range(2):
            path(y, x, arena, rows)
            add_lora_segments(expected, x, arena, rows)
        assert (y.float() - expected.float()).abs().max() <= 0.05
    with pytest.raises(ValueError, match="the step has"):
        path(y[:1], x[:1], arena, rows)


def test_rows_without_any_adapter_make_no_work() -> None:
    assert LoraRows.build([((), 3), ((), 1)]) is None
    assert LoraRows.build([]) is None


def test_neighbours_with_the_same_adapters_become_one_segment() -> None:
    one, two = (ScaledSlot(Slot(8, 8)),), (ScaledSlot(Slot(8, 8)), ScaledSlot(Slot(16, 16), -0.5))
    rows = LoraRows.build([((), 1), (one, 2), (one, 1), (two, 1), (two, 1)])
    assert rows is not None
    assert [(s.start, s.stop, s.slots) for s in rows.segments] == [(1, 4, one), (4, 6, two)]
    assert rows.num_rows == 6
    assert rows.first.tolist() == [0, 0, 1, 2, 3, 5, 7]
    assert rows.offset.tolist() == [8, 8, 8, 8, 16, 8, 16]
    assert rows.rank.tolist() == [8, 8, 8, 8, 16, 8, 16]
    assert rows.scale.tolist() == [1, 1, 1, 1, -0.5, 1, -0.5]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("popularity", POPULARITY)
@pytest.mark.parametrize("ranks", [[8], [256, 8], [64, 32, 16, 8], [8] * 9, [128, 64, 8, 16, 8]], ids=str)
@pytest.mark.parametrize(("inputs", "outputs"), [(576, 192), (50, 33)])
def test_a_row_of_several_adapters_gets_the_sum_of_their_scaled_deltas(
    path: str, popularity: str, ranks: list[int], inputs: int, outputs: int
) -> None:
    arena, rows = make_arena(inputs, outputs), make_sums(POPULARITY[popularity], ranks)
    arena.targeted[rows.segments[-1].slots[-1].slot.offset // SMALLEST_RANK] = 0
    x, y = rows_for(path, rows.num_rows, inputs), rows_for(path, rows.num_rows, outputs)
    expected, got = y.clone(), y.clone()
    for segment in rows.segments:  # in double precision, and not by way of the loop
        run = slice(segment.start, segment.stop)
        total = y[run].double()
        for entry in segment.slots:
            window = slice(entry.slot.offset, entry.slot.offset + entry.slot.rank)
            if arena.targeted[window.start // SMALLEST_RANK]:
                total += entry.scale * (x[run].double() @ arena.a[window].double().T @ arena.bt[window].double())
        expected[run] = total.to(y.dtype)
    reference = y.clone()
    add_lora_loop(reference, x, arena, rows)
    paths()[path](got, x, arena, rows)
    exact = path.startswith("native")
    assert (reference.float() - expected.float()).abs().max() <= (3e-5 if exact else 0.07), "the loop itself"
    # fp32 sums of values up to about 16 (compiled), three bf16 roundings for each adapter (tensor)
    assert (got.float() - expected.float()).abs().max() <= (3e-5 if exact else 0.3)
    assert (got.float() - expected.float()).abs().mean() <= (3e-6 if exact else 0.01)
    assert torch.equal(got[:2], y[:2])


@pytest.mark.parametrize("path", PATHS)
def test_a_factor_of_one_changes_no_bit_and_one_of_zero_adds_nothing(path: str) -> None:
    arena = make_arena(576, 192)
    x, y = rows_for(path, 3, 576), rows_for(path, 3, 192)
    first, second = Slot(0, 16), Slot(64, 64)
    results = []
    for slots in ([(first, 1.0)], [(first, 1.0), (second, 0.0)], [(second, 0.0), (first, 1.0)]):
        rows = LoraRows.build([(tuple(ScaledSlot(slot, scale) for slot, scale in slots), 3)])
        assert rows is not None
        got = y.clone()
        paths()[path](got, x, arena, rows)
        results.append(got)
    assert not torch.equal(results[0], y)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("popularity", POPULARITY)
@pytest.mark.parametrize(("inputs", "outputs"), [(576, 192), (64, 320), (50, 33), (7, 5)])
def test_every_instruction_set_gives_the_same_bits(popularity: str, inputs: int, outputs: int) -> None:
    arena, rows = make_arena(inputs, outputs), make_sums(POPULARITY[popularity], RANKS)
    x, y = torch.randn(rows.num_rows, inputs), torch.randn(rows.num_rows, outputs)
    x[4, inputs // 2] = float("nan")
    results = []
    for path in NATIVE:
        got = y.clone()
        paths()[path](got, x, arena, rows)
        results.append(got.view(torch.int32))
        assert got[4].isnan().all() and got[5:].isfinite().all()
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("path", NATIVE)
def test_rows_that_lie_apart_and_inputs_that_do_not_lie_close_are_taken(path: str) -> None:
    arena, rows = make_arena(64, 33), make_rows([3, 1])
    x, padded = torch.randn(64, rows.num_rows).T, torch.randn(rows.num_rows, 64)
    expected, before = padded[:, :33].clone(), padded.clone()
    paths()[path](expected, x.contiguous(), arena, rows)
    paths()[path](padded[:, :33], x, arena, rows)
    assert torch.equal(padded[:, :33], expected)
    assert torch.equal(padded[:, 33:], before[:, 33:]), "what lies between the rows is left alone"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_tensor_path_takes_both_dtypes(dtype: torch.dtype) -> None:
    arena, rows = make_arena(64, 96), make_sums([2, 1, 3], [8, 16])
    x, y = torch.randn(rows.num_rows, 64).to(dtype), torch.randn(rows.num_rows, 96).to(dtype)
    expected = y.clone()
    add_lora_loop(expected, x, arena, rows)
    add_lora_segments(y, x, arena, rows)
    assert (y.float() - expected.float()).abs().max() <= (1e-5 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize("path", NATIVE)
def test_an_adapter_that_does_not_target_the_layer_leaves_no_trace_wherever_it_stands(path: str) -> None:
    arena = make_arena(64, 96)
    arena.targeted[8] = 0
    absent, present = ScaledSlot(Slot(64, 8), 3.0), [ScaledSlot(Slot(0, 16), 0.5), ScaledSlot(Slot(16, 8), -1.0)]
    x, y = torch.randn(1, 64), torch.randn(1, 96)
    results = []
    for slots in (present, [absent, *present], [present[0], absent, present[1]], [*present, absent], [absent]):
        rows = LoraRows.build([(tuple(slots), 1)])
        assert rows is not None
        got = y.clone()
        paths()[path](got, x, arena, rows)
        results.append(got)
    assert all(torch.equal(results[0], other) for other in results[1:4])
    assert not torch.equal(results[0], y) and torch.equal(results[4], y)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("popularity", ["distinct", "zipf", "skewed"])
@pytest.mark.parametrize(("inputs", "outputs"), [(576, 192), (50, 33)])
def test_gain_and_shift_are_of_what_the_layer_itself_gives(
    path: str, popularity: str, inputs: int, outputs: int
) -> None:
    arena, rows = make_arena(inputs, outputs, affine=True), make_sums(POPULARITY[popularity], RANKS)
    assert arena.affine is not None
    arena.targeted[rows.segments[-1].slots[-1].slot.offset // SMALLEST_RANK] = 0
    x, y = rows_for(path, rows.num_rows, inputs), rows_for(path, rows.num_rows, outputs)
    expected, got, reference = y.clone(), y.clone(), y.clone()
    kinds = set()
    for segment in rows.segments:  # in double precision, and not by way of the loop
        run = slice(segment.start, segment.stop)
        own = y[run].double()
        total = own.clone()
        for entry in segment.slots:
            window = slice(entry.slot.offset, entry.slot.offset + entry.slot.rank)
            has = int(arena.targeted[window.start // SMALLEST_RANK])
            kinds.add(has)
            if has & HAS_DELTA:
                total += entry.scale * (x[run].double() @ arena.a[window].double().T @ arena.bt[window].double())
            if has & HAS_AFFINE:
                gain, shift = arena.affine[window.start // SMALLEST_RANK].double()
                total += entry.scale * (own * gain + shift)
        expected[run] = total.to(y.dtype)
    assert len(kinds) > 1
    add_lora_loop(reference, x, arena, rows)
    paths()[path](got, x, arena, rows)
    exact = path.startswith("native")
    assert (reference.float() - expected.float()).abs().max() <= (3e-5 if exact else 0.07), "the loop itself"
    assert (got.float() - expected.float()).abs().max() <= (3e-5 if exact else 0.3)
    assert torch.equal(got[:2], y[:2])


@pytest.mark.parametrize(("inputs", "outputs"), [(576, 192), (64, 320), (50, 33)])
def test_with_gain_and_shift_a_row_has_the_same_bits_alone_on_every_instruction_set(inputs: int, outputs: int) -> None:
    arena, rows = make_arena(inputs, outputs, affine=True), make_sums(POPULARITY["zipf"], RANKS)
    x, y = torch.randn(rows.num_rows, inputs), torch.randn(rows.num_rows, outputs)
    results = []
    for path in NATIVE:
        together = y.clone()
        paths()[path](together, x, arena, rows)
        results.append(together)
        for segment in rows.segments:
            alone, row = y[segment.start : segment.start + 1].clone(), LoraRows.build([(segment.slots, 1)])
            assert row is not None
            paths()[path](alone, x[segment.start : segment.start + 1].contiguous(), arena, row)
            assert torch.equal(alone[0], together[segment.start])
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("summed", [False, True], ids=["one adapter a row", "sums"])
def test_room_for_gain_and_shift_changes_no_bit_of_adapters_without(path: str, summed: bool) -> None:
    plain, roomy = make_arena(576, 192), make_arena(576, 192, affine=True)
    roomy.targeted.fill_(HAS_DELTA)
    rows = make_sums(POPULARITY["zipf"], RANKS) if summed else make_rows(POPULARITY["zipf"])
    x, y = rows_for(path, rows.num_rows, 576), rows_for(path, rows.num_rows, 192)
    first, second = y.clone(), y.clone()
    paths()[path](first, x, plain, rows)
    paths()[path](second, x, roomy, rows)
    assert torch.equal(first, second)


def test_picked_rows_keep_the_adapters_that_they_had() -> None:
    a, b = (ScaledSlot(Slot(8, 8)),), (ScaledSlot(Slot(0, 8)), ScaledSlot(Slot(16, 16), 0.5))
    rows = LoraRows.build([((), 2), (a, 3), (b, 1), ((), 1), (a, 2)])
    assert rows is not None
    picked = rows.picked([1, 3, 4, 5, 8])
    expected = LoraRows.build([((), 1), (a, 2), (b, 1), (a, 1)])
    assert picked is not None and expected is not None
    assert picked.segments == expected.segments and picked.num_rows == 5
    for name in ("first", "offset", "rank", "scale"):
        assert getattr(picked, name).tolist() == getattr(expected, name).tolist()
    assert rows.picked([0, 6]) is None
