"""Steps over a paged cache for tests of the kernels in kernels/gpu/: what is not written is NaN."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from loramux_server.kernels.attention.kv_cache import BLOCK_SIZE
from loramux_server.kernels.attention.paged_attention import AttentionParams
from loramux_server.kernels.gpu.attention import AttentionScratch, attend, attend_reference, attention_scratch
from loramux_server.kernels.gpu.attention_tables import AttentionSizes, AttentionTables
from loramux_server.kernels.gpu.launch import launch_now

Chunk = tuple[int, int, int]  # (sequence, position of its first row, number of rows)
ROWS, SEQUENCES, BLOCKS = 72, 4, 12


class Paged:
    """Sequences with all their queries, keys and values, and a cache that holds them in scattered blocks."""

    def __init__(self, lengths: list[int], *, kv_heads: int, device: torch.device, act: torch.dtype, **sizes: Any):
        self.sizes = AttentionSizes(ROWS, SEQUENCES, BLOCKS, **sizes)
        self.act, self.device = act, device
        random = torch.Generator().manual_seed(len(lengths) + sum(lengths))
        heads, dim = kv_heads * self.sizes.group, self.sizes.head_dim

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=random).to(device, act)

        self.kv_heads, self.heads, self.dim = kv_heads, heads, dim
        self.q = [2 * normal(length, heads * dim) for length in lengths]
        self.keys = [normal(length, kv_heads, dim) for length in lengths]
        self.values = [normal(length, kv_heads, dim) for length in lengths]
        order = np.random.default_rng(0).permutation(SEQUENCES * BLOCKS).astype(np.int32)
        self.blocks = [order[i * BLOCKS : (i + 1) * BLOCKS] for i in range(len(lengths))]
        shape = (SEQUENCES * BLOCKS, BLOCK_SIZE, kv_heads, dim)
        self.k_cache, self.v_cache = (torch.full(shape, torch.nan, dtype=act, device=device) for _ in range(2))

    def write(self, sequence: int, end: int) -> None:
        """Keys and values below position `end`, and NaN in the rest of the sequence's blocks."""
        at = torch.arange(end)
        block = torch.from_numpy(self.blocks[sequence]).long()
        for cache, numbers in ((self.k_cache, self.keys), (self.v_cache, self.values)):
            cache[block.to(self.device)] = torch.nan
            cache[block[at // BLOCK_SIZE].to(self.device), (at % BLOCK_SIZE).to(self.device)] = numbers[sequence][:end]

    def tables(self, chunks: list[Chunk], *, large_tiles: bool = True, **sizes: Any) -> AttentionTables:
        """Filled with chunks in their order; `sizes` differ from ours."""
        ours = {name: getattr(self.sizes, name) for name in self.sizes.__slots__}
        of = AttentionSizes(**{**ours, **sizes})
        tables = AttentionTables(of, torch.full((of.numbers,), -1, dtype=torch.int32, device=self.device), programs=2)
        staging = np.full(of.numbers, -1, dtype=np.int32)
        runs, row = [], 0
        for sequence, position, count in chunks:
            runs.append((sequence, row, count, position))
            row += count
        used = tables.fill(staging, runs, self.blocks, large_tiles=large_tiles)
        tables.tensor[:used] = torch.from_numpy(staging[:used]).to(self.device)
        return tables

    def attend(
        self, chunks: list[Chunk], params: AttentionParams, *, large_tiles: bool = True, **sizes: Any
    ) -> list[torch.Tensor]:
        """What each chunk's rows get, [rows, heads * dim]."""
        tables, params = self.tables(chunks, large_tiles=large_tiles, **sizes), self.placed(params)
        for sequence, position, count in chunks:
            self.write(sequence, position + count)
        q = torch.cat([self.q[sequence][position : position + count] for sequence, position, count in chunks])
        out = torch.full_like(q, torch.nan)
        scratch = AttentionScratch(
            *(torch.full(shape, torch.nan, device=self.device) for shape in self.scratch_shapes(tables.sizes))
        )
        attend(launch_now, out, q, self.k_cache, self.v_cache, tables, params, scratch, large_tiles=large_tiles)
        return list(out.split([count for *_, count in chunks]))

    def placed(self, params: AttentionParams) -> AttentionParams:
        """With sinks where all else lies."""
        return params if params.sinks is None else replace(params, sinks=params.sinks.to(self.device))

    def scratch_shapes(self, sizes: AttentionSizes) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return attention_scratch(sizes, self.heads, self.dim)

    def reference(self, chunks: list[Chunk], params: AttentionParams) -> list[torch.Tensor]:
        tables, params = self.tables(chunks), self.placed(params)
        for sequence, position, count in chunks:
            self.write(sequence, position + count)
        q = torch.cat([self.q[sequence][position : position + count] for sequence, position, count in chunks])
        out = torch.full_like(q, torch.nan)
        attend_reference(out, q, self.k_cache, self.v_cache, tables, params)
        return list(out.split([count for *_, count in chunks]))
