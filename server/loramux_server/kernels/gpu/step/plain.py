"""A step's operations by PyTorch's own, on tensors of any device: for a kernel that is wrong or does not compile.

Semantics: those of the kernel's function of the same name, with the same signature; what a kernel alone needs
(`launch`, `scratch`) is not used. Sums are fp32. A row's bits may depend on the rows around it, but for products, which
take their rows in tiles of one size.

`attend` and `add_lora` read the step's tables on the host, so a graph cannot hold them. All others can be captured:
they read nothing there, and what they start depends on sizes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from loramux_adapters.lora.ops import HAS_AFFINE, HAS_DELTA, Arena
from loramux_adapters.lora.slots import SMALLEST_RANK
from loramux_server.kernels.attention.kv_cache import BLOCK_SIZE
from loramux_server.kernels.attention.paged_attention import AttentionParams
from loramux_server.kernels.gpu import rows as elementwise
from loramux_server.kernels.gpu.attention_tables import AttentionTables
from loramux_server.kernels.gpu.changes import adopt_reference, change_reference
from loramux_server.kernels.gpu.lora import LoraTarget, check_stack
from loramux_server.kernels.gpu.lora_tables import BLOCK, BLOCK_ROWS, ENTRY, LoraTables
from loramux_server.kernels.gpu.nf4 import BLOCK as SCALED
from loramux_server.kernels.gpu.nf4 import Nf4Weights
from loramux_server.kernels.gpu.nf4_levels import LEVELS
from loramux_server.kernels.gpu.rotary import turned_reference
from loramux_server.kernels.layers.recognition import RMSNorm

_ROW_TILE = 64  # rows of a product, with zeros behind the last: libraries take other code for other numbers of rows
_AT_ONCE = 1 << 23  # numbers that one operation makes: 32 MiB in fp32
_QUERY_ROWS = 64  # of one sequence that attention takes at once


def _without_launch(reference: Callable[..., None]) -> Callable[..., None]:
    """A reference that is quick enough as it is."""

    def plain(launch: Any, *args: Any, **options: Any) -> None:
        reference(*args, **options)

    plain.__doc__ = f"`{reference.__name__}`, with the kernel's signature."
    return plain


embed = _without_launch(elementwise.embed_reference)
add_norm = _without_launch(elementwise.add_norm_reference)
own_embeddings = _without_launch(elementwise.own_embeddings_reference)
own_logits = _without_launch(elementwise.own_logits_reference)
gather_rows = _without_launch(elementwise.gather_rows_reference)
gate = _without_launch(elementwise.gate_reference)
finish_logits = _without_launch(elementwise.finish_logits_reference)
change = _without_launch(change_reference)
adopt = _without_launch(adopt_reference)


def resolve_tokens(launch: Any, to: torch.Tensor, tokens: torch.Tensor, chosen: torch.Tensor) -> None:
    ask = (-1 - tokens).clamp(min=0).long()
    to.copy_(torch.where(tokens < 0, chosen[ask], tokens))


def nf4_product(
    launch: Any,
    y: torch.Tensor,
    x: torch.Tensor,
    w: Nf4Weights,
    scratch: Any,
    *,
    bias: torch.Tensor | None = None,
    row_tiles: Any = (),
) -> None:
    """Some outputs after others are written out in fp32, and multiplied with."""
    tiles = list(_row_tiles(x))
    for begin, end in _outputs_at_once(w.inputs, w.outputs):
        part = w.part(begin, end)
        pairs = _levels_of_bytes(x.device, x.dtype).index_select(0, part.codes.flatten().int())
        scaled = pairs.view(*part.codes.shape, 2) * part.scales[:, :, None, None]
        weight = scaled.permute(1, 0, 3, 2).reshape(end - begin, w.inputs)
        _multiply(y[:, begin:end], tiles, weight, None if bias is None else bias[begin:end])


def dense_product(
    launch: Any, y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scratch: Any, *, row_tiles: Any = ()
) -> None:
    tiles = list(_row_tiles(x))
    outputs, inputs = weight.shape
    for begin, end in _outputs_at_once(inputs, outputs):
        _multiply(y[:, begin:end], tiles, weight[begin:end].float(), None)


@cache
def _levels_of_bytes(device: torch.device, act: torch.dtype) -> torch.Tensor:
    """[256, 2] fp32: the levels, rounded to `act`, of a byte's low and high half."""
    levels = torch.tensor(LEVELS, dtype=act).float()
    codes = torch.arange(256)
    return torch.stack([levels[codes & 15], levels[codes >> 4]], 1).to(device)


