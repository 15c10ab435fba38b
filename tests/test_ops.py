"""Every way to add LoRA deltas against the slow loop, over ranks, shapes, popularity and missing targets."""

from __future__ import annotations

import pytest
import torch

from loramux_adapters.ops import (
    AddLora,
    Arena,
    LoraRows,
    NativeAddLora,
    add_lora_loop,
    add_lora_segments,
    native_library,
    select_add_lora,
)
from loramux_adapters.slots import SMALLEST_RANK, Slot

ROWS = 512
# how many of 24 rows each of the adapters gets; style after Punica's benchmarks
POPULARITY = {
    "distinct": [1] * 12,
    "uniform": [3] * 8,
    "zipf": [12, 6, 3, 2, 1],
    "identical": [24],
    "skewed": [20, 1, 1, 1, 1],
}
RANKS = [8, 16, 32, 64, 8, 16, 32, 8, 8, 16, 8, 8]


def paths() -> dict[str, AddLora]:
    found: dict[str, AddLora] = {"segments": add_lora_segments}
    if (library := native_library()) is not None:
        found["native"] = NativeAddLora(library)
        found["native portable"] = NativeAddLora(library, portable=True)
    return found


def make_arena(inputs: int, outputs: int) -> Arena:
    generator = torch.Generator().manual_seed(0)
    targeted = torch.ones(ROWS // SMALLEST_RANK, dtype=torch.uint8)
    return Arena(
        (torch.randn(ROWS, inputs, generator=generator) / inputs**0.5).bfloat16(),
        (torch.randn(ROWS, outputs, generator=generator) * 0.1).bfloat16(),
        targeted,
    )


def make_rows(counts: list[int], base_rows: int = 2) -> LoraRows:
    slots: list[tuple[Slot | None, int]] = [(None, base_rows)]
    offset = 0
    for count, rank in zip(counts, RANKS, strict=False):
        offset = -(-offset // rank) * rank
        slots.append((Slot(offset, rank), count))
        offset += rank
    rows = LoraRows.build(slots)
    assert rows is not None
    return rows


def test_the_compiled_kernel_was_built_so_that_the_tests_below_cover_it() -> None:
    assert native_library() is not None
    assert select_add_lora(torch.device("cpu"), torch.bfloat16)[1].startswith("native")


@pytest.mark.parametrize("path", ["segments", "native", "native portable"])
@pytest.mark.parametrize("popularity", POPULARITY)
@pytest.mark.parametrize(("inputs", "outputs"), [(576, 192), (64, 320), (50, 33)])
def test_a_fast_path_equals_the_loop(path: str, popularity: str, inputs: int, outputs: int) -> None:
    arena, rows = make_arena(inputs, outputs), make_rows(POPULARITY[popularity])
    arena.targeted[rows.segments[-1].slot.offset // SMALLEST_RANK] = 0
    x = torch.randn(len(rows.rank), inputs).bfloat16()
    y = torch.randn(len(rows.rank), outputs).bfloat16()
    expected, got = y.clone(), y.clone()
    add_lora_loop(expected, x, arena, rows)
    paths()[path](got, x, arena, rows)
    # one bf16 rounding of values up to about 8 (compiled), three (tensor)
    tolerance = 0.04 if path.startswith("native") else 0.1
    assert (got.float() - expected.float()).abs().max() <= tolerance
    assert (got.float() - expected.float()).abs().mean() <= 0.004
    assert torch.equal(got[:2], y[:2]), "rows without an adapter are untouched"
    last = rows.segments[-1]
    assert torch.equal(got[last.start : last.stop], y[last.start : last.stop]), "a layer it does not target neither"


@pytest.mark.parametrize("path", ["native", "native portable"])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_has_the_same_bits_alone_and_in_any_batch(path: str, threads: int) -> None:
    arena, rows = make_arena(576, 192), make_rows(POPULARITY["zipf"])
    x = torch.randn(len(rows.rank), 576).bfloat16()
    y = torch.randn(len(rows.rank), 192).bfloat16()
    together = y.clone()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        paths()[path](together, x, arena, rows)
    finally:
        torch.set_num_threads(before)
    for segment in rows.segments:
        for t in range(segment.start, segment.stop):
            alone, row = y[t : t + 1].clone(), LoraRows.build([(segment.slot, 1)])
            assert row is not None
            paths()[path](alone, x[t : t + 1].contiguous(), arena, row)
            assert torch.equal(alone[0], together[t])


@pytest.mark.parametrize("path", ["native", "native portable", "segments"])
def test_a_broken_adapter_harms_only_its_own_rows(path: str) -> None:
    arena, rows = make_arena(64, 96), make_rows([2, 2, 2])
    x = torch.randn(8, 64).bfloat16()
    y = torch.randn(8, 96).bfloat16()
    clean = y.clone()
    paths()[path](clean, x, arena, rows)
    slot = rows.segments[1].slot
    arena.a[slot.offset] = float("nan")
    arena.bt[slot.offset + 1] = float("inf")
    broken = y.clone()
    paths()[path](broken, x, arena, rows)
    assert broken[4:6].isnan().any(-1).all()
    keep = [0, 1, 2, 3, 6, 7]
    assert torch.equal(broken[keep], clean[keep])


def test_the_compiled_kernel_refuses_what_it_would_misread() -> None:
    arena, rows = make_arena(64, 96), make_rows([1], base_rows=0)
    native = paths()["native"]
    with pytest.raises(ValueError, match="dense bf16"):
        native(torch.zeros(1, 96), torch.zeros(1, 64), arena, rows)
    with pytest.raises(ValueError, match="dense bf16"):
        native(torch.zeros(96, 2).bfloat16().T[:1], torch.zeros(1, 64).bfloat16(), arena, rows)


def test_rows_without_any_adapter_make_no_work() -> None:
    assert LoraRows.build([(None, 3), (None, 1)]) is None
    assert LoraRows.build([]) is None


def test_neighbours_with_one_adapter_become_one_segment() -> None:
    slot = Slot(8, 8)
    rows = LoraRows.build([(None, 1), (slot, 2), (slot, 3), (Slot(16, 16), 1)])
    assert rows is not None
    assert [(s.start, s.stop, s.slot) for s in rows.segments] == [(1, 6, slot), (6, 7, Slot(16, 16))]
    assert rows.offset.tolist() == [0, 8, 8, 8, 8, 8, 16]
    assert rows.rank.tolist() == [0, 8, 8, 8, 8, 8, 16]
