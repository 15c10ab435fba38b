"""Attention of a packed batch over the paged cache: decode rows and chunks of prompts alike.

Semantics, for token row t of a sequence at position p, head h, kv head g = h / (heads / kv heads), with keys and values
K[j], V[j] of the sequence's positions j in its blocks, and lo = max(0, p - window + 1) where there is a window,
p - p % chunk where there are chunks, else 0:

    score[j] = softcap(scaling * q[t, h] . K[j, g]),  softcap(z) = cap * tanh(z / cap) where there is one,  lo <= j <= p
    out[t, h] = sum_j act(exp(score[j] - top)) * V[j, g] / (sink + sum_j act(exp(score[j] - top)))

with sink = exp(sinks[h] - top) where heads have sinks, else 0. act() rounds to the dtype of q and of the cache; all
else is fp32. Keys are taken in turns of 16 to 64, and turns make up splits of some hundred: each split has its own top,
sum and weighted values, as if there were no other, and these are merged in the order of positions. Turns and splits lie
at multiples of their lengths, and what a row does not see adds exactly nothing, so a row's bits depend neither on how
its prompt was cut into chunks nor on the rows beside it. One program merges the splits of a tile of rows itself, or a
second kernel merges what one program for each split left: by the same operations in the same order, a head's sink as
the last. Sums of weights are products with ones, so that they too have the tensor core's order whichever threads hold
the weights.

No key or value outside of [lo, p] of a tile's rows is read, whatever lies there. A value of a row that a program reads
for other rows' sake counts zero times, so it must be finite; `rotate_and_write` sees to that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from loramux_server.kernels.attention.kv_cache import BLOCK_SIZE
from loramux_server.kernels.attention.paged_attention import AttentionParams
from loramux_server.kernels.gpu.attention_tables import AttentionSizes, AttentionTables
from loramux_server.kernels.gpu.launch import Launch

_LOG2_E = 1.4426950408889634
_LOG2 = tl.constexpr(_LOG2_E)
_NO_WINDOW = 1 << 30
_AT_ONCE = 16  # splits whose parts the second kernel asks memory for at once


@dataclass(frozen=True, slots=True)
class AttentionScratch:
    """Partial results of tiles that several programs share.

    Attributes:
        values: [parts, heads, head_dim] fp32, sums of weighted values.
        states: [parts, heads, 2] fp32, the largest score (in base 2) and the sum of weights.
    """

    values: torch.Tensor
    states: torch.Tensor


def attention_scratch(sizes: AttentionSizes, heads: int, head_dim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of `AttentionScratch.values` and `.states`; one pair serves all layers."""
    values, states = sizes.scratch(heads)
    assert values[-1] == head_dim, "tables of other heads"
    return values, states


def attend(
    launch: Launch,
    out: torch.Tensor,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    tables: AttentionTables,
    params: AttentionParams,
    scratch: AttentionScratch,
    *,
    large_tiles: bool = True,
) -> None:
    """Fills `out` [rows, heads * head_dim] act for the rows that `tables` hold; further rows stay as they are.

    Args:
        q: [rows, heads * head_dim] act, rotated.
        k_cache, v_cache: [blocks, BLOCK_SIZE, kv_heads, head_dim] act, this step's rows included.
        large_tiles: as the tables were filled. Without it the kernel of large tiles, which a step of decode rows has
            no work for, is not started.
    """
    sizes, (kv_heads, dim) = tables.sizes, k_cache.shape[2:]
    heads = q.shape[1] // dim
    if (heads, dim) != (sizes.group * kv_heads, sizes.head_dim):
        raise ValueError(
            f"{heads} heads of {dim} numbers on {kv_heads} do not fit attention tables for groups of {sizes.group} "
            f"heads of {sizes.head_dim}"
        )
    scale, cap, window = _numbers(params)
    sinks = scratch.states if params.sinks is None else params.sinks
    if params.sinks is not None and (sinks.shape != (heads,) or not sinks.is_contiguous()):
        raise ValueError(f"{heads} heads have one sink each, and not {tuple(sinks.shape)}")
    large = [(tables.large_items, True)] if large_tiles and sizes.tensor_cores else []
    for items, is_large in (*large, (tables.small_items, False)):
        launch(
            attend_kernel,
            (tables.programs,),
            *(out, scratch.values, scratch.states, q, k_cache, v_cache),
            *(tables.positions, tables.starts, tables.blocks, items, tables.counts),
            *(sinks, scale, cap, window),
            **attend_constants(sizes, kv_heads, params, large=is_large),
        )
    launch(
        combine_kernel,
        (tables.programs,),
        *(out, scratch.values, scratch.states, tables.combined, tables.counts, sinks, window),
        **combine_constants(sizes, heads, params),
    )


