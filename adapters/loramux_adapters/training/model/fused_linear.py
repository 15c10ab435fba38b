"""A frozen linear layer with its LoRA delta as one differentiable operation.

Semantics, with W [out, in] frozen, A [rank, in], B [out, rank], and D a random mask of zeros and 1 / (1 - dropout):

    y = x @ W.T + bias + scale * ((x * D) @ A.T) @ B.T

peft's own layer lifts x to fp32, multiplies there, and adds three rounded terms. Here everything runs in the dtype of x
with sums in fp32, the delta goes into the large product before its only rounding (so that a delta smaller than the last
bit of y is not lost), an NF4 weight is unpacked where it is needed and dropped, and only x and x A.T are kept.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes.functional as bnb
import torch
from peft.tuners.lora import LoraLayer
from torch import nn

_DRAWS = 2**16  # dropout is drawn in 16-bit steps: a quarter of the random numbers, and finer than anybody sets it


class _FrozenPlusDelta(torch.autograd.Function):
    """See the module's Semantics. `weight` is a `FrozenWeight`; gradients go to x, A and B."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        weight: FrozenWeight,
        scale: float,
        dropout: float,
    ) -> torch.Tensor:
        """x [tokens, in], a [rank, in] and b [out, rank] of any float dtype -> y [tokens, out] of x's."""
        a, b = a.to(x.dtype), (b * scale).to(x.dtype)
        kept = keep_mask(x, dropout) if dropout else None
        inner = (x if kept is None else x * kept * (1 / (1 - dropout))) @ a.t()
        y = inner @ b.t() if weight.bias is None else torch.addmm(weight.bias.to(x.dtype), inner, b.t())
        y.addmm_(x, weight.unpacked(x.dtype).t())
        ctx.save_for_backward(x, a, b, inner, kept)
        ctx.weight, ctx.scale, ctx.dropout = weight, scale, dropout
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        x, a, b, inner, kept = ctx.saved_tensors
        need_x, need_a, need_b = ctx.needs_input_grad[:3]
        d_inner = grad @ b
        grad_b = (inner.t() @ grad).t().float().mul_(ctx.scale) if need_b else None
        keep = None if kept is None else kept * x.new_tensor(1 / (1 - ctx.dropout))
        grad_a = (d_inner.t() @ (x if keep is None else x * keep)).float() if need_a else None
        grad_x = None
        if need_x:
            grad_x = d_inner @ a
            if keep is not None:
                grad_x *= keep
            grad_x.addmm_(grad, ctx.weight.unpacked(grad.dtype))
        return grad_x, grad_a, grad_b, None, None, None


class FrozenWeight:
    """The weight of one layer of the base, as it is held, and how to get it [out, in] in a float dtype."""

    def __init__(self, layer: nn.Linear) -> None:
        self._weight: Any = layer.weight
        self.bias: torch.Tensor | None = None if layer.bias is None else layer.bias.detach()

    def unpacked(self, dtype: torch.dtype) -> torch.Tensor:
        """A copy of an NF4 weight, dequantized; another weight itself."""
        state = getattr(self._weight, "quant_state", None)
        weight: torch.Tensor = self._weight.detach()
        return (weight if state is None else bnb.dequantize_4bit(weight, state)).to(dtype)


def lora_linear(
    x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, weight: FrozenWeight, scale: float, dropout: float
) -> torch.Tensor:
    """x [..., in] -> [..., out]; see the module's Semantics."""
    apply: Any = _FrozenPlusDelta.apply
    y: torch.Tensor = apply(x.reshape(-1, x.shape[-1]), a, b, weight, scale, dropout)
    return y.view(*x.shape[:-1], y.shape[-1])


def keep_mask(x: torch.Tensor, dropout: float) -> torch.Tensor:
    """True where an element is kept, in x's shape; from PyTorch's current random state."""
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
    kept: torch.Tensor = draws.view(torch.int16)[: x.numel()] >= round(dropout * _DRAWS) - _DRAWS // 2
    return kept.view(x.shape)


def fuse_lora_layers(model: nn.Module) -> None:
    """Gives every LoRA layer that peft put into the model the forward of this module; parameters stay peft's."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and isinstance(layer, nn.Module):
            _fuse(layer)


def _fuse(layer: Any) -> None:
    (name,) = layer.lora_A
    a, b, drop = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.lora_dropout[name]
    weight, scale = FrozenWeight(layer.get_base_layer()), float(layer.scaling[name])

    def forward(x: torch.Tensor) -> torch.Tensor:
        dropout = float(drop.p) if isinstance(drop, nn.Dropout) and drop.training else 0.0
        return lora_linear(x, a, b, weight, scale, dropout)

    layer.forward = forward
