"""A frozen linear layer with its LoRA delta as one differentiable operation.

Semantics, with W [out, in] frozen, A [rank, in], B [out, rank], and D a random mask of zeros and 1 / (1 - dropout):

    y = x @ W.T + bias + scale * ((x * D) @ A.T) @ B.T

peft's own layer lifts x to fp32, multiplies there, and adds three rounded terms. Here everything runs in the dtype of x
with sums in fp32, the delta goes into the large product before its only rounding (so that a delta smaller than the last
bit of y is not lost), and only x and x A.T are kept. A layer that brings its own products is multiplied by these, so it
is trained on the very numbers that are served; another weight in NF4 is unpacked where it is needed and dropped. Where
the ops handed in say so (`TrainingOps`), x is read rounded to 16 bits, by both products, and kept so, and A and
scale * B are rounded as they are when they are served; gradients go through as if they were not.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import bitsandbytes.functional as bnb
import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from loramux_adapters.device.device import in_host_memory
from loramux_adapters.training.model.ops import TrainingOps

_READ = "_loramux_read"  # where a tensor keeps its copy in 16 bits
_DRAWS = 2**16  # dropout is drawn in 16-bit steps: a quarter of the random numbers, and finer than anybody sets it


@runtime_checkable
class _Multiplied(Protocol):
    """A layer that multiplies by its own weight, both ways; fp32, without the bias. `product` takes what is kept."""

    def product(self, x: torch.Tensor) -> torch.Tensor: ...

    def product_transposed(self, dy: torch.Tensor) -> torch.Tensor: ...


@runtime_checkable
class _Dequantized(Protocol):
    def dequantized(self) -> torch.Tensor:
        """[out, in] fp32."""


class FrozenWeight:
    """The weight of one layer of the base, as it is held, and products with it.

    Attributes:
        bias: [out], or None.
    """

    def __init__(self, layer: nn.Linear, ops: TrainingOps | None = None) -> None:
        self._layer: Any = layer
        self._ops = ops
        self._outputs = layer.out_features
        self._multiplied: _Multiplied | None = layer if isinstance(layer, _Multiplied) else None
        self.bias: torch.Tensor | None = None if layer.bias is None else layer.bias.detach()

    def read(self, x: torch.Tensor) -> torch.Tensor:
        """x as the products read it. Layers that read the same tensor keep one copy of it."""
        if self._ops is None or x.dtype == self._ops.kept:
            return x.detach()
        known = x.__dict__.get(_READ)
        if known is None or known[0] != x._version:
            known = x.__dict__[_READ] = x._version, x.detach().to(self._ops.kept)
        copy: torch.Tensor = known[1]
        return copy

    def rounded(self, weights: torch.Tensor) -> torch.Tensor:
        """A, or scale * B, as it is served."""
        return weights if self._ops is None else weights.to(self._ops.adapters)

    def times(self, x: torch.Tensor) -> torch.Tensor:
        """x [rows, in] -> x @ W.T [rows, out]."""
        if self._multiplied is not None:
            return self._multiplied.product(x)[:, : self._outputs]
        return self.matmul(x, self.unpacked(x.dtype).t())

    def times_transposed(self, dy: torch.Tensor) -> torch.Tensor:
        """dy [rows, out] -> dy @ W [rows, in], the gradient of `times`."""
        if self._multiplied is not None:
            padded = getattr(self._layer, "padded", self._outputs)
            return self._multiplied.product_transposed(nn.functional.pad(dy, (0, padded - self._outputs)))
        return self.matmul(dy, self.unpacked(dy.dtype))

    def matmul(self, a: torch.Tensor, b: torch.Tensor, add_to: torch.Tensor | None = None) -> torch.Tensor:
        """a @ b, or `add_to` with it added in place, rounded once."""
        if self._ops is not None and torch.float32 in (a.dtype, b.dtype):
            return self._ops.matmul(a, b, add_to)
        return a @ b if add_to is None else add_to.addmm_(a, b)

    def unpacked(self, dtype: torch.dtype) -> torch.Tensor:
        """[out, in]: a copy of an NF4 weight, dequantized; another weight itself."""
        if isinstance(self._layer, _Dequantized):
            return self._layer.dequantized().to(dtype)
        weight: torch.Tensor = self._layer.weight.detach()
        state = getattr(self._layer.weight, "quant_state", None)
        return (weight if state is None else bnb.dequantize_4bit(weight, state)).to(dtype)


class _FrozenPlusDelta(torch.autograd.Function):
    """See the module's Semantics. `weight` is a `FrozenWeight`; gradients go to x, A and B."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        read: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        weight: FrozenWeight,
        scale: float,
        dropout: float,
    ) -> torch.Tensor:
        """x [tokens, in], a [rank, in] and b [out, rank] of any float dtype -> y [tokens, out] of x's.

        `read`: x as `FrozenWeight.read` gives it.
        """
        ctx.dtype = dtype = x.dtype
        a, b, x = weight.rounded(a).to(dtype), weight.rounded(b * scale).to(dtype), read
        kept = keep_mask(x, dropout) if dropout else None
        inner = weight.matmul(x if kept is None else x * kept * (1 / (1 - dropout)), a.t())
        if dtype == torch.float32:
            y = weight.matmul(inner, b.t(), weight.times(x))
            if weight.bias is not None:
                y += weight.bias
        else:  # the delta first: it would be lost in the last bits of the larger term
            y = inner @ b.t() if weight.bias is None else torch.addmm(weight.bias.to(x.dtype), inner, b.t())
            y.addmm_(x, weight.unpacked(x.dtype).t())
        ctx.save_for_backward(x, a, b, inner, kept)
        ctx.weight, ctx.scale, ctx.dropout = weight, scale, dropout
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        x, a, b, inner, kept = ctx.saved_tensors
        weight: FrozenWeight = ctx.weight
        need_x, _, need_a, need_b = ctx.needs_input_grad[:4]
        d_inner = weight.matmul(grad, b)
        grad_b = weight.matmul(inner.t(), grad).t().float().mul_(ctx.scale) if need_b else None
        keep = None if kept is None else kept * x.new_tensor(1 / (1 - ctx.dropout))
        grad_a = weight.matmul(d_inner.t(), x if keep is None else x * keep).float() if need_a else None
        grad_x = None
        if need_x and ctx.dtype == torch.float32 and keep is None:
            grad_x = weight.matmul(d_inner, a, weight.times_transposed(grad))
        elif need_x:
            grad_x = weight.matmul(d_inner, a)
            if keep is not None:
                grad_x *= keep
            if ctx.dtype == torch.float32:
                grad_x += weight.times_transposed(grad)
            else:
                grad_x.addmm_(grad, weight.unpacked(grad.dtype))
        return grad_x, None, grad_a, grad_b, None, None, None


