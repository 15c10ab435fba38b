"""Attention by the library's kernel for sequences of different lengths: the path of CUDA devices.

`torch.nn.attention.varlen` (FlashAttention) reads the dense cache by block tables or, where the device's version of it
cannot read blocks of this size, keys and values gathered for each layer. With `num_splits=1` a row's bits do not depend
on the batch. What is passed to it is tested on the CPU, with a slow kernel of the same signature.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from loramux_adapters.device.device import Device
from loramux_server.kernels.attention.kv_cache import BLOCK_SIZE, KVCache, KVShape
from loramux_server.kernels.attention.paged_attention import Attend, AttentionParams, AttentionStep, attend_reference

Kernel = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Lengths:
    """What the kernel is told of one step; on the device.

    Attributes:
        rows: [sequences + 1] int32, where each sequence's token rows begin, and where the last one's end.
        keys: [sequences + 1] int32, the same of all keys up to and including this step's.
        used: [sequences] int32, keys of each sequence.
        most_rows, most_keys: of one sequence.
        places: [all keys] int64, where they lie in the cache, in tokens; empty if the kernel reads block tables.
    """

    rows: torch.Tensor
    keys: torch.Tensor
    used: torch.Tensor
    most_rows: int
    most_keys: int
    places: torch.Tensor


class VarlenAttend:
    """`Attend` by a kernel with the signature of `torch.nn.attention.varlen.varlen_attn`, on the dense cache."""

    def __init__(self, kernel: Kernel, *, paged: bool) -> None:
        """`paged`: the kernel reads block tables; otherwise keys and values are gathered for it."""
        self._kernel = kernel
        self.paged = paged
        self._last: tuple[AttentionStep, Lengths] | None = None
        self.name = "varlen paged" if paged else "varlen gathered"

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: int,
        step: AttentionStep,
        params: AttentionParams,
    ) -> torch.Tensor:
        if params.softcap or params.chunk or params.sinks is not None:  # the kernel has none
            return attend_reference(q, k, v, layer, step, params)
        step.store(layer, k, v)
        lengths = self._lengths_of(step)
        keys, values = step.cache.k[layer], step.cache.v[layer]
        if not self.paged:
            keys, values = (stack.flatten(0, 1).index_select(0, lengths.places) for stack in (keys, values))
        out: torch.Tensor = self._kernel(
            q.contiguous(),
            keys,
            values,
            lengths.rows,
            lengths.keys,
            lengths.most_rows,
            lengths.most_keys,
            scale=params.scaling,
            window_size=(params.window - 1 if params.window else -1, 0),
            enable_gqa=q.shape[1] != k.shape[1],
            seqused_k=lengths.used if self.paged else None,
            block_table=step.tables if self.paged else None,
            num_splits=1,
        )
        return out

    def _lengths_of(self, step: AttentionStep) -> Lengths:
        """Made once for all layers of a step."""
        if self._last is None or self._last[0] is not step:
            self._last = step, lengths_of(step, paged=self.paged)
        return self._last[1]


def lengths_of(step: AttentionStep, *, paged: bool) -> Lengths:
    counts = np.array([count for _, _, count, _ in step.runs])
    totals = np.array([first + count for _, _, count, first in step.runs])
    device = step.tables.device

    def begins(sizes: npt.NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)).to(device)

    places = torch.empty(0, dtype=torch.int64, device=device)
    if not paged:
        order = torch.from_numpy(np.concatenate([np.arange(total) for total in totals])).to(device)
        owner = torch.from_numpy(np.repeat([sequence for sequence, *_ in step.runs], totals)).to(device)
        places = step.tables[owner, order // BLOCK_SIZE].long() * BLOCK_SIZE + order % BLOCK_SIZE
    return Lengths(
        rows=begins(counts),
        keys=begins(totals),
        used=torch.from_numpy(totals.astype(np.int32)).to(device),
        most_rows=int(counts.max()),
        most_keys=int(totals.max()),
        places=places,
    )


def varlen_attend(kernel: Kernel, device: Device, shape: KVShape) -> VarlenAttend | None:
    """The way this kernel works with our cache, tried on the device against the reference; None if it does not."""
    for paged in (True, False):
        path = VarlenAttend(kernel, paged=paged)
        try:
            if agrees(path, device, shape, AttentionParams(shape.head_dim**-0.5), group=2):
                return path
        except (RuntimeError, ValueError, TypeError):  # what the library says of a case it does not take
            continue
    return None


def agrees(path: Attend, device: Device, shape: KVShape, asked: AttentionParams, *, group: int) -> bool:
    """Whether a way to attend gives what the reference gives: of a prompt in two chunks and one decode beside it, with
    a cache of its own that is full of NaN. `group`: query heads of a kv head."""
    random = torch.Generator().manual_seed(0)
    small = KVShape(1, shape.kv_heads, shape.head_dim, shape.dtype)
    caches = [KVCache(small, 6, device) for _ in range(2)]
    for tensor in (tensor for cache in caches for tensor in (*cache.k, *cache.v)):
        tensor.fill_(float("nan"))  # what other sequences left behind must never be read
    tables = device.put(torch.tensor([[4, 1, 3], [2, 0, 0]], dtype=torch.int32))
    for runs in (((0, 0, 20, 0), (1, 20, 3, 0)), ((0, 0, 19, 20), (1, 19, 1, 3))):
        rows = sum(count for _, _, count, _ in runs)
        sequence = [index for index, _, count, _ in runs for _ in range(count)]
        position = [first + i for _, _, count, first in runs for i in range(count)]
        q, k, v = (
            device.put(torch.randn(rows, heads, shape.head_dim, generator=random).to(shape.dtype))
            for heads in (group * shape.kv_heads, shape.kv_heads, shape.kv_heads)
        )
        outs = []
        for attend, cache in zip((path, attend_reference), caches, strict=True):
            owner, place = (device.put(torch.tensor(them, dtype=torch.int32)) for them in (sequence, position))
            step = AttentionStep(cache, attend, tables, owner, place, runs)
            outs.append(device.take(attend(q, k, v, 0, step, asked)).float())
        if not torch.allclose(outs[0], outs[1], rtol=0.05, atol=0.05):
            return False
    return True
