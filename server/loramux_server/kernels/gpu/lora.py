"""LoRA deltas of a batch in which every row may use other adapters: two launches for a stack of projections.

Semantics, for each row t and each target, over its entries e (adapters, in their order), with o = offset[e],
r = rank[e] and what targeted[o / 8] says that the adapter has for the layer (HAS_DELTA, HAS_AFFINE):

    y[t, column : column + out] += sum_e scale[e] * (gain[o / 8] * y[t] + shift[o / 8])                HAS_AFFINE
                                   + sum_e (scale[e] * (x[t] @ a[o : o + r].T)) @ bt[o : o + r]        HAS_DELTA

where y on the right is what the layer itself gives, bias included. x is of the activations' dtype (bf16, or fp16) and
`a` is rounded to it; everything else is fp32, and y is rounded once, to its own dtype. This is `add_lora_loop` of
loramux_adapters/lora/ops.py for up to three layers that read the same x.

How. Both kernels are started as a fixed number of programs, which share out the work that the step's tables list
(lora_tables.py): rows without adapters, and layers that an adapter does not change, cost nothing, and one captured
launch serves any mix of ranks and adapters.

    shrink   a turn: a tile of 16 ranks for a block of rows, one target, one part of the inputs -> h, fp32 scratch
    expand   a turn: some columns of y for a block; entry after entry, the parts of h in their order; no atomics

Gains and shifts are read by the second launch, and only of entries that have them; where the arenas have no room for
any (`Arena.affine` is None) it is compiled without a word of them.

What limits. Each adapter is read once a step, 2 * rank * (in + out) bytes a target; all else is small beside it or
comes from the cache. Turns of the first launch are the same work for any rank, 16 KB of A for each 512 inputs, so
they share out evenly: an adapter of rank 16 has 24 of them for q, k and v of an 8B model, 64 such adapters have
1,536. With few adapters it is the latency of a chain of loads (counts, table, targeted, weights).

Equal bits. A row is one row of every product that it takes part in. Tiles, parts and the order of sums depend on the
layer's shape and the row's own adapters. Room for gains and shifts changes no bit of rows whose adapters have none.

The idea of applying many adapters to one batch by segments is Punica's (https://arxiv.org/abs/2310.18547) and
S-LoRA's (https://arxiv.org/abs/2311.03285).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from loramux_adapters.lora.ops import HAS_AFFINE, HAS_DELTA, Arena
from loramux_adapters.lora.slots import SMALLEST_RANK, Slot
from loramux_server.kernels.gpu.cuts import lora_parts_of
from loramux_server.kernels.gpu.launch import Launch
from loramux_server.kernels.gpu.lora_tables import BLOCK, BLOCK_ROWS, ENTRY, TILE, LoraTables

MOST_TARGETS = 3  # q, k and v
STEP = {torch.bfloat16: 128, torch.float16: 32}  # inputs of one turn of a program's loop; fp16: without tensor cores
WIDTH = 256  # columns of y in one turn of the second launch
SHRINK_OPTIONS = {"num_warps": 2, "num_stages": 4}
EXPAND_OPTIONS = {"num_warps": 4, "num_stages": 2}

_ROWS = tl.constexpr(BLOCK_ROWS)
_SMALLEST = tl.constexpr(SMALLEST_RANK)
_BLOCK, _ENTRY, _TILE = tl.constexpr(BLOCK), tl.constexpr(ENTRY), tl.constexpr(TILE)
_HAS_DELTA, _HAS_AFFINE = tl.constexpr(HAS_DELTA), tl.constexpr(HAS_AFFINE)


@dataclass(frozen=True, slots=True, eq=False)
class LoraTarget:
    """A layer of a stack: its deltas go into columns [column, column + out) of y."""

    arena: Arena
    column: int = 0


def lora_scratch(tables: LoraTables, inputs: int, targets: int) -> int:
    """How many numbers of fp32 `add_lora` needs as scratch for a stack; several stacks may use the largest one's."""
    return tables.sizes.scratch(inputs, targets, is_split=tables.is_split)


