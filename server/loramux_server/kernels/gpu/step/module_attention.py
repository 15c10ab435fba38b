"""Attention of a base that runs module by module, on a whole step's kernels: sinks, windows and soft caps included."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from loramux_adapters.device.device import Device
from loramux_server.kernels.attention.kv_cache import KVShape
from loramux_server.kernels.attention.paged_attention import AttentionParams, AttentionStep
from loramux_server.kernels.attention.varlen_attention import agrees
from loramux_server.kernels.gpu.attention import AttentionScratch, attend, attention_scratch
from loramux_server.kernels.gpu.attention_tables import AttentionSizes, AttentionTables
from loramux_server.kernels.gpu.rotary import rotate_and_write
from loramux_server.kernels.gpu.split_sums import has_tensor_cores

_PROGRAMS = 4  # of a launch, for each multiprocessor
_BLOCKS = 256  # of a sequence, that tables have room for at least: so one kernel merges parts, whatever the lengths
_GROUP = 2  # query heads of a kv head, in the trial
_LARGEST_HEAD = 256  # numbers of one that the attention kernels keep in registers
_PARTS = 512  # of rows and splits that several programs may leave


def why_not_attended(shape: KVShape, act: torch.dtype) -> str:
    """Why the attention kernels do not read a cache of this shape, `act` being what they compute in; "" if they do."""
    dim = shape.head_dim
    fits = shape.dtype == act and dim % 16 == 0 and dim <= _LARGEST_HEAD
    return "" if fits else f"heads of {dim} numbers in {shape.dtype} do not fit the attention kernels"


class _Told(NamedTuple):
    """What the kernels are told of one step."""

    step: AttentionStep
    tables: AttentionTables


class TritonAttend:
    """`Attend` on a dense cache that `why_not_attended` finds nothing in. Owner: the engine thread."""

    name = "Triton"

    def __init__(self, device: Device) -> None:
        self._device = device
        self._last: _Told | None = None
        self._scratch: AttentionScratch | None = None

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: int,
        step: AttentionStep,
        params: AttentionParams,
    ) -> torch.Tensor:
        rows, heads, dim = q.shape
        if self._last is None or self._last.step is not step:  # made once for all layers
            self._last = _Told(step, self._tables(step, rows, heads // k.shape[1], dim))
        tables, cache = self._last.tables, (step.cache.k[layer], step.cache.v[layer])
        scratch = self._scratch_for(tables.sizes, heads)
        qkv = torch.cat([x.reshape(rows, -1) for x in (q, k, v)], dim=1)
        queries, out = (self._device.scratch((rows, heads * dim), step.cache.shape.dtype) for _ in range(2))
        launch = self._device.launch
        rotate_and_write(launch, queries, qkv, None, None, *cache, tables)  # modules have turned them
        attend(launch, out, queries, *cache, tables, params, scratch)
        return out.view(rows, heads, dim).to(q.dtype)

    def _tables(self, step: AttentionStep, rows: int, group: int, dim: int) -> AttentionTables:
        device = self._device
        blocks = device.take(step.tables).numpy()
        sizes = AttentionSizes(
            rows=rows,
            sequences=len(blocks),
            blocks=max(_BLOCKS, blocks.shape[1]),
            group=group,
            head_dim=dim,
            tensor_cores=has_tensor_cores(device.capability),
            parts=_PARTS,
        )
        staging = np.zeros(sizes.numbers, np.int32)
        tables = AttentionTables(
            sizes, device.scratch((sizes.numbers,), torch.int32), programs=_PROGRAMS * device.processors
        )
        used = tables.fill(staging, step.runs, list(blocks))
        tables.tensor[:used].copy_(device.put(torch.from_numpy(staging[:used])))
        return tables

    def _scratch_for(self, sizes: AttentionSizes, heads: int) -> AttentionScratch:
        shapes = attention_scratch(sizes, heads, sizes.head_dim)
        if self._scratch is None or self._scratch.values.shape != shapes[0]:
            self._scratch = AttentionScratch(*(self._device.scratch(shape, torch.float32) for shape in shapes))
        return self._scratch


def triton_attend(device: Device, shape: KVShape) -> TritonAttend | None:
    """It, tried on the device against the reference; None where it does not read such a cache, or is wrong here."""
    if why_not_attended(shape, device.activations):
        return None
    path, heads = TritonAttend(device), _GROUP * shape.kv_heads
    plain = AttentionParams(shape.head_dim**-0.5)
    sinks = device.put(torch.linspace(-4, 4, heads).to(shape.dtype))
    every = AttentionParams(shape.head_dim**-0.5, softcap=5.0, window=11, sinks=sinks)
    try:
        with device.used(), torch.inference_mode():
            right = all(agrees(path, device, shape, asked, group=_GROUP) for asked in (plain, every))
    except Exception:  # whatever a compiler, a driver or a card says
        return None
    return path if right else None
