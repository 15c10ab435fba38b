"""Attention of packed rows by PyTorch's `scaled_dot_product_attention`, which keeps no matrix of weights.

Semantics are those of loramux_adapters/training/model/packed_attention.py, with queries, keys and values rounded to the
device's activations, as they lie in the server's cache. Rows of similar length are padded to one; what all rows begin
with is read by each of them and gets the sum of their gradients. On a card PyTorch takes FlashAttention 2 for bf16 and
its memory-efficient kernel where a mask is needed (a sliding window, a shared beginning) or for fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from loramux_adapters.training.model.packed_attention import attend_reference
from loramux_adapters.training.model.row_layout import LayerAttention, PackedRows, RowGroup, hidden


@dataclass(frozen=True, slots=True)
class _Rows:
    """Where things lie, on the device.

    Attributes:
        groups: places in the batch of each group's queries [rows, longest], and of its keys [rows, first + longest].
        back: [tokens] int64, the place of each token among the padded queries of all groups.
    """

    groups: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    back: torch.Tensor


def attend_rounded(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: PackedRows,
    params: LayerAttention,
    rounded_to: torch.dtype,
) -> torch.Tensor:
    """q [tokens, heads, dim], k and v [tokens, kv_heads, dim], fp32 -> [tokens, heads, dim] fp32; differentiable.

    In fp16 only the values are rounded: its gradients would be lost, so the attention itself is fp32 then. A layer with
    a soft cap takes the slow reference, row by row.
    """
    apply: Any = _Round.apply
    q, k, v = (apply(x, rounded_to) if rounded_to == torch.float16 else x.to(rounded_to) for x in (q, k, v))
    if params.softcap:
        return attend_reference(q, k, v, rows, params).float()
    plan = _plan(rows, q.device)
    outs = []
    for group, (queries, keys) in zip(_groups(rows), plan.groups, strict=True):
        outs.append(_attend(q[queries], k[keys], v[keys], group, params))
    # indexing, and not index_select: its gradient is added up in a fixed order
    return torch.cat(outs)[plan.back].float()


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group: RowGroup, params: LayerAttention) -> torch.Tensor:
    """q [rows, longest, heads, dim], k and v [rows, first + longest, kv_heads, dim] -> [rows * longest, heads, dim]."""
    longest, share = q.shape[1], q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(share, 2), v.repeat_interleave(share, 2)))
    masked = group.first > 0 or 0 < params.window < longest
    mask = ~hidden(group.first, longest, params.window, q.device) if masked else None
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=params.scaling)
    return out.transpose(1, 2).flatten(0, 1)


class _Round(torch.autograd.Function):
    """Rounds the values; the gradient stays as it is."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        return grad, None


def _groups(rows: PackedRows) -> list[RowGroup]:
    found = rows.plans.get("groups")
    if not isinstance(found, list):
        found = rows.plans["groups"] = rows.groups()
    return found


def _plan(rows: PackedRows, device: torch.device) -> _Rows:
    key = ("rounded", device)
    found = rows.plans.get(key)
    if not isinstance(found, _Rows):
        groups = _groups(rows)
        tokens = torch.cat([group.tokens.flatten() for group in groups])
        places = torch.cat([group.real.flatten() for group in groups]).nonzero()[:, 0]
        back = torch.empty_like(places).index_copy_(0, tokens[places], places)
        on_device = tuple((group.tokens.to(device), group.keys.to(device)) for group in groups)
        found = rows.plans[key] = _Rows(on_device, back.to(device))
    return found
