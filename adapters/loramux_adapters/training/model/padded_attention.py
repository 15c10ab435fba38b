"""The fast attention of packed rows: groups of similar rows, padded only here, as batched products with GQA folded in.

On a CPU, PyTorch's attention in bf16 takes six times as long for rows of some dozens of tokens. The result and its
gradients are those of `attend_reference` with the scores and weights rounded to the dtype of q.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from loramux_adapters.training.model.row_layout import LayerAttention, PackedRows, RowGroup, hidden

_KEEP = 256  # weights over up to so many keys are kept for the backward pass; longer ones are computed again


@dataclass(frozen=True, slots=True)
class _Padding:
    """One group of rows for tensors whose rows are (token, head).

    Attributes:
        q: [rows * kv_heads * group * longest] int64, index of each padded query.
        k: [rows * kv_heads * (first + longest)] int64, index of each padded key.
        pads: [n] int64, places in `q` that are pads.
        shape: rows * kv_heads, group, longest, first + longest.
        mask: [group * longest, first + longest], 0 or -inf.
    """

    first: int
    q: torch.Tensor
    k: torch.Tensor
    pads: torch.Tensor
    shape: tuple[int, int, int, int]
    mask: torch.Tensor

    def queries(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens * heads, dim] -> [rows * kv_heads, group * longest, dim]."""
        batch, group, longest, _ = self.shape
        return x.index_select(0, self.q).view(batch, group * longest, -1)

    def keys(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens * kv_heads, dim] -> [rows * kv_heads, first + longest, dim]."""
        return x.index_select(0, self.k).view(self.shape[0], self.shape[3], -1)

    def weights(self, q: torch.Tensor, k: torch.Tensor, scaling: float) -> torch.Tensor:
        """Padded queries and keys -> [rows * kv_heads, group * longest, first + longest]."""
        return torch.baddbmm(self.mask, q, k.transpose(1, 2), alpha=scaling).softmax(-1)


@dataclass(frozen=True, slots=True)
class _Plan:
    """All groups of a batch, and the way back: where each (token, head) lies among the padded queries and keys."""

    paddings: tuple[_Padding, ...]
    from_q: torch.Tensor
    from_k: torch.Tensor
    kv_heads: int


def attend_padded(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: PackedRows, params: LayerAttention
) -> torch.Tensor:
    """q [tokens, heads, dim], k and v [tokens, kv_heads, dim] -> [tokens, heads, dim]; there must be no soft cap."""
    assert not params.softcap
    key = (q.shape[1], k.shape[1], params.window, q.dtype, q.device)
    plan = rows.plans.get(key)
    if not isinstance(plan, _Plan):
        plan = rows.plans[key] = _make_plan(rows, q.shape[1], k.shape[1], params.window, q)
    heads, dim = q.shape[1], v.shape[2]
    apply: Any = _Attend.apply
    out: torch.Tensor = apply(*(x.reshape(-1, x.shape[2]) for x in (q, k, v)), plan, params.scaling)
    return out.view(-1, heads, dim)


class _Attend(torch.autograd.Function):
    """q [tokens * heads, dim], k and v [tokens * kv_heads, dim] -> [tokens * heads, dim]."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: _Plan, scaling: float
    ) -> torch.Tensor:
        outs, kept = [], []
        for padding in plan.paddings:
            weights = padding.weights(padding.queries(q), padding.keys(k), scaling)
            outs.append(torch.bmm(weights, padding.keys(v)).flatten(0, 1))
            kept.append(weights if padding.shape[3] <= _KEEP else None)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.plan, ctx.scaling = plan, scaling
        return torch.cat(outs).index_select(0, plan.from_q)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        q, k, v, *kept = ctx.saved_tensors
        plan: _Plan = ctx.plan
        padded: list[tuple[torch.Tensor, ...]] = []
        for padding, weights in zip(plan.paddings, kept, strict=True):
            queries, keys, values = padding.queries(q), padding.keys(k), padding.keys(v)
            weights = padding.weights(queries, keys, ctx.scaling) if weights is None else weights
            grads = padding.queries(grad.contiguous())
            if padding.pads.numel():
                grads.view(-1, grads.shape[2]).index_fill_(0, padding.pads, 0)
            d_weights = torch.bmm(grads, values.transpose(1, 2))
            d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype).mul_(ctx.scaling)
            d_k, d_v = torch.bmm(d_scores.transpose(1, 2), queries), torch.bmm(weights.transpose(1, 2), grads)
            padded.append((torch.bmm(d_scores, keys), d_k, d_v))
        d_q = torch.cat([x.flatten(0, 1) for x, _, _ in padded]).index_select(0, plan.from_q)
        d_k, d_v = (_gather_keys(plan, [x[place] for x in padded]) for place in (1, 2))
        return d_q, d_k, d_v, None, None


def _gather_keys(plan: _Plan, padded: list[torch.Tensor]) -> torch.Tensor:
    """Gradients of the padded keys -> [tokens * kv_heads, dim]; a shared key gets the sum of what all rows give it."""
    out = torch.cat([x.flatten(0, 1) for x in padded]).index_select(0, plan.from_k)
    for padding, x in zip(plan.paddings, padded, strict=True):
        if padding.first:
            given = x[:, : padding.first].view(-1, plan.kv_heads, padding.first, x.shape[2]).sum(0)
            out[: padding.first * plan.kv_heads] += given.transpose(0, 1).reshape(-1, out.shape[1])
    return out


def _make_plan(rows: PackedRows, heads: int, kv_heads: int, window: int, like: torch.Tensor) -> _Plan:
    """`like` says dtype and device of the masks."""
    groups, device = rows.groups(), like.device
    paddings = tuple(_pad(group, heads, kv_heads, window, like) for group in groups)
    real_q = [group.real[:, None, None].expand(-1, kv_heads, heads // kv_heads, -1) for group in groups]
    own = [group.real.new_zeros(len(group.real), group.first) for group in groups]
    real_k = [torch.cat([o, g.real], dim=1)[:, None].expand(-1, kv_heads, -1) for o, g in zip(own, groups, strict=True)]
    return _Plan(
        paddings,
        _inverse(torch.cat([x.q for x in paddings]), torch.cat([x.flatten() for x in real_q]).to(device)),
        _inverse(torch.cat([x.k for x in paddings]), torch.cat([x.flatten() for x in real_k]).to(device)),
        kv_heads,
    )


def _pad(group: RowGroup, heads: int, kv_heads: int, window: int, like: torch.Tensor) -> _Padding:
    rows, longest = group.tokens.shape
    head = torch.arange(heads).view(kv_heads, -1, 1)
    real = group.real[:, None, None].expand(-1, kv_heads, heads // kv_heads, -1)
    unseen = hidden(group.first, longest, window, like.device).repeat(heads // kv_heads, 1)
    return _Padding(
        first=group.first,
        q=(group.tokens[:, None, None] * heads + head).flatten().to(like.device),
        k=(group.keys[:, None] * kv_heads + torch.arange(kv_heads)[:, None]).flatten().to(like.device),
        pads=(~real).flatten().nonzero()[:, 0].to(like.device),
        shape=(rows * kv_heads, heads // kv_heads, longest, group.first + longest),
        mask=like.new_zeros(unseen.shape).masked_fill(unseen, float("-inf")),
    )


def _inverse(index: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """[n] -> [number of real entries]: the place at which each index stands where it is real; there it stands once."""
    places = real.nonzero()[:, 0]
    return torch.empty_like(places).index_copy_(0, index[places], places)