def _numbers(params: AttentionParams) -> tuple[float, float, int]:
    """What turns a product into a score in base 2, the cap in base 2, and the window or the chunk, or a window beyond
    all positions."""
    window = params.window or params.chunk or _NO_WINDOW
    if params.softcap:
        return 2 * _LOG2_E * params.scaling / params.softcap, _LOG2_E * params.softcap, window
    return _LOG2_E * params.scaling, 0.0, window


def attend_constants(sizes: AttentionSizes, kv_heads: int, params: AttentionParams, *, large: bool) -> dict[str, Any]:
    """Constants and options of `attend_kernel`. Tiles of both sizes take turns of the same length, for equal bits."""
    wide = triton.next_power_of_2(sizes.head_dim)
    turn = 64 if wide <= 64 else 32  # two to come take 32 KiB of shared memory for heads of 64 and of 128
    return {
        "LARGE": large,
        "KV_HEADS": kv_heads,
        "GROUP": sizes.group,
        "DIM": sizes.head_dim,
        "WIDE": wide,
        "TILE": sizes.large_tile if large else sizes.small_tile,
        "TURN": turn if sizes.tensor_cores else 16,
        "KEYS": sizes.split,
        "PAGE": BLOCK_SIZE,
        "SINKS": params.sinks is not None,
        "SOFTCAP": params.softcap != 0,
        "WINDOW": params.window + params.chunk > 0,
        "CHUNKS": params.chunk > 0,
        "num_warps": 8 if large or (wide > 128 and not sizes.tensor_cores) else 4,
        "num_stages": 3 if sizes.tensor_cores else 1,
    }