def _outputs_at_once(inputs: int, outputs: int) -> Iterator[tuple[int, int]]:
    count = max(SCALED, _AT_ONCE // inputs)
    return ((begin, min(begin + count, outputs)) for begin in range(0, outputs, count))


def _row_tiles(x: torch.Tensor) -> Iterator[torch.Tensor]:
    """x in tiles [_ROW_TILE, in] fp32, the last one filled up with zeros."""
    for some in x.split(_ROW_TILE):
        yield functional.pad(some.float(), (0, 0, 0, _ROW_TILE - len(some)))


def _multiply(y: torch.Tensor, tiles: Sequence[torch.Tensor], weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """y [rows, out] = rows of the tiles @ weight [out, in].T + bias [out]"""
    for to, tile in zip(y.split(_ROW_TILE), tiles, strict=True):
        product = (tile @ weight.t())[: len(to)]
        to.copy_(product if bias is None else product + bias.float())


def add_lora(
    launch: Any,
    y: torch.Tensor,
    x: torch.Tensor,
    targets: Sequence[LoraTarget],
    tables: LoraTables,
    scratch: Any,
) -> None:
    """Blocks whose adapters have the same rank are one batch of products; all adapters at one place in their rows' sums
    are one change by gain and shift. The host reads the tables."""
    check_stack(y, x, targets, tables)
    count = int(tables.counts[1])
    blocks = _on_host(tables.blocks[: count * BLOCK]).reshape(-1, BLOCK)
    first, last = blocks[:, BLOCK_ROWS + 1], blocks[:, BLOCK_ROWS + 2]
    entries = _on_host(tables.entries[: int(last.max(initial=0)) * ENTRY]).reshape(-1, ENTRY)
    totals = [torch.zeros(len(y), target.arena.bt.shape[1], device=y.device) for target in targets]
    having = [_with_affine(target.arena, entries) for target in targets]
    changes = [torch.zeros_like(total) if some.any() else None for some, total in zip(having, totals, strict=True)]
    for place in range(int((last - first).max(initial=0))):
        those = np.flatnonzero(first + place < last)
        those_entries = first[those] + place
        of = entries[those_entries]
        for target, change, has in zip(targets, changes, having, strict=True):
            if change is not None:
                some = has[those_entries]
                _add_changes(change, y, target, of[some], blocks[those[some], :BLOCK_ROWS])
        for rank in np.unique(of[:, 1]).tolist():
            some = of[:, 1] == rank
            for target, total in zip(targets, totals, strict=True):
                _add_deltas(total, x, target, rank, of[some], blocks[those[some], :BLOCK_ROWS])
    for target, total, change in zip(targets, totals, changes, strict=True):
        span = y[:, target.column : target.column + total.shape[1]]
        before = span.float() if change is None else span.float() + change
        span.copy_(before + total)


def _with_affine(arena: Arena, entries: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
    """Which entries [n, ENTRY] are of adapters that have gain and shift for the layer [n]."""
    if arena.affine is None:
        return np.zeros(len(entries), np.bool_)
    found: npt.NDArray[np.bool_] = (_on_host(arena.targeted) & HAS_AFFINE)[entries[:, 0] // SMALLEST_RANK] != 0
    return found


def _add_changes(
    total: torch.Tensor,
    y: torch.Tensor,
    target: LoraTarget,
    entries: npt.NDArray[np.int32],
    rows: npt.NDArray[np.int32],
) -> None:
    """total [rows, out] += scale * (gain * y + shift) of adapters that all have them: entries [n, ENTRY], each for its
    block's rows [n, 16]"""
    arena, device = target.arena, y.device
    assert arena.affine is not None
    at_once = max(1, _AT_ONCE // (BLOCK_ROWS * total.shape[1]))
    for begin in range(0, len(entries), at_once):
        some = np.ascontiguousarray(entries[begin : begin + at_once])
        of = torch.from_numpy(rows[begin : begin + at_once].astype(np.int64)).to(device)
        group = torch.from_numpy(some[:, 0].astype(np.int64)).to(device) // SMALLEST_RANK
        scale = torch.from_numpy(some.view(np.float32)[:, 2].copy()).to(device)
        gain, shift = arena.affine[group].unbind(1)  # [n, out]
        before = y[of.clamp(min=0), target.column : target.column + total.shape[1]].float()  # [n, 16, out]
        change = scale[:, None, None] * (gain[:, None] * before + shift[:, None])
        change = torch.where((of >= 0)[:, :, None], change, 0.0)
        total.index_add_(0, of.clamp(min=0).flatten(), change.flatten(0, 1))


def _add_deltas(
    total: torch.Tensor,
    x: torch.Tensor,
    target: LoraTarget,
    rank: int,
    entries: npt.NDArray[np.int32],
    rows: npt.NDArray[np.int32],
) -> None:
    """total [rows, out] += the deltas of adapters of one rank: entries [n, ENTRY], each for its block's rows [n, 16]"""
    arena, device = target.arena, x.device
    at_once = max(1, _AT_ONCE // (rank * max(x.shape[1], total.shape[1])))
    for begin in range(0, len(entries), at_once):
        some = np.ascontiguousarray(entries[begin : begin + at_once])
        of = torch.from_numpy(rows[begin : begin + at_once].astype(np.int64)).to(device)
        offset = torch.from_numpy(some[:, 0].astype(np.int64)).to(device)
        scale = torch.from_numpy(some.view(np.float32)[:, 2].copy()).to(device)
        ranks = offset[:, None] + torch.arange(rank, device=device)
        a, bt = arena.a[ranks].to(x.dtype).float(), arena.bt[ranks].float()  # [n, rank, in], [n, rank, out]
        h = x[of.clamp(min=0)].float() @ a.transpose(1, 2) * scale[:, None, None]
        delta = h @ bt
        # what an adapter that does not change this layer holds there is nobody's
        has = arena.targeted[offset // SMALLEST_RANK] & HAS_DELTA
        kept = (has != 0)[:, None, None] & (of >= 0)[:, :, None]
        delta = torch.where(kept, delta, 0.0)
        total.index_add_(0, of.clamp(min=0).flatten(), delta.flatten(0, 1))


def _on_host(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """A copy, when what was started before is done."""
    array: npt.NDArray[Any] = tensor.clone().cpu().numpy()
    return array


def rotate_and_write(
    launch: Any,
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
    """For a step of at least one row. Rows behind the step's own do once more what the first one does."""
    kv_heads, dim = k_cache.shape[2:]
    number = torch.arange(len(qkv), device=qkv.device)
    held = number < tables.counts[3]
    row = torch.where(held, number, 0)
    position = tables.positions[row].long()
    q, k, v = qkv[row].float().split([q_out.shape[1], kv_heads * dim, kv_heads * dim], dim=1)
    q, k = (turned_reference(x, norm, cos, sin, position, dim) for x, norm in ((q, q_norm), (k, k_norm)))
    q_out.copy_(torch.where(held[:, None], q.to(q_out.dtype), q_out))
    k, v = (x.to(k_cache.dtype).view(-1, kv_heads, dim) for x in (k, v))
    finite = (k.isfinite() & v.isfinite()).all(-1, keepdim=True)
    block = tables.blocks[tables.starts[row].long() + position // BLOCK_SIZE].long()
    k_cache[block, position % BLOCK_SIZE] = torch.where(finite, k, torch.nan)
    v_cache[block, position % BLOCK_SIZE] = torch.where(finite, v, 0)


def attend(
    launch: Any,
    out: torch.Tensor,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    tables: AttentionTables,
    params: AttentionParams,
    scratch: Any,
    *,
    large_tiles: bool = True,
) -> None:
    """Pieces of as many rows are one batch, their keys gathered from the pages. The host reads the tables."""
    rows = int(tables.counts[3])
    positions, starts = _on_host(tables.positions[:rows]), _on_host(tables.starts[:rows])
    kv_heads, dim = k_cache.shape[2:]
    pieces: dict[int, list[int]] = {}  # number of rows -> the first one of each piece
    for first, count in _pieces(starts):
        pieces.setdefault(count, []).append(first)
    for count, firsts in pieces.items():
        firsts.sort(key=lambda first: int(positions[first]))
        while firsts:
            blocks = (int(positions[firsts[-1]]) + count - 1) // BLOCK_SIZE + 1  # of the longest that is left
            numbers = blocks * BLOCK_SIZE * max(kv_heads * dim, count * q.shape[1] // dim)
            some = firsts[-max(1, _AT_ONCE // numbers) :]
            del firsts[-len(some) :]
            row = torch.tensor(some)[:, None] + torch.arange(count)
            at = torch.from_numpy(starts[some].astype(np.int64))[:, None] + torch.arange(blocks)
            # tables of shorter sequences end before: what is read behind them is not looked at
            table = tables.blocks[at.clamp(max=len(tables.blocks) - 1).to(q.device)].long()
            position = torch.from_numpy(positions[row.numpy()].astype(np.int64)).to(q.device)
            last = position[:, -1:] // BLOCK_SIZE
            table = torch.where(torch.arange(blocks, device=q.device) <= last, table, table[:, :1])
            row = row.flatten().to(q.device)
            out[row] = _attended(q[row], k_cache, v_cache, table, position, params).to(out.dtype)


def _pieces(starts: npt.NDArray[np.int32]) -> Iterator[tuple[int, int]]:
    """(first row, number of rows) of pieces of one sequence each; the rows of a sequence lie together."""
    ends = [*(np.flatnonzero(np.diff(starts)) + 1).tolist(), len(starts)] if len(starts) else []
    begin = 0
    for end in ends:
        for first in range(begin, end, _QUERY_ROWS):
            yield first, min(_QUERY_ROWS, end - first)
        begin = end


def _attended(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    table: torch.Tensor,
    position: torch.Tensor,
    params: AttentionParams,
) -> torch.Tensor:
    """[n * rows, heads * dim] fp32 for q of these rows, block tables [n, blocks] and positions [n, rows]"""
    kv_heads, dim = k_cache.shape[2:]
    n, count = position.shape
    key = torch.arange(table.shape[1] * BLOCK_SIZE, device=q.device)
    seen = key <= position[..., None]  # [n, rows, keys]
    if params.window:
        seen &= key > position[..., None] - params.window
    if params.chunk:
        seen &= key >= (position - position % params.chunk)[..., None]
    read = seen.any(1)[:, :, None, None]  # what nobody sees may be anything
    keys, values = (torch.where(read, cache[table].flatten(1, 2).float(), 0) for cache in (k_cache, v_cache))
    queries = q.float().view(n, count, kv_heads, -1, dim)
    scores = torch.einsum("nrkgd,njkd->nkgrj", queries, keys) * params.scaling
    if params.softcap:
        scores = params.softcap * torch.tanh(scores / params.softcap)
    scores = torch.where(seen[:, None, None], scores, -torch.inf)
    if params.sinks is None:
        weights = scores.softmax(-1)
    else:
        sinks = params.sinks.float().view(kv_heads, -1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    return torch.einsum("nkgrj,njkd->nrkgd", weights, values).reshape(n * count, -1)
