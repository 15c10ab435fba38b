"""Attention of a packed batch over the paged KV cache, behind transformers' attention interface.

Semantics, for token row t of a sequence at position p:

    out[t] = softmax(softcap(scaling * q[t] @ K[lo : p + 1].T)) @ V[lo : p + 1],  lo = max(0, p - window + 1)

where K and V are all keys and values of that sequence so far, this step's included. In layers that see chunks, lo is
the largest multiple of the chunk's size that is not above p. A head with a sink has one more score in its softmax,
without a value. Each row is computed alone, so its bits do not depend on how a prompt was cut into pieces or on what
else is in the batch.

The cache has keys and values of one width. Where a model's differ (multi-head latent attention: 192 and 128), the
narrower ones are filled up with zeros and the result is cut: one form of cache, and every kernel takes it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface

from loramux_adapters.device.device import Device
from loramux_server.errors import BaseModelError
from loramux_server.kernels.attention.by_position import (
    chunk_of,
    temperature_of,
    use_our_temperature,
    use_own_temperature,
)
from loramux_server.kernels.attention.kv_cache import BLOCK_SIZE, KVCache, KVShape
from loramux_server.kernels.compiled.library import Compiled

ATTENTION_NAME = "loramux"
_ROWS, _SPAN = 4, 128  # of the reference: rows and keys that a product takes at once
_VECTOR, _LARGEST_HEAD = (
    16,
    512,
)  # of the compiled kernel: numbers of a head are a multiple of one, and at most the other

# keyword arguments that models pass along and that change nothing here
_HARMLESS = frozenset(
    {
        *("dropout", "is_causal", "position_ids", "use_cache", "cache_position"),
        *("output_attentions", "output_hidden_states", "output_router_logits"),
    }
)


@dataclass(frozen=True, slots=True)
class AttentionStep:
    """Where the rows of one step belong. One object per step, given to the model as keyword `loramux_step`.

    Attributes:
        cache: the KV cache.
        attend: the kernel in use.
        tables: [sequences, width] int32, blocks of each sequence in order, padded with 0.
        sequence: [rows] int32, which sequence each token row belongs to.
        position: [rows] int32, its position in that sequence.
        runs: (sequence, first row, row count, position of the first row), one per sequence in row order.
    """

    cache: KVCache
    attend: Attend
    tables: torch.Tensor
    sequence: torch.Tensor
    position: torch.Tensor
    runs: tuple[tuple[int, int, int, int], ...]

    def store(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Puts the rows' keys and values, [rows, kv_heads, dim], into the cache."""
        position = self.position.long()
        blocks = self.tables.long()[self.sequence.long(), position // BLOCK_SIZE]
        self.cache.write(layer, blocks, position % BLOCK_SIZE, k, v)


@dataclass(frozen=True, slots=True)
class AttentionParams:
    """What a layer asks for: 0 of `softcap`, `window` and `chunk` means none. `sinks`: [heads] of any float dtype."""

    scaling: float
    softcap: float = 0.0
    window: int = 0
    sinks: torch.Tensor | None = None
    chunk: int = 0

    def __post_init__(self) -> None:
        if self.window and self.chunk:
            raise BaseModelError("a layer of this model sees chunks and a window of them at once; not supported")


# (q [rows, heads, dim], k and v [rows, kv_heads, dim], layer, step, params) -> [rows, heads, dim]
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int, AttentionStep, AttentionParams], torch.Tensor]