def combine_constants(sizes: AttentionSizes, heads: int, params: AttentionParams) -> dict[str, Any]:
    """Constants and options of `combine_kernel`."""
    wide = triton.next_power_of_2(sizes.head_dim)
    return {
        "HEADS": heads,
        "DIM": sizes.head_dim,
        "WIDE": wide,
        "KEYS": sizes.split,
        "CHUNKS": params.chunk > 0,
        "SINKS": params.sinks is not None,
        "AT_ONCE": min(_AT_ONCE, triton.cdiv(sizes.blocks * BLOCK_SIZE, sizes.split)),
        "num_warps": max(wide // 32, 1),  # a number for each thread, so that none waits for another
    }


@triton.jit
def factors(top, more_top):
    """The larger of two largest scores, and what sums and values that were weighted by each are to be multiplied by.

    Both kernels merge by them in the same way, with fma's that are named so that no compiler rounds otherwise. A state
    of nothing, (-inf, 0, 0), adds exactly nothing.
    """
    new = tl.maximum(top, more_top)
    base = tl.where(new == float("-inf"), 0.0, new)
    return new, tl.exp2(top - base), tl.exp2(more_top - base)


@triton.jit
def merged(x, kept, more, added):
    return tl.fma(more, added, x * kept)


@triton.jit
def first_seen(position, window, CHUNKS: tl.constexpr):
    """Of positions that a row at this one sees. window: of the layer, or where it has CHUNKS their length."""
    return position - position % window if CHUNKS else tl.maximum(position - window + 1, 0)


@triton.jit
def with_sink(top, total, sink):
    """A row's largest score and sum of weights with its sink beside its keys: what the sum becomes, and what weighted
    values are to be multiplied by. sink: of a float dtype, as it lies among a model's weights."""
    _, kept, added = factors(top, sink.to(tl.float32) * _LOG2)
    return tl.fma(total, kept, added), kept


@triton.jit
def attend_kernel(
    out,
    part_values,
    part_states,
    q,
    k_cache,
    v_cache,
    positions,
    starts,
    blocks,
    items,
    counts,
    sinks,
    scale,
    cap,
    window,
    LARGE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    WIDE: tl.constexpr,
    TILE: tl.constexpr,
    TURN: tl.constexpr,
    KEYS: tl.constexpr,
    PAGE: tl.constexpr,
    SINKS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Pieces of work for all kv heads: TILE query heads, those of a kv head of one row after the other, over the keys
    of one split, which leaves a part, or of all."""
    HEADS: tl.constexpr = KV_HEADS * GROUP
    act: tl.constexpr = q.dtype.element_ty
    m, n, d = tl.arange(0, TILE), tl.arange(0, TURN), tl.arange(0, WIDE)
    ones = tl.full((TURN, 16), 1.0, act)
    work_end = tl.load(counts + LARGE) * KV_HEADS
    for work in range(tl.program_id(0), work_end, tl.num_programs(0)):
        item, kv_head = items + work // KV_HEADS * 4, work % KV_HEADS
        first, rows = tl.load(item), tl.load(item + 1)
        split, first_part = tl.load(item + 2), tl.load(item + 3)
        position, table = tl.load(positions + first), blocks + tl.load(starts + first)
        row, head = m // GROUP, kv_head * GROUP + m % GROUP
        place = (first + row).to(tl.int64) * HEADS + head
        ours = (row < rows)[:, None] & (d < DIM)[None, :]
        queries = tl.load(q + place[:, None] * DIM + d[None, :], mask=ours, other=0)
        mine = position + row
        end = position + rows
        seen_from, mine_from = first_seen(position, window, CHUNKS), first_seen(mine, window, CHUNKS)
        begin = seen_from // TURN * TURN
        if split >= 0:
            begin, end = tl.maximum(begin, split * KEYS), tl.minimum(end, (split + 1) * KEYS)
        top, total = tl.full((TILE,), float("-inf"), tl.float32), tl.zeros((TILE, 16), tl.float32)
        acc = tl.zeros((TILE, WIDE), tl.float32)
        all_top, all_total, all_acc = top, total, acc
        # of the turn that comes: a load that others of the same turn wait for would cost their prefetch
        pages = tl.load(table + (begin + n) // PAGE, mask=begin + n < end, other=0)
        for turn in range(begin, end, TURN):
            key = turn + n
            there = key < end
            if WINDOW:
                there &= key >= seen_from
            at = ((pages.to(tl.int64) * PAGE + key % PAGE) * KV_HEADS + kv_head) * DIM
            pages = tl.load(table + (key + TURN) // PAGE, mask=key + TURN < end, other=0)
            at = at[:, None] + d[None, :]
            read = there[:, None] & (d < DIM)[None, :]
            keys = tl.load(k_cache + at, mask=read, other=0)
            values = tl.load(v_cache + at, mask=read, other=0)
            score = tl.dot(queries, tl.trans(keys)) * scale
            if SOFTCAP:  # cap * tanh(z), of which scale made 2 z log2(e); +-1 where the power is infinite or zero
                score = cap * (1.0 - 2.0 / (tl.exp2(score) + 1.0))
            seen = key[None, :] <= mine[:, None]
            if WINDOW:
                seen &= key[None, :] >= mine_from[:, None]
            score = tl.where(seen, score, float("-inf"))
            new = tl.maximum(top, tl.max(score, 1))
            base = tl.where(new == float("-inf"), 0.0, new)
            weight = tl.exp2(score - base[:, None]).to(act)
            rest = tl.exp2(top - base)[:, None]
            total = tl.dot(weight, ones, total * rest)
            acc = tl.dot(weight, values, acc * rest)
            top = new
            if (turn + TURN) % KEYS == 0:
                all_top, kept, added = factors(all_top, top)
                all_total = merged(all_total, kept[:, None], total, added[:, None])
                all_acc = merged(all_acc, kept[:, None], acc, added[:, None])
                top, total = tl.full((TILE,), float("-inf"), tl.float32), tl.zeros((TILE, 16), tl.float32)
                acc = tl.zeros((TILE, WIDE), tl.float32)
        if begin < end:
            all_top, kept, added = factors(all_top, top)
            all_total = merged(all_total, kept[:, None], total, added[:, None])
            all_acc = merged(all_acc, kept[:, None], acc, added[:, None])
            sums = tl.sum(all_total, 1) * 0.0625  # of 16 that are equal: exact
            if split >= 0:
                part = (first_part + split * rows + row).to(tl.int64) * HEADS + head
                tl.store(part_values + part[:, None] * DIM + d[None, :], all_acc, mask=ours)
                tl.store(part_states + part * 2, all_top, mask=row < rows)
                tl.store(part_states + part * 2 + 1, sums, mask=row < rows)
            else:
                if SINKS:
                    sums, kept = with_sink(all_top, sums, tl.load(sinks + head))
                    all_acc = all_acc * kept[:, None]
                tl.store(out + place[:, None] * DIM + d[None, :], (all_acc / sums[:, None]).to(act), mask=ours)


@triton.jit
def combine_kernel(
    out,
    part_values,
    part_states,
    combined,
    counts,
    sinks,
    window,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDE: tl.constexpr,
    KEYS: tl.constexpr,
    CHUNKS: tl.constexpr,
    SINKS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Heads of rows one by one, from their parts."""
    d = tl.arange(0, WIDE)
    work_end = tl.load(counts + 2) * HEADS
    for work in range(tl.program_id(0), work_end, tl.num_programs(0)):
        item, head = combined + work // HEADS * 4, work % HEADS
        row, first_part = tl.load(item), tl.load(item + 1)
        step, position = tl.load(item + 2), tl.load(item + 3)
        begin, end = first_seen(position, window, CHUNKS) // KEYS, position // KEYS + 1
        top, total = tl.full((WIDE,), float("-inf"), tl.float32), tl.zeros((WIDE,), tl.float32)
        acc = total
        for some in range(begin, end, AT_ONCE):
            for i in tl.static_range(AT_ONCE):
                there = (d < DIM) & (some + i < end)
                part = (first_part + (some + i) * step).to(tl.int64) * HEADS + head
                state = part_states + part * 2 + d * 0
                more_top = tl.load(state, mask=there, other=float("-inf"))
                more_total = tl.load(state + 1, mask=there, other=0)
                more_acc = tl.load(part_values + part * DIM + d, mask=there, other=0)
                top, kept, added = factors(top, more_top)
                total, acc = merged(total, kept, more_total, added), merged(acc, kept, more_acc, added)
        if SINKS:
            total, kept = with_sink(top, total, tl.load(sinks + head + d * 0))
            acc = acc * kept
        place = (row.to(tl.int64) * HEADS + head) * DIM + d
        tl.store(out + place, (acc / total).to(out.dtype.element_ty), mask=d < DIM)


def attend_reference(
    out: torch.Tensor,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    tables: AttentionTables,
    params: AttentionParams,
) -> None:
    """`attend` in PyTorch, a row at a time, in fp64 and without rounding in between."""
    kv_heads, dim = k_cache.shape[2:]
    for row in range(int(tables.counts[3])):
        position, start = int(tables.positions[row]), int(tables.starts[row])
        first = max(0, position - params.window + 1) if params.window else 0
        first = position - position % params.chunk if params.chunk else first
        blocks = tables.blocks[start : start + position // BLOCK_SIZE + 1].long()
        keys, values = (cache[blocks].flatten(0, 1)[first : position + 1].double() for cache in (k_cache, v_cache))
        scores = torch.einsum("kgd,jkd->kgj", q[row].double().view(kv_heads, -1, dim), keys) * params.scaling
        if params.softcap:
            scores = params.softcap * torch.tanh(scores / params.softcap)
        sinks = params.sinks
        if sinks is None:
            weights = scores.softmax(-1)
        else:
            weights = torch.cat([scores, sinks.double().view(kv_heads, -1, 1)], -1).softmax(-1)[..., :-1]
        out[row] = torch.einsum("kgj,jkd->kgd", weights, values).flatten().to(out.dtype)
