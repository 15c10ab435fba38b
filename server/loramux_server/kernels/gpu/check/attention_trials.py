"""Trials of attention and of what writes its cache, on steps of a few sequences.

Near enough. Rotation and norms are fp32, rounded once. Attention rounds each key's weight to 16 bits; these roundings
are independent, so that they add up to less than one rounding of the result's own size, and to a few at most among
some hundred thousand numbers. A key too many or too few among some hundred changes a result by ten times as much.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from loramux_server.kernels.attention.kv_cache import BLOCK_SIZE
from loramux_server.kernels.attention.paged_attention import AttentionParams
from loramux_server.kernels.gpu.attention import AttentionScratch, attend_reference, attention_scratch
from loramux_server.kernels.gpu.attention_tables import AttentionTables, Run
from loramux_server.kernels.gpu.check.bench import UNTOUCHED, Bench
from loramux_server.kernels.gpu.check.trial import ROWS, STEPS, KernelTrial, Near, Results, WroteElsewhere
from loramux_server.kernels.gpu.rotary import rotate_and_write_reference
from loramux_server.kernels.gpu.step.operations import Operation
from loramux_server.kernels.layers.recognition import RMSNorm

_SUMS = 2.0**-14
_WEIGHTS = 6  # roundings of a result's size that those of the weights may add up to
_FAR = 600  # position of a row that sees several splits of keys
_SPLIT = 254  # first position of rows on both sides of the end of a split
_WINDOWS = (
    48,
    37,
)  # in place of a longer one, or of longer chunks: a multiple of 16, as kernels are compiled for, and none
_PARTS = (64, 1)  # that may be cut, and where nothing is
_SINKS = 4.0  # standard deviation of sinks
_STRONG = 8  # a soft cap's share that scores have where it is tried


class _Steps:
    """A decode row far out, a few rows over the end of a split, the first token of a sequence, and a prompt.

    Attributes:
        rows: in all.
        blocks: [sequences, most of one], scattered.
    """

    def __init__(self, bench: Bench) -> None:
        last = bench.positions - 1
        starts = [(min(_FAR, last), 1), (min(_SPLIT, max(0, last - 2)), 3), (0, 1)]
        starts = [(position, min(count, last + 1 - position)) for position, count in starts]
        starts.append((0, min(ROWS - sum(count for _, count in starts), last + 1)))
        self._starts = starts
        self.rows = sum(count for _, count in starts)
        most = max(-(-(position + count) // BLOCK_SIZE) for position, count in starts)
        self.count = most * len(starts)
        self.blocks = bench.permutation(self.count).reshape(len(starts), most)
        self._bench = bench

    def runs(self, first: int, count: int) -> list[Run]:
        """Of these rows alone."""
        found, row = [], 0
        for sequence, (position, length) in enumerate(self._starts):
            begin, end = max(first, row), min(first + count, row + length)
            if begin < end:
                found.append((sequence, begin - first, end - begin, position + begin - row))
            row += length
        return found

    def tables(self, first: int, count: int, parts: int = _PARTS[0]) -> AttentionTables:
        return self._bench.attention_tables(self.runs(first, count), self.blocks, parts)

    def places(self, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Block and place in it of each of these rows."""
        block, place = [], []
        for sequence, _, length, position in self.runs(first, count):
            at = np.arange(position, position + length)
            block.append(self.blocks[sequence][at // BLOCK_SIZE])
            place.append(at % BLOCK_SIZE)
        both = (torch.from_numpy(np.concatenate(each)).long() for each in (block, place))
        blocks, places = map(self._bench.device.put, both)
        return blocks, places

    def written(self, cache: torch.Tensor) -> torch.Tensor:
        """A cache of NaN with the numbers of `cache` where the sequences have keys by the end of the step."""
        found = torch.full_like(cache, torch.nan)
        for blocks, (position, count) in zip(self.blocks, self._starts, strict=True):
            at = torch.arange(position + count)
            block = torch.from_numpy(blocks).long()[at // BLOCK_SIZE].to(cache.device)
            place = (at % BLOCK_SIZE).to(cache.device)
            found[block, place] = cache[block, place]
        return found


def rotate_and_write(bench: Bench) -> Iterator[KernelTrial]:
    seen = set()
    for layer in bench.decoder.description.layers:
        kind = layer.rotary, layer.q_norm is not None, layer.whole_norms
        if kind not in seen:
            seen.add(kind)
            yield _rotate_and_write(bench, layer.rotary, layer.q_norm, layer.k_norm)


def _rotate_and_write(bench: Bench, table: int, q_norm: RMSNorm | None, k_norm: RMSNorm | None) -> KernelTrial:
    of, steps = bench.decoder.description, _Steps(bench)
    queries, keys = of.heads * of.head_dim, of.kv_heads * of.head_dim
    cos, sin = bench.decoder.angles[table] if table >= 0 else (None, None)
    qkv = bench.rows(queries + 2 * keys)[: steps.rows]
    qkv[-1, queries + 1] = torch.inf  # a key that is not finite must harm nobody else
    shape = (steps.count, BLOCK_SIZE, of.kv_heads, of.head_dim)
    norms = {"q_norm": q_norm, "k_norm": k_norm}

    def run(operation: Operation, first: int, count: int) -> Results:
        q_out = bench.untouched(count + 1, queries)
        caches = bench.untouched(*shape), bench.untouched(*shape)
        tables = steps.tables(first, count)
        some = qkv[first : first + count + 1]  # a row behind the step's, where there is one
        operation(bench.launch, q_out[: len(some)], some, cos, sin, *caches, tables, **norms)
        at = steps.places(first, count)
        found = [q_out[:count].clone(), *(cache[at].flatten(1) for cache in caches)]
        q_out[:count] = UNTOUCHED
        for cache in caches:
            cache[at] = UNTOUCHED
        if not all(bool((memory == UNTOUCHED).all()) for memory in (q_out, *caches)):
            raise WroteElsewhere("it writes where it must not")
        return found

    def expected() -> Results:
        q_out = bench.untouched(steps.rows, queries, dtype=torch.float32)
        k, v = (bench.untouched(*shape, dtype=torch.float32) for _ in range(2))
        tables = steps.tables(0, steps.rows)
        rotate_and_write_reference(q_out, qkv, cos, sin, k, v, tables, q_norm=q_norm, k_norm=k_norm)
        at = steps.places(0, steps.rows)
        return [q_out, k[at].flatten(1), v[at].flatten(1)]

    what = f"{of.heads} heads of {of.head_dim} on {of.kv_heads}"
    near = [Near(bench.rounding, _SUMS)] * 3
    return KernelTrial("rotate_and_write", what, run, expected, near, steps.rows, STEPS)


def attend(bench: Bench) -> Iterator[KernelTrial]:
    heads = bench.decoder.description.heads
    asked = {replace(layer.asked, sinks=None): layer.asked.sinks for layer in bench.decoder.description.layers}
    for params, sinks in asked.items():
        if sinks is not None:  # of every size beside scores, for each layer has its own
            params = replace(params, sinks=bench.normal(heads, size=_SINKS, dtype=sinks.dtype))
        yield _attend(bench, params, 1.0)
        if params.softcap / _STRONG > 1.0:
            yield _attend(bench, params, params.softcap / _STRONG)


def _attend(bench: Bench, asked: AttentionParams, strength: float) -> KernelTrial:
    """`strength`: the standard deviation of scores."""
    of, steps = bench.decoder.description, _Steps(bench)
    window, chunk = (min(length, _WINDOWS[length % 16 != 0]) for length in (asked.window, asked.chunk))
    params = replace(asked, window=window, chunk=chunk)
    q = bench.normal(steps.rows, of.heads * of.head_dim, size=strength / (asked.scaling * of.head_dim**0.5))
    shape = (steps.count, BLOCK_SIZE, of.kv_heads, of.head_dim)
    k_cache, v_cache = (steps.written(bench.normal(*shape)) for _ in range(2))
    whole = steps.tables(0, steps.rows)
    shapes = attention_scratch(whole.sizes, of.heads, of.head_dim)
    scratch = AttentionScratch(*(bench.untouched(*each, dtype=torch.float32) for each in shapes))

    def run(operation: Operation, first: int, count: int) -> Results:
        out = bench.untouched(count, q.shape[1])
        tables = whole if count == steps.rows else steps.tables(first, count, _PARTS[1])
        some = q[first : first + count]
        operation(bench.launch, out, some, k_cache, v_cache, tables, params, scratch, large_tiles=True)
        return [out]

    def expected() -> Results:
        out = bench.untouched(steps.rows, q.shape[1], dtype=torch.float32)
        attend_reference(out, q, k_cache, v_cache, whole, params)
        return [out]

    what = f"{of.heads} heads of {of.head_dim} on {of.kv_heads}"
    what += f", a window of {asked.window}" if asked.window else ""
    what += f", a soft cap of {asked.softcap:g}" if asked.softcap else ""
    what += f", chunks of {asked.chunk}" if asked.chunk else ""
    what += ", with sinks" if asked.sinks is not None else ""
    near = [Near(bench.rounding, _WEIGHTS * bench.rounding)]
    return KernelTrial("attend", what, run, expected, near, steps.rows, STEPS)