def attend_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int, step: AttentionStep, params: AttentionParams
) -> torch.Tensor:
    """The slow reference and the path of devices without a kernel: one sequence at a time, in fp32.

    Products are taken over whole fours of rows and whole spans of keys, zeros where there are none, and added up span
    by span: so the library takes the same code, with the same last bits, however a prompt is cut into chunks.
    """
    position, tables = step.position.long(), step.tables.long()
    step.store(layer, k, v)
    out = torch.empty_like(q)
    kv_heads, dim = k.shape[1:]
    for sequence, start, count, first in step.runs:
        total = first + count
        keys, values = (
            functional.pad(part.float(), (0, 0, 0, 0, 0, -total % _SPAN))
            for part in step.cache.read(layer, tables[sequence, : -(-total // BLOCK_SIZE)], total)
        )
        rows, more = slice(start, start + count), -count % _ROWS
        grouped = functional.pad(q[rows].float(), (0, 0, 0, 0, 0, more)).view(count + more, kv_heads, -1, dim)
        scores = torch.einsum("tkgd,skd->tkgs", grouped, keys) * params.scaling
        if params.softcap:
            scores = params.softcap * torch.tanh(scores / params.softcap)
        place, key = functional.pad(position[rows], (0, more))[:, None], torch.arange(len(keys), device=q.device)[None]
        hidden = key > place
        if params.window:
            hidden |= key <= place - params.window
        if params.chunk:
            hidden |= key < place - place % params.chunk
        scores = scores.masked_fill(hidden[:, None, None], float("-inf"))
        if params.sinks is None:
            weights = scores.softmax(-1)
        else:
            sinks = params.sinks.float().view(1, kv_heads, -1, 1).expand(*scores.shape[:-1], 1)
            weights = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
        found, parts = torch.zeros_like(grouped), len(keys) // _SPAN
        for part, span in zip(weights.tensor_split(parts, -1), values.tensor_split(parts), strict=True):
            found += torch.einsum("tkgs,skd->tkgd", part, span)
        out[rows] = found[:count].reshape(count, *q.shape[1:])
    return out


class NativeAttend:
    """The compiled CPU kernel (csrc/exact/attention.h): reads block tables in place, rows and kv heads in parallel."""

    def __init__(self, compiled: Compiled) -> None:
        self._call = compiled.function("loramux_exact_attention")
        self.isa = compiled.isa

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: int,
        step: AttentionStep,
        params: AttentionParams,
    ) -> torch.Tensor:
        cache = step.cache
        rows, heads, dim = q.shape
        if not (cache.shape.whole_numbers and q.dtype == k.dtype == v.dtype == torch.float32):
            raise ValueError("the compiled attention kernel takes fp32 and a cache of whole numbers")
        if k.shape[1:] != (cache.shape.kv_heads, cache.shape.head_dim) or v.shape != k.shape:
            raise ValueError(f"keys {tuple(k.shape)} and values {tuple(v.shape)} do not fit the cache")
        q, k, v = (x if x.stride()[1:] == (dim, 1) else x.contiguous() for x in (q, k, v))
        sinks = None if params.sinks is None else params.sinks.detach().float().contiguous()
        out = torch.empty(rows, heads, dim)
        self._call(
            out.data_ptr(),
            *(q.data_ptr(), q.stride(0), k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0)),
            *(cache.k[layer].data_ptr(), cache.v[layer].data_ptr(), cache.scales[layer].data_ptr()),
            *(step.tables.data_ptr(), step.tables.shape[1], step.sequence.data_ptr(), step.position.data_ptr()),
            *(rows, heads, k.shape[1], dim, params.scaling, params.softcap, params.window or -params.chunk),
            None if sinks is None else sinks.data_ptr(),
            *(self.isa, torch.get_num_threads()),
        )
        return out


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    loramux_step: AttentionStep | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: query [1, heads, rows, dim], key [1, kv_heads, rows, dim] and value
    [1, kv_heads, rows, value dim] -> [1, rows, heads, value dim].

    Raises:
        BaseModelError: the model asks for a kind of attention that this function does not compute.
    """
    if loramux_step is None:
        raise BaseModelError("this model's code does not hand its keyword arguments down to its attention")
    if not getattr(module, "is_causal", True) or others.get("is_causal") is False:
        raise BaseModelError(
            "this model's tokens see those behind them, as an encoder's do, so it does not write text token by token; "
            "not supported"
        )
    unknown = sorted(name for name, value in others.items() if value is not None and name not in _HARMLESS)
    if unknown or attention_mask is not None:
        raise BaseModelError(f"this model's attention needs {', '.join(unknown) or 'a mask'}, which is not supported")
    params = AttentionParams(
        scaling=float(query.shape[-1] ** -0.5 if scaling is None else scaling),
        softcap=float(softcap or 0.0),
        window=int(sliding_window or 0),
        sinks=s_aux,
        chunk=chunk_of(module),
    )
    layer: Any = module.layer_idx
    if (temperature := temperature_of(module)) is not None:
        query = query * temperature.factors(loramux_step.position)[:, None].to(query.dtype)
    width = max(query.shape[-1], value.shape[-1])
    q, k, v = (_as_wide(part[0].transpose(0, 1), width) for part in (query, key, value))
    out = loramux_step.attend(q, k, v, layer, loramux_step, params)
    return out[None, ..., : value.shape[-1]], None


def _as_wide(x: torch.Tensor, width: int) -> torch.Tensor:
    """x [rows, heads, dim] with zeros up to this width, which change no product."""
    return x if x.shape[-1] == width else functional.pad(x, (0, width - x.shape[-1]))


def use_our_attention(model: Any) -> None:
    """Switches a transformers model to `attention_forward`."""
    AttentionInterface.register(ATTENTION_NAME, attention_forward)
    model.set_attn_implementation(ATTENTION_NAME)
    use_our_temperature(model)


def use_eager_attention(model: Any) -> None:
    """Switches it to transformers' own, which reads one text alone."""
    model.set_attn_implementation("eager")
    use_own_temperature(model)


@torch.no_grad()
def probe_kv_shape(model: Any, device: Device, *, whole_numbers: bool) -> KVShape:
    """What one token of this model needs in the cache, seen in a forward of one token; configs are not always true.

    Args:
        whole_numbers: keep keys and values as whole numbers, where the compiled kernel takes heads of their size.
    Raises:
        BaseModelError: its layers differ, or it asks for a kind of attention that is not supported.
    """
    seen: dict[int, tuple[int, int, torch.dtype]] = {}

    def record(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int, step: AttentionStep, params: AttentionParams
    ) -> torch.Tensor:
        if v.shape != k.shape or layer in seen:
            raise BaseModelError("this model's layers share keys and values; not supported")
        seen[layer] = (k.shape[1], k.shape[2], k.dtype)
        return torch.zeros_like(q)

    use_our_attention(model)
    none = torch.zeros(1, dtype=torch.int32)
    empty = KVCache(KVShape(0, 1, 2), 0, device)
    step = AttentionStep(empty, record, none[None], none, none, ((0, 0, 1, 0),))
    one = device.put(torch.zeros(1, 1, dtype=torch.long))
    with device.used():
        model(input_ids=one, position_ids=one, use_cache=False, loramux_step=step)
    kinds = set(seen.values())
    if not kinds:
        raise BaseModelError(
            "this model has no attention: it keeps a state of its own for each sequence in place of keys and values, "
            "which is not served; name a base with attention in all layers"
        )
    if len(kinds) != 1 or sorted(seen) != list(range(len(seen))):
        raise BaseModelError(f"this model's layers need caches of different shapes ({sorted(map(str, kinds))})")
    ((kv_heads, head_dim, dtype),) = kinds
    if whole_numbers and head_dim % _VECTOR == 0 and head_dim <= _LARGEST_HEAD:
        dtype = torch.int16
    return KVShape(len(seen), kv_heads, head_dim, dtype)