def add_lora(
    launch: Launch,
    y: torch.Tensor,
    x: torch.Tensor,
    targets: Sequence[LoraTarget],
    tables: LoraTables,
    scratch: torch.Tensor,
) -> None:
    """Adds the deltas of up to three layers that read the same x. Two launches.

    Args:
        y: [rows, columns] fp32 or the activations' dtype, changed in place; rows may lie apart.
        x: [rows, in] bf16 or fp16; rows may lie apart.
        targets: their columns of y do not overlap.
        tables: filled for these rows; rows behind the step's own are left alone.
        scratch: at least `lora_scratch` numbers of fp32; holds nothing between calls.
    """
    check_stack(y, x, targets, tables)
    inputs, stack = x.shape[1], len(targets)
    length, parts = lora_parts_of(inputs)
    stored = parts if tables.is_split else 1
    if scratch.dtype != torch.float32 or scratch.numel() < lora_scratch(tables, inputs, stack):
        raise ValueError(f"scratch is {scratch.numel()} of {scratch.dtype}; lora_scratch says what is needed")
    sizes = tables.sizes
    arenas = [target.arena for target in targets] + [targets[0].arena] * (MOST_TARGETS - stack)
    outs = [target.arena.bt.shape[1] for target in targets] + [0] * (MOST_TARGETS - stack)
    columns = [target.column for target in targets] + [0] * (MOST_TARGETS - stack)
    launch(
        shrink_kernel,
        (min(tables.programs, sizes.tiles * stack * stored),),
        *(scratch, x, x.stride(0), *(arena.a for arena in arenas), *(arena.targeted for arena in arenas)),
        *(tables.counts, tables.blocks, tables.tiles, sizes.units),
        INPUTS=inputs,
        TARGETS=stack,
        PARTS=parts,
        LENGTH=length,
        STORED=stored,
        STEP=STEP[x.dtype],
        **SHRINK_OPTIONS,
    )
    # Where there is no room for gain and shift the kernel reads none, and is given any memory.
    affine = [arena.targeted if arena.affine is None else arena.affine for arena in arenas]
    launch(
        expand_kernel,
        (min(tables.programs, sizes.blocks * sum(-(-out // WIDTH) for out in outs)),),
        *(y, y.stride(0), scratch, *(arena.bt for arena in arenas), *(arena.targeted for arena in arenas), *affine),
        *(tables.counts, tables.blocks, tables.entries, sizes.units),
        **{f"OUT{i}": out for i, out in enumerate(outs)},
        **{f"COLUMN{i}": column for i, column in enumerate(columns)},
        TARGETS=stack,
        STORED=stored,
        WIDTH=WIDTH,
        HALVES=x.dtype == torch.bfloat16,
        AFFINE=targets[0].arena.affine is not None,
        **EXPAND_OPTIONS,
    )


def check_stack(y: torch.Tensor, x: torch.Tensor, targets: Sequence[LoraTarget], tables: LoraTables) -> None:
    """Raises ValueError where the kernels would read or write what is not theirs."""
    if not 1 <= len(targets) <= MOST_TARGETS:
        raise ValueError(f"a stack has one to {MOST_TARGETS} layers, not {len(targets)}")
    if x.shape[0] != y.shape[0] or not tables.rows <= x.shape[0]:
        raise ValueError(f"the layer runs on {x.shape[0]} rows, the step has {tables.rows}")
    if x.dtype not in (torch.bfloat16, torch.float16) or y.dtype not in (torch.float32, x.dtype):
        raise ValueError(f"x is bf16 or fp16 and y fp32 or the same, not {x.dtype} and {y.dtype}")
    if x.stride(1) != 1 or y.stride(1) != 1:
        raise ValueError("the numbers of a row have to lie close together")
    for target in targets:
        arena, end = target.arena, target.column + target.arena.bt.shape[1]
        if arena.a.shape[1] != x.shape[1] or end > y.shape[1]:
            raise ValueError(
                f"a layer of {arena.a.shape[1]} inputs into columns [{target.column}, {end}) does not fit "
                f"x [{x.shape[1]}] and y [{y.shape[1]}]"
            )
        if not (arena.a.is_contiguous() and arena.bt.is_contiguous()):
            raise ValueError("an arena's rows have to lie close together")
        if (arena.affine is None) is not (targets[0].arena.affine is None):
            raise ValueError("all arenas of a stack have room for gain and shift, or none has")
        if arena.affine is not None and not (
            arena.affine.is_contiguous()
            and arena.affine.dtype == torch.float32
            and arena.affine.shape[1:] == (2, arena.bt.shape[1])
        ):
            raise ValueError(f"gain and shift are [groups, 2, {arena.bt.shape[1]}] fp32, close together")


def add_lora_reference(y: torch.Tensor, x: torch.Tensor, targets: Sequence[LoraTarget], tables: LoraTables) -> None:
    """The slow reference: what the table on the device says, block by block, in fp32."""
    check_stack(y, x, targets, tables)
    number, blocks, entries = int(tables.counts[1]), tables.blocks.tolist(), tables.entries.cpu()
    scales = entries.view(torch.float32)
    for block in (blocks[i * BLOCK : i * BLOCK + BLOCK] for i in range(number)):
        rows = block[: block[BLOCK_ROWS]]
        for target in targets:
            arena, span = target.arena, slice(target.column, target.column + target.arena.bt.shape[1])
            total = y[rows, span].float()
            of_block = range(block[BLOCK_ROWS + 1] * ENTRY, block[BLOCK_ROWS + 2] * ENTRY, ENTRY)
            for at in of_block:
                offset, rank = entries[at : at + 2].tolist()
                if arena.has(Slot(offset, rank)) & HAS_AFFINE:
                    total += scales[at + 2].item() * arena.changed(y[rows, span], Slot(offset, rank))
            for at in of_block:
                offset, rank = entries[at : at + 2].tolist()
                if arena.has(Slot(offset, rank)) & HAS_DELTA:
                    a, bt = (weights[offset : offset + rank] for weights in (arena.a, arena.bt))
                    h = x[rows].float() @ a.to(x.dtype).float().T
                    total += (scales[at + 2].item() * h) @ bt.float()
            y[rows, span] = total.to(y.dtype)


@triton.jit
def _of_target(target, first, second, third, TARGETS: tl.constexpr):
    chosen = first
    if TARGETS > 1:
        if target == 1:
            chosen = second
    if TARGETS > 2:
        if target == 2:
            chosen = third
    return chosen


@triton.jit
def shrink_kernel(
    h,  # [TARGETS, units, STORED, 16] fp32
    x,  # [rows, INPUTS], rows x_row apart
    x_row,
    a0,  # [arena rows, INPUTS]
    a1,
    a2,
    targeted0,  # [arena rows / 8] uint8
    targeted1,
    targeted2,
    counts,
    blocks,
    tiles,
    units,
    INPUTS: tl.constexpr,
    TARGETS: tl.constexpr,
    PARTS: tl.constexpr,
    LENGTH: tl.constexpr,
    STORED: tl.constexpr,
    STEP: tl.constexpr,
):
    """h[target, unit of (tile, row), part] = x[row, part] @ a[tile, part].T"""
    TOGETHER: tl.constexpr = PARTS // STORED  # parts that one program adds up
    lane, step = tl.arange(0, _ROWS), tl.arange(0, STEP)
    turns = tl.load(counts) * (TARGETS * STORED)
    for turn in range(tl.program_id(0), turns, tl.num_programs(0)):
        # Parts fastest: programs beside each other read on in the same rows of A.
        part, target = turn % STORED, turn // STORED % TARGETS
        tile = tiles + turn // (STORED * TARGETS) * _TILE
        block = blocks + tl.load(tile + 2) * _BLOCK
        targeted = _of_target(target, targeted0, targeted1, targeted2, TARGETS)
        if (tl.load(targeted + tl.load(tile + 4)) & _HAS_DELTA) != 0:
            a = _of_target(target, a0, a1, a2, TARGETS)
            rows = tl.load(block + lane)
            has_row, has_rank = rows >= 0, lane < tl.load(tile + 1)
            x_at = x + rows.to(tl.int64)[:, None] * x_row + step[None, :]
            a_at = a + (tl.load(tile).to(tl.int64) + lane)[:, None] * INPUTS + step[None, :]
            total = tl.zeros((_ROWS, _ROWS), tl.float32)
            for own in range(TOGETHER):
                start = (part * TOGETHER + own) * LENGTH
                sums = tl.zeros((_ROWS, _ROWS), tl.float32)
                for i in range(start, tl.minimum(start + LENGTH, INPUTS), STEP):
                    inside = (i + step < INPUTS)[None, :]
                    xs = tl.load(x_at + i, mask=has_row[:, None] & inside, other=0.0)
                    # Ranks behind a tile of 8 are another adapter's: whatever lies there, it is not read.
                    ws = tl.load(a_at + i, mask=has_rank[:, None] & inside, other=0.0)
                    sums = tl.dot(xs, tl.trans(ws.to(xs.dtype)), sums)
                total += sums
            unit = (target * units + tl.load(tile + 3) + lane).to(tl.int64)
            h_at = h + (unit * STORED + part)[:, None] * _ROWS + lane[None, :]
            tl.store(h_at, total, mask=has_row[:, None])


@triton.jit
def expand_kernel(
    y,  # [rows, columns] rows y_row apart
    y_row,
    h,  # [TARGETS, units, STORED, 16] fp32
    bt0,  # [arena rows, OUT0]
    bt1,
    bt2,
    targeted0,  # [arena rows / 8] uint8
    targeted1,
    targeted2,
    affine0,  # [arena rows / 8, 2, OUT0] fp32; not read without AFFINE
    affine1,
    affine2,
    counts,
    blocks,
    entries,
    units,
    OUT0: tl.constexpr,
    OUT1: tl.constexpr,
    OUT2: tl.constexpr,
    COLUMN0: tl.constexpr,
    COLUMN1: tl.constexpr,
    COLUMN2: tl.constexpr,
    TARGETS: tl.constexpr,
    STORED: tl.constexpr,
    WIDTH: tl.constexpr,
    HALVES: tl.constexpr,
    AFFINE: tl.constexpr,
):
    """y[row, columns] += sum over entries of scale * (gain * y + shift)
                       + sum over entries of (scale * sum of the parts of h) @ bt

    AFFINE: the arenas have room for gain and shift, and adapters may have some.
    HALVES: h goes into the product as the sum of two numbers of 16 bits, which keep 16 bits of it (bf16). Else the
    product is in fp32, without the tensor cores: h may be larger than fp16 can say.
    """
    lane, wide = tl.arange(0, _ROWS), tl.arange(0, WIDTH)
    until1: tl.constexpr = (OUT0 + WIDTH - 1) // WIDTH
    until2: tl.constexpr = until1 + (OUT1 + WIDTH - 1) // WIDTH
    pieces: tl.constexpr = until2 + (OUT2 + WIDTH - 1) // WIDTH
    turns = tl.load(counts + 1) * pieces
    for turn in range(tl.program_id(0), turns, tl.num_programs(0)):
        # Columns fastest: programs beside each other read on in the same rows of B.
        piece, block = turn % pieces, blocks + turn // pieces * _BLOCK
        target = tl.where(piece >= until2, 2, tl.where(piece >= until1, 1, 0))
        out = _of_target(target, OUT0, OUT1, OUT2, TARGETS)
        to = _of_target(target, COLUMN0, COLUMN1, COLUMN2, TARGETS)
        n = (piece - _of_target(target, 0, until1, until2, TARGETS)) * WIDTH + wide
        bt = _of_target(target, bt0, bt1, bt2, TARGETS)
        targeted = _of_target(target, targeted0, targeted1, targeted2, TARGETS)
        affine = _of_target(target, affine0, affine1, affine2, TARGETS)
        rows, count = tl.load(block + lane), tl.load(block + _ROWS)
        has_row, has_column = (rows >= 0)[:, None], (n < out)[None, :]
        first, last = tl.load(block + _ROWS + 1), tl.load(block + _ROWS + 2)
        sums = tl.zeros((_ROWS, WIDTH), tl.float32)
        there = 0
        for e in range(first, last):
            entry = entries + e * _ENTRY
            offset, rank = tl.load(entry), tl.load(entry + 1)
            has = tl.load(targeted + offset // _SMALLEST).to(tl.int32)
            there |= has
            if (has & _HAS_DELTA) != 0:
                scale = tl.load(entry + 2).to(tl.float32, bitcast=True)
                unit = (target * units + tl.load(entry + 3) + lane).to(tl.int64)
                h_at = h + unit[:, None] * (STORED * _ROWS) + lane[None, :]
                b_at = bt + (offset.to(tl.int64) + lane)[:, None] * out + n[None, :]
                for r in range(0, rank, _ROWS):
                    has_rank = r + lane < rank
                    ws = tl.load(b_at + r * out, mask=has_rank[:, None] & has_column, other=0.0)
                    part = h_at + r * count * STORED
                    hs = tl.zeros((_ROWS, _ROWS), tl.float32)
                    for z in tl.static_range(STORED):
                        hs += tl.load(part + z * _ROWS, mask=has_row, other=0.0)
                    hs *= scale
                    if HALVES:
                        high = hs.to(ws.dtype)
                        low = (hs - high.to(tl.float32)).to(ws.dtype)
                        sums = tl.dot(high, ws, sums)
                        sums = tl.dot(low, ws, sums)
                    else:
                        sums = tl.dot(hs, ws.to(tl.float32), sums, input_precision="ieee")
        if there != 0:
            keep = has_row & has_column
            y_at = y + rows.to(tl.int64)[:, None] * y_row + (to + n)[None, :]
            before = tl.load(y_at, mask=keep, other=0.0).to(tl.float32)
            total = before
            if AFFINE:
                # Behind the products, whose registers are free by now; what they came to is added last all the same.
                for e in range(first, last):
                    entry = entries + e * _ENTRY
                    group = tl.load(entry) // _SMALLEST
                    if (tl.load(targeted + group) & _HAS_AFFINE) != 0:
                        scale = tl.load(entry + 2).to(tl.float32, bitcast=True)
                        gain_at = affine + group.to(tl.int64) * (2 * out) + n
                        gain = tl.load(gain_at, mask=n < out, other=0.0)[None, :]
                        shift = tl.load(gain_at + out, mask=n < out, other=0.0)[None, :]
                        total += scale * (gain * before + shift)
            tl.store(y_at, (total + sums).to(y.dtype.element_ty), mask=keep)