class _Frozen(torch.autograd.Function):
    """y = x @ W.T + bias of a layer without an adapter; a gradient goes to x alone."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, read: torch.Tensor, weight: FrozenWeight) -> torch.Tensor:
        ctx.weight = weight
        y = weight.times(read)
        return y if weight.bias is None else y + weight.bias.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        return ctx.weight.times_transposed(grad), None, None


def lora_linear(
    x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, weight: FrozenWeight, scale: float, dropout: float
) -> torch.Tensor:
    """x [..., in] -> [..., out]; see the module's Semantics."""
    apply: Any = _FrozenPlusDelta.apply
    y: torch.Tensor = apply(*_flat(x, weight), a, b, weight, scale, dropout)
    return y.view(*x.shape[:-1], y.shape[-1])


def frozen_linear(x: torch.Tensor, weight: FrozenWeight) -> torch.Tensor:
    """x [..., in] -> [..., out]."""
    apply: Any = _Frozen.apply
    y: torch.Tensor = apply(*_flat(x, weight), weight)
    return y.view(*x.shape[:-1], y.shape[-1])


def _flat(x: torch.Tensor, weight: FrozenWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """x, and as the products read it; both [tokens, in]."""
    return x.reshape(-1, x.shape[-1]), weight.read(x).reshape(-1, x.shape[-1])


def keep_mask(x: torch.Tensor, dropout: float) -> torch.Tensor:
    """True where an element is kept, in x's shape; from PyTorch's current random state."""
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
    kept: torch.Tensor = draws.view(torch.int16)[: x.numel()] >= round(dropout * _DRAWS) - _DRAWS // 2
    return kept.view(x.shape)


def fuse_lora_layers(model: nn.Module, ops: TrainingOps | None = None) -> None:
    """Gives every LoRA layer that peft put into the model the forward of this module; parameters stay peft's.

    On a CPU, and with ops, the linear layers without an adapter, the output head among them, get a forward with a
    gradient in fp32.
    """
    wrapped = set()
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and isinstance(layer, nn.Module):
            wrapped |= set(layer.modules())
            _fuse(layer, ops)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module not in wrapped:
            if ops is not None or in_host_memory(module.weight):
                _freeze(module, FrozenWeight(module, ops))


def _fuse(layer: Any, ops: TrainingOps | None) -> None:
    (name,) = layer.lora_A
    a, b, drop = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.lora_dropout[name]
    weight, scale = FrozenWeight(layer.get_base_layer(), ops), float(layer.scaling[name])

    def forward(x: torch.Tensor) -> torch.Tensor:
        dropout = float(drop.p) if isinstance(drop, nn.Dropout) and drop.training else 0.0
        return lora_linear(x, a, b, weight, scale, dropout)

    layer.forward = forward


def _freeze(layer: Any, weight: FrozenWeight) -> None:
    layer.forward = lambda x: frozen_linear(x, weight)
