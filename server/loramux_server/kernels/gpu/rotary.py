"""Norms and rotation of queries and keys, and the way of keys and values into the cache.

Semantics, for token row t of a sequence at position p, x the numbers of a query or key head in qkv[t], all in fp32:

    x = x / sqrt(mean(x^2) + eps) * weight         where there is a norm; the mean is a head's, or that of all heads
    x[i], x[i + pairs] = x[i] * cos - x[i + pairs] * sin, x[i + pairs] * cos + x[i] * sin     for i < pairs,
                         cos = cos[p, i], sin = sin[p, i], where there is a rotation; the rest of x stays
    q_out[t] = act(queries),  k_cache[block, p % BLOCK_SIZE] = act(keys),  v_cache[...] = act(values)

where block is the one that the sequence's table has for p. If the key or the values of a head are not all finite after
rounding, all of its key becomes NaN and all of its values zero: whoever sees this token gets NaN, and who does not see
it, but whose program reads it for others, adds zero times a finite number (attention.py).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from loramux_server.kernels.attention.kv_cache import BLOCK_SIZE
from loramux_server.kernels.gpu.attention_tables import AttentionTables
from loramux_server.kernels.gpu.launch import Launch
from loramux_server.kernels.layers.recognition import RMSNorm

_TOGETHER = 512  # numbers of heads that a program takes


def rotate_and_write(
    launch: Launch,
    q_out: torch.Tensor,
    qkv: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    tables: AttentionTables,
    *,
    q_norm: RMSNorm | None = None,
    k_norm: RMSNorm | None = None,
) -> None:
    """Fills the rows of `q_out` that `tables` hold, and their places in the caches; further rows stay as they are.

    Args:
        q_out: [rows, heads * head_dim] act.
        qkv: [rows, (heads + 2 * kv_heads) * head_dim], act or fp32.
        cos, sin: [positions, pairs] fp32, 2 * pairs <= head_dim; None where nothing is rotated.
        k_cache, v_cache: [blocks, BLOCK_SIZE, kv_heads, head_dim] act.
        q_norm, k_norm: both or none; weights of head_dim numbers, or of all heads' if one norm is over all of them.
    """
    kv_heads, dim = k_cache.shape[2:]
    heads = q_out.shape[1] // dim
    constants = rotary_constants(
        heads,
        kv_heads,
        dim,
        pairs=0 if cos is None else cos.shape[1],
        norm="" if q_norm is None else "head" if q_norm.weight.numel() == dim else "all",
    )
    together = constants["TOGETHER"]
    nothing = tables.positions  # in place of tensors that are not read
    launch(
        rotate_kernel,
        (qkv.shape[0], triton.cdiv(heads, together) + triton.cdiv(kv_heads, together)),
        *(q_out, k_cache, v_cache, qkv),
        *(nothing if x is None else x for x in (cos, sin)),
        *(nothing if norm is None else norm.weight for norm in (q_norm, k_norm)),
        *(0.0 if norm is None else norm.eps for norm in (q_norm, k_norm)),
        *(tables.positions, tables.starts, tables.blocks, tables.counts),
        **constants,
    )


def rotary_constants(heads: int, kv_heads: int, dim: int, *, pairs: int, norm: str) -> dict[str, Any]:
    """Constants and options of `rotate_kernel`; `pairs` 0: no rotation; `norm`: "" for none, "head" or "all"."""
    wide = triton.next_power_of_2(dim)
    return {
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "DIM": dim,
        "WIDE": wide,
        "PAIRS": pairs,
        "NORM": norm,
        "TOGETHER": max(_TOGETHER // wide, 1),
        "PAGE": BLOCK_SIZE,
        "num_warps": 4,
    }


@triton.jit
def _turned(x, weight, cos, sin, eps, first, some, HEADS: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr,
            PAIRS: tl.constexpr, NORM: tl.constexpr, TOGETHER: tl.constexpr):  # fmt: skip
    """Heads [first, first + TOGETHER) of x [HEADS, DIM], normed and rotated, fp32; `some`: those that there are."""
    h, d = first + tl.arange(0, TOGETHER), tl.arange(0, WIDE)
    read = some[:, None] & (d < DIM)[None, :]
    at = h[:, None] * DIM + d[None, :]
    own = tl.load(x + at, mask=read, other=0).to(tl.float32)
    factor = tl.full((TOGETHER,), 1.0, tl.float32)
    if NORM == "head":
        factor = 1.0 / tl.sqrt_rn(tl.sum(own * own, 1) / DIM + eps)
    if NORM == "all":
        squares = tl.zeros((TOGETHER,), tl.float32)
        for other in range(0, HEADS, TOGETHER):
            there = ((other + tl.arange(0, TOGETHER)) < HEADS)[:, None] & (d < DIM)[None, :]
            its = (other + tl.arange(0, TOGETHER))[:, None] * DIM + d[None, :]
            numbers = tl.load(x + its, mask=there, other=0).to(tl.float32)
            squares += tl.sum(numbers * numbers, 1)
        factor += 1.0 / tl.sqrt_rn(tl.sum(squares, 0) / (HEADS * DIM) + eps) - 1.0
    if NORM != "":
        weight_at = d[None, :] if NORM == "head" else at
        own = own * factor[:, None] * tl.load(weight + weight_at, mask=read, other=0)
    if PAIRS > 0:
        # the other number of each pair; a number that is in none has itself, with cosine 1 and sine 0
        turned = d < 2 * PAIRS
        partner = tl.where(turned, tl.where(d < PAIRS, d + PAIRS, d - PAIRS), d)
        other_at = h[:, None] * DIM + partner[None, :]
        other = tl.load(x + other_at, mask=read, other=0).to(tl.float32)
        if NORM != "":
            weight_at = partner[None, :] if NORM == "head" else other_at
            other = other * factor[:, None] * tl.load(weight + weight_at, mask=read, other=0)
        c = tl.load(cos + d % PAIRS, mask=turned, other=1)[None, :]
        s = tl.load(sin + d % PAIRS, mask=turned, other=0)[None, :]
        own = tl.where(turned[None, :], own * c + other * tl.where((d < PAIRS)[None, :], -s, s), own)
    return own


@triton.jit
def rotate_kernel(
    q_out,
    k_cache,
    v_cache,
    qkv,
    cos,
    sin,
    q_weight,
    k_weight,
    q_eps,
    k_eps,
    positions,
    starts,
    blocks,
    counts,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDE: tl.constexpr,
    PAIRS: tl.constexpr,
    NORM: tl.constexpr,
    TOGETHER: tl.constexpr,
    PAGE: tl.constexpr,
):
    """A row's TOGETHER heads of queries, or of keys and values."""
    row, group = tl.program_id(0), tl.program_id(1)
    if row < tl.load(counts + 3):
        Q_GROUPS: tl.constexpr = (HEADS + TOGETHER - 1) // TOGETHER
        act: tl.constexpr = q_out.dtype.element_ty
        x = qkv + row.to(tl.int64) * ((HEADS + 2 * KV_HEADS) * DIM)
        position = tl.load(positions + row)
        cos += position.to(tl.int64) * PAIRS
        sin += position.to(tl.int64) * PAIRS
        d = tl.arange(0, WIDE)
        if group < Q_GROUPS:
            h = group * TOGETHER + tl.arange(0, TOGETHER)
            q = _turned(x, q_weight, cos, sin, q_eps, group * TOGETHER, h < HEADS,
                        HEADS, DIM, WIDE, PAIRS, NORM, TOGETHER)  # fmt: skip
            place = row.to(tl.int64) * (HEADS * DIM) + h[:, None] * DIM + d[None, :]
            tl.store(q_out + place, q.to(act), mask=(h < HEADS)[:, None] & (d < DIM)[None, :])
        else:
            first = (group - Q_GROUPS) * TOGETHER
            h = first + tl.arange(0, TOGETHER)
            kept = (h < KV_HEADS)[:, None] & (d < DIM)[None, :]
            k = _turned(x + HEADS * DIM, k_weight, cos, sin, k_eps, first, h < KV_HEADS,
                        KV_HEADS, DIM, WIDE, PAIRS, NORM, TOGETHER).to(act)  # fmt: skip
            v = tl.load(x + (HEADS + KV_HEADS) * DIM + h[:, None] * DIM + d[None, :], mask=kept, other=0).to(act)
            finite = (tl.abs(k.to(tl.float32)) < float("inf")) & (tl.abs(v.to(tl.float32)) < float("inf"))
            whole = (tl.min(finite.to(tl.int32), 1) > 0)[:, None]
            k = tl.where(whole, k, float("nan")).to(act)
            v = tl.where(whole, v, 0.0).to(act)
            block = tl.load(blocks + tl.load(starts + row) + position // PAGE).to(tl.int64)
            place = (block * PAGE + position % PAGE) * (KV_HEADS * DIM) + h[:, None] * DIM + d[None, :]
            tl.store(k_cache + place, k, mask=kept)
            tl.store(v_cache + place, v, mask=kept)


def rotate_and_write_reference(
    q_out: torch.Tensor,
    qkv: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    tables: AttentionTables,
    *,
    q_norm: RMSNorm | None = None,
    k_norm: RMSNorm | None = None,
) -> None:
    """`rotate_and_write` in PyTorch."""
    kv_heads, dim = k_cache.shape[2:]
    rows = int(tables.counts[3])
    position = tables.positions[:rows].long()
    q, k, v = qkv[:rows].float().split([q_out.shape[1], kv_heads * dim, kv_heads * dim], dim=1)
    q, k = (turned_reference(x, norm, cos, sin, position, dim) for x, norm in ((q, q_norm), (k, k_norm)))
    q_out[:rows] = q.to(q_out.dtype)
    k, v = (x.to(k_cache.dtype).view(rows, kv_heads, dim) for x in (k, v))
    finite = (k.isfinite() & v.isfinite()).all(-1, keepdim=True)
    block = tables.blocks[tables.starts[:rows].long() + position // BLOCK_SIZE].long()
    k_cache[block, position % BLOCK_SIZE] = torch.where(finite, k, torch.nan)
    v_cache[block, position % BLOCK_SIZE] = torch.where(finite, v, 0)


def turned_reference(
    x: torch.Tensor,
    norm: RMSNorm | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    position: torch.Tensor,
    dim: int,
) -> torch.Tensor:
    """Heads of one kind, x [rows, heads * dim] fp32 at these positions [rows], normed and rotated."""
    if norm is not None:
        parts = x.view(len(x), -1, norm.weight.numel())
        parts = parts * (parts.square().mean(-1, keepdim=True) + norm.eps).rsqrt() * norm.weight
        x = parts.reshape(x.shape)
    x = x.view(len(x), -1, dim)
    if cos is not None and sin is not None:
        pairs = cos.shape[1]
        c, s = cos[position][:, None], sin[position][:, None]
        a, b, rest = x.split([pairs, pairs, dim - 2 * pairs], dim=-1)
        x = torch.cat([a * c - b * s, b * c + a * s, rest], dim=-1)
    return x.flatten(1)
