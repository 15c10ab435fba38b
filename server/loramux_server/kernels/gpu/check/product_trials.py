"""Trials of products: with the base's own weights, and with adapters of several ranks made for it.

Near enough: products of two numbers of 16 bits are exact in fp32, and sums of fp32 in any order, as tensor cores take
them too, are off by some 2^-13 of the row's size for thousands of inputs. One input that is missing or counted twice
changes it by 2^-7 and more. A result of 16 bits is rounded once; what the adapters' kernels keep between their two
products has 16 bits, whose rounding is below 2^-16.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from loramux_adapters.lora.ops import HAS_AFFINE, HAS_DELTA, Arena, LoraRows
from loramux_adapters.lora.slots import SMALLEST_RANK, ScaledSlot, Slot
from loramux_server.kernels.gpu.check.bench import Bench
from loramux_server.kernels.gpu.check.trial import ROWS, STEPS, KernelTrial, Near, Results
from loramux_server.kernels.gpu.dense import dense_product_reference
from loramux_server.kernels.gpu.lora import LoraTarget, add_lora_reference, lora_scratch
from loramux_server.kernels.gpu.lora_tables import BLOCK_ROWS
from loramux_server.kernels.gpu.nf4 import Nf4Weights, nf4_product_reference
from loramux_server.kernels.gpu.split_sums import scratch_numbers
from loramux_server.kernels.gpu.step.operations import Operation
from loramux_server.kernels.gpu.step.stacks import Stack
from loramux_server.kernels.gpu.step.workspace import WEIGHTS_AT_ONCE

_SUMS = 2.0**-11
_SCALES = (0.5, -0.7)  # factors of adapters, and of the second one in a row

Adapters = tuple[ScaledSlot, ...]


def nf4_product(bench: Bench) -> Iterator[KernelTrial]:
    return _products(bench, "nf4_product", in_nf4=True)


def dense_product(bench: Bench) -> Iterator[KernelTrial]:
    return _products(bench, "dense_product", in_nf4=False)


def _products(bench: Bench, operation: str, *, in_nf4: bool) -> Iterator[KernelTrial]:
    """One of each shape, as kernels and their tiles follow from it."""
    seen = set()
    for name, stack, dtype in bench.decoder.products:
        shape = stack.inputs, stack.outputs, dtype, stack.bias is None
        if isinstance(stack.weights, Nf4Weights) is in_nf4 and shape not in seen:
            seen.add(shape)
            yield _product(bench, operation, name, stack, dtype)


def _product(bench: Bench, name: str, layers: str, stack: Stack, dtype: torch.dtype) -> KernelTrial:
    x = bench.normal(ROWS, stack.inputs)
    scratch = bench.scratch(scratch_numbers(ROWS, stack.inputs, stack.outputs))
    rounding = 2.0**-22 if dtype == torch.float32 else bench.rounding
    expected = _expected(bench, x, stack)
    options: dict[str, Any] = {"row_tiles": bench.decoder.row_tiles}
    if stack.bias is not None:
        # as large as the products, so that it is missed where it is missing
        size = float(expected.square().mean().sqrt())
        options["bias"] = bias = bench.normal(stack.outputs, size=size, dtype=stack.bias.dtype)
        expected += bias.float()

    def run(operation: Operation, first: int, count: int) -> Results:
        y = bench.untouched(count, stack.outputs, dtype=dtype)
        operation(bench.launch, y, x[first : first + count], stack.weights, scratch, **options)
        return [y]

    what = f"{layers}, {stack.inputs} to {stack.outputs}"
    return KernelTrial(name, what, run, lambda: [expected], [Near(rounding, _SUMS)], steps=STEPS)


def _expected(bench: Bench, x: torch.Tensor, stack: Stack) -> torch.Tensor:
    """[ROWS, out] fp32 without the bias"""
    y = bench.untouched(ROWS, stack.outputs, dtype=torch.float32)
    count = max(1, WEIGHTS_AT_ONCE // stack.inputs)
    for begin in range(0, stack.outputs, count):
        end = min(begin + count, stack.outputs)
        if isinstance(stack.weights, Nf4Weights):
            nf4_product_reference(y[:, begin:end], x, stack.weights.part(begin, end))
        else:
            dense_product_reference(y[:, begin:end], x, stack.weights[begin:end])
    return y


def add_lora(bench: Bench) -> Iterator[KernelTrial]:
    """One of each stack of layers, in tables as they are for all rows and for those with logits."""
    tables = bench.decoder.tables
    both = {tables.lora.is_split, tables.head_lora.is_split}
    seen = set()
    for name, stack, dtype in bench.decoder.products:
        outs = tuple((target.column, target.arena.bt.shape[1]) for target in stack.targets)
        for is_split in sorted(both):
            kind = stack.inputs, outs, dtype, is_split
            if outs and kind not in seen:
                seen.add(kind)
                adapters = _Adapters(bench, stack.targets[0].arena)
                if adapters.of_rows:
                    yield _add_lora(bench, name, stack, dtype, adapters, is_split)


class _Adapters:
    """Adapters of the smallest rank, of 16 and of the largest, and which of them each row uses.

    Attributes:
        of_rows: [ROWS]; empty where a step has no room for any.
        rows: of the arena that holds them.
        untargeted: the slot of one that has no weights for the layer.
        affine: slots whose adapters have gain and shift, the first one nothing else; none where the layer's arena has
            no room for them.
    """

    def __init__(self, bench: Bench, arena: Arena) -> None:
        sizes = bench.decoder.sizes
        room = min(sizes.ranks, len(arena.a))
        largest = 1 << (room.bit_length() - 1) if room >= SMALLEST_RANK else 0
        ranks = sorted({rank for rank in (SMALLEST_RANK, 16, largest) if SMALLEST_RANK <= rank <= room})
        slots, self.rows = [], 0
        # the largest last, so that few groups of rows lie in front of the last one with gain and shift
        for rank in [SMALLEST_RANK, SMALLEST_RANK, *ranks]:
            slots.append(Slot(self.rows, rank))
            self.rows += rank
        self.untargeted, alone, *used = slots
        used.reverse()
        self.affine = [alone, used[-1]] if used and arena.affine is not None else []
        one, other = _SCALES
        kinds: list[Adapters] = [(ScaledSlot(slot),) for slot in reversed(used)]
        kinds += [(ScaledSlot(slot, one), ScaledSlot(used[-1], other)) for slot in used[:-1]]
        kinds += [(ScaledSlot(alone, other),)] if self.affine else []
        kinds = [kind for kind in kinds if _fits(kind, sizes.entries, sizes.ranks)]
        kinds += [(ScaledSlot(used[0], one),), (), (ScaledSlot(self.untargeted),)] if kinds else []
        self.of_rows: list[Adapters] = []
        if kinds:
            # some rows of each, and more of one than a block of rows
            mixed = [kinds[row % len(kinds)] for row in range(ROWS // 2)]
            self.of_rows = mixed + [(ScaledSlot(used[0]),)] * (ROWS - len(mixed))

    def tables(self, first: int, count: int) -> LoraRows | None:
        return LoraRows.build([(adapters, 1) for adapters in self.of_rows[first : first + count]])


def _fits(adapters: Adapters, entries: int, ranks: int) -> bool:
    held = sum(-(-entry.slot.rank // BLOCK_ROWS) * BLOCK_ROWS for entry in adapters)
    return len(adapters) <= entries and held <= ranks


def _add_lora(
    bench: Bench, layers: str, stack: Stack, dtype: torch.dtype, adapters: _Adapters, is_split: bool
) -> KernelTrial:
    targets = [LoraTarget(_filled(bench, target.arena, adapters), target.column) for target in stack.targets]
    x, before = bench.normal(ROWS, stack.inputs), bench.normal(ROWS, stack.outputs, dtype=dtype)
    whole = bench.lora_tables(adapters.tables(0, ROWS), is_split=is_split)
    scratch = bench.scratch(lora_scratch(whole, stack.inputs, len(targets)))
    rounding = 2.0**-22 if dtype == torch.float32 else bench.rounding

    def run(operation: Operation, first: int, count: int) -> Results:
        some = slice(first, first + count)
        y = before[some].clone()
        tables = bench.lora_tables(adapters.tables(first, count), is_split=is_split)
        operation(bench.launch, y, x[some], targets, tables, scratch)
        return [y]

    def expected() -> Results:
        y = before.float().clone()
        add_lora_reference(y, x, targets, whole)
        return [y]

    ranks = "ranks up to " + str(max(entry.slot.rank for row in adapters.of_rows for entry in row))
    what = f"{layers}, {stack.inputs} to {stack.outputs}, {ranks}"
    return KernelTrial("add_lora", what, run, expected, [Near(rounding, _SUMS)])


def _filled(bench: Bench, like: Arena, adapters: _Adapters) -> Arena:
    """An arena of such a layer, with deltas, gains and shifts about as large as what they are added to."""
    a = bench.normal(adapters.rows, like.a.shape[1], size=like.a.shape[1] ** -0.5, dtype=like.a.dtype)
    bt = bench.normal(adapters.rows, like.bt.shape[1], size=0.3, dtype=like.bt.dtype)
    targeted = torch.full((adapters.rows // SMALLEST_RANK,), HAS_DELTA, dtype=torch.uint8)
    targeted[adapters.untargeted.offset // SMALLEST_RANK] = 0
    if not adapters.affine:
        return Arena(a, bt, bench.device.put(targeted))
    alone, beside = (slot.offset // SMALLEST_RANK for slot in adapters.affine)
    targeted[alone], targeted[beside] = HAS_AFFINE, HAS_DELTA | HAS_AFFINE
    affine = bench.normal((beside + 1) * 2, like.bt.shape[1], size=0.3, dtype=torch.float32)
    return Arena(a, bt, bench.device.put(targeted), affine.view(beside + 1, 2, -1))
