"""Attention of rows that lie end to end without padding, behind transformers' attention interface.

Semantics, for token t of a row, at position p of that row:

    out[t] = softmax(softcap(scaling * q[t] @ K[lo : p + 1].T)) @ V[lo : p + 1],  lo = max(0, p - window + 1)

where K and V are the keys and values of that row alone. What all rows begin with may be there once, before them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from loramux_adapters.errors import RecipeError
from loramux_adapters.training.model.ops import Attends, AttendsRows, TrainingOps
from loramux_adapters.training.model.padded_attention import attend_padded
from loramux_adapters.training.model.row_layout import LayerAttention, PackedRows, hidden

ATTENTION_NAME = "loramux_training"
_VECTOR = 16  # the ops handed in take heads whose dimension is a multiple of this

# keyword arguments that models pass along and that change nothing here
_HARMLESS = frozenset(
    {"dropout", "is_causal", "position_ids", "use_cache", "output_attentions", "cache_position", "output_hidden_states"}
)


def attend_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: PackedRows, params: LayerAttention
) -> torch.Tensor:
    """One row at a time, in fp32: the slow reference, and the path of layers with a soft cap.

    Args:
        q: [tokens, heads, dim].
        k, v: [tokens, kv_heads, dim].
    Returns: [tokens, heads, dim].
    """
    group = q.shape[1] // k.shape[1]
    out = []
    start = 0
    for first, length in ((0, rows.shared), *((rows.shared, length) for length in rows.lengths)):
        own = slice(start, start + length)
        start += length
        keys, values = (torch.cat([x[:first], x[own]]).float() for x in (k, v))
        grouped = q[own].float().view(length, k.shape[1], group, q.shape[2])
        scores = torch.einsum("tkgd,skd->kgts", grouped, keys) * params.scaling
        if params.softcap:
            scores = params.softcap * torch.tanh(scores / params.softcap)
        weights = scores.masked_fill(hidden(first, length, params.window, q.device), float("-inf")).softmax(-1)
        out.append(torch.einsum("kgts,skd->tkgd", weights, values).flatten(1, 2).to(q.dtype))
    return torch.cat(out)


class _Attend(torch.autograd.Function):
    """q [tokens, heads, dim], k and v [tokens, kv_heads, dim] -> [tokens, heads, dim]."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        rows: torch.Tensor,
        options: dict[str, Any],
        ops: Attends,
    ) -> torch.Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out, stats = ops.attend(q, k, v, rows, **options)
        ctx.save_for_backward(q, k, v, out, stats)
        ctx.rows, ctx.options, ctx.ops = rows, options, ops
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        return *ctx.ops.attend_gradient(grad, ctx.saved_tensors, ctx.rows, **ctx.options), None, None, None


def attend_with(
    ops: Attends, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: PackedRows, params: LayerAttention
) -> torch.Tensor:
    """As `attend_reference`, by the ops handed in: fp32, head dimension a multiple of 16."""
    options = {"scaling": params.scaling, "softcap": params.softcap, "window": params.window}
    apply: Any = _Attend.apply
    out: torch.Tensor = apply(q, k, v, rows.spans(), options, ops)
    return out


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    loramux_rows: PackedRows | None = None,
    loramux_ops: TrainingOps | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: query [1, heads, tokens, dim], key and value [1, kv_heads, tokens, dim].

    Raises:
        RecipeError: the model asks for a kind of attention that this function does not compute.
    """
    unknown = sorted(name for name, value in others.items() if value is not None and name not in _HARMLESS)
    if loramux_rows is None or unknown or attention_mask is not None:
        needs = ", ".join(unknown) or ("a mask" if loramux_rows is not None else "its own keyword arguments")
        raise RecipeError(f"this base cannot be trained: its attention needs {needs}, which is not supported")
    params = LayerAttention(
        scaling=float(query.shape[-1] ** -0.5 if scaling is None else scaling),
        softcap=float(softcap or 0.0),
        window=int(sliding_window or 0),
    )
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    suits = q.dtype == torch.float32 and q.shape[2] == v.shape[2] and q.shape[2] % _VECTOR == 0
    if isinstance(loramux_ops, AttendsRows):
        out = loramux_ops.attend_rows(q, k, v, loramux_rows, params)
    elif isinstance(loramux_ops, Attends) and suits:
        out = attend_with(loramux_ops, q, k, v, loramux_rows, params)
    else:
        out = (attend_reference if params.softcap else attend_padded)(q, k, v, loramux_rows, params)
    return out[None], None


def use_packed_attention(model: Any) -> None:
    """Switches a transformers model to `attention_forward`."""
    AttentionInterface.register(ATTENTION_NAME, attention_forward)
    model.set_attn_implementation(ATTENTION_NAME)
