"""A base in training: everything between its layers in fp32, forward and backward by the ops handed in.

On a CPU, PyTorch's own elementwise functions differ in the last bits from one instruction set to another, and its
products more. So a module gets a forward of ours where a trial shows that it is the same function; another keeps its
own, and then the step's bits hold for one instruction set only. On a graphics processor it is for the roundings of the
step that is served, and for what is kept for the backward pass.

Semantics: embedding(t) = factor * w[t]; norm(x) = w * x / sqrt(mean(x^2) + eps), where w already holds the one that
some models add to it; mlp(x) = down(activation(gate(x)) * up(x)); angles in double, rounded to fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from loramux_adapters.device.device import Device
from loramux_adapters.training.model.ops import TrainingOps

_VECTOR = 16  # the width of a norm, and of a gate, is a multiple of this
_NEAR = 1e-5  # relative difference of the same numbers, summed in another order
_NEARLY, _ROUNDED = 1e-3, 1e-2  # of a whole MLP; of one whose gate is rounded to 16 bits
_OURS = "loramux_"  # attributes that say that a module's forward was replaced, without a backward
_ANGLES: dict[Any, Callable[[torch.Tensor], torch.Tensor]] = {
    torch.cos: torch.cos,
    torch.Tensor.cos: torch.cos,
    torch.sin: torch.sin,
    torch.Tensor.sin: torch.sin,
}

Forward = Callable[[torch.Tensor], torch.Tensor]


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, ops: TrainingOps) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.ops = eps, ops
        return ops.norm(x, weight, eps)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        return ctx.ops.norm_gradient(grad, x, weight, ctx.eps), None, None, None


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, gelu: bool, ops: TrainingOps) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.gelu, ctx.ops = gelu, ops
        return ops.activation(x, gelu=gelu)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors
        return ctx.ops.activation_gradient(grad, x, gelu=ctx.gelu), None, None


class _Gated(torch.autograd.Function):
    """activation(gate) * up; the activation is computed again in the backward pass instead of being kept."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, gelu: bool, ops: TrainingOps) -> torch.Tensor:
        gate, up = gate.to(ops.kept), up.to(ops.kept)
        ctx.save_for_backward(gate, up)
        ctx.gelu, ctx.ops = gelu, ops
        return ops.gated(gate, up, gelu=gelu)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        gate, up = ctx.saved_tensors
        return *ctx.ops.gated_gradient(grad, gate, up, gelu=ctx.gelu), None, None


class _AnglesInDouble(TorchFunctionMode):
    """cos and sin of fp32 numbers by way of double, whose last bit does not reach the result."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _ANGLES and args[0].dtype == torch.float32:
            return _ANGLES[func](args[0].double()).float()
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def use_fp32(model: Any) -> None:
    """The numbers of a 16-bit embedding go through the model in fp32, in place. Linear layers must take that.

    An embedding that lies in whole numbers gives fp32 by itself.
    """
    for layer in model.modules():
        if isinstance(layer, nn.LayerNorm):
            _lift_layer_norm(layer)
    module = model.get_input_embeddings()
    weight, factor = module.weight, float(getattr(module, "embed_scale", 1.0))
    if not weight.is_floating_point():
        return

    def forward(tokens: torch.Tensor) -> torch.Tensor:
        rows = functional.embedding(tokens, weight).float()
        return rows if factor == 1.0 else rows * factor

    module.forward = forward


@torch.no_grad()
def use_exact_modules(model: Any, ops: TrainingOps, device: Device) -> None:
    """Gives norms, activations, gated MLPs and rotary tables of a model in fp32 their forward, in place.

    Linear layers must have theirs already.
    """
    inputs = _Inputs(device)
    for module in model.modules():
        if any(name.startswith(_OURS) for name in module.__dict__):
            module.__dict__.pop("forward", None)
    for module in model.modules():
        if type(module).__name__.endswith("RotaryEmbedding"):
            _use_angles(module)
        elif not _use_norm(module, ops, inputs):
            _use_mlp(module, ops, inputs)
    for module in model.modules():
        if not module._parameters and not module._modules and "forward" not in module.__dict__:
            _use_activation(module, ops, inputs)


def _use_norm(module: Any, ops: TrainingOps, inputs: _Inputs) -> bool:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if list(module._parameters) != ["weight"] or module._modules or not isinstance(eps, float):
        return False
    if module.weight.dim() != 1 or len(module.weight) % _VECTOR:
        return False
    apply: Any = _Norm.apply
    x = inputs.rows(8, len(module.weight))
    expected = module.forward(x)
    for one in (0.0, 1.0):
        weight = (module.weight.detach().float() + one).contiguous()
        if _agree(ops.norm(x, weight, eps), expected):
            module.forward = lambda x, weight=weight: apply(x, weight, eps, ops)
            return True
    return False


def _activation_of(module: Any, ops: TrainingOps, inputs: _Inputs) -> bool | None:
    """Whether it is GELU by tanh, or SiLU; None for another function."""
    x = inputs.rows(8, 64)
    try:
        expected = module.forward(x)
    except (TypeError, RuntimeError, NotImplementedError):  # no function of one tensor
        return None
    if not isinstance(expected, torch.Tensor):
        return None
    return next((gelu for gelu in (False, True) if _agree(ops.activation(x, gelu=gelu), expected)), None)


def _use_activation(module: Any, ops: TrainingOps, inputs: _Inputs) -> None:
    gelu = _activation_of(module, ops, inputs)
    if gelu is not None:
        apply: Any = _Activation.apply
        module.forward = lambda x: apply(x, gelu, ops)


def _use_mlp(module: Any, ops: TrainingOps, inputs: _Inputs) -> None:
    """Modules look alike, so what they do is tried."""
    activation = module._modules.get("act_fn", module._modules.get("activation_fn"))
    fused = "gate_up_proj" in module._modules
    gates = ("gate_up_proj",) if fused else ("gate_proj", "up_proj")
    if activation is None or not {*gates, "down_proj"} <= module._modules.keys():
        return
    gelu = _activation_of(activation, ops, inputs)
    if gelu is None or module.down_proj.in_features % _VECTOR:
        return
    apply: Any = _Gated.apply

    def forward(x: torch.Tensor) -> torch.Tensor:
        if fused:
            gate, up = module.gate_up_proj(x).chunk(2, dim=-1)
        else:
            gate, up = module.gate_proj(x), module.up_proj(x)
        y: torch.Tensor = module.down_proj(apply(gate, up, gelu, ops))
        return y

    x = inputs.rows(4, getattr(module, gates[0]).in_features)
    ours, its = forward(x), module.forward(x)
    if (ours - its).norm() <= (_NEARLY if ops.kept == torch.float32 else _ROUNDED) * its.norm():
        module.forward = forward


def _use_angles(module: Any) -> None:
    own = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with _AnglesInDouble():
            return own(*args, **kwargs)

    module.forward = forward


def _lift_layer_norm(module: Any) -> None:
    weight, bias = (None if x is None else x.detach().float() for x in (module.weight, module.bias))
    module.forward = lambda x: functional.layer_norm(x, module.normalized_shape, weight, bias, module.eps)


class _Inputs:
    """Random numbers that modules are tried with."""

    def __init__(self, device: Device) -> None:
        self._random, self._device = torch.Generator().manual_seed(0), device

    def rows(self, count: int, width: int) -> torch.Tensor:
        """[count, width] fp32 of sizes from small to large, none with a mean of zero."""
        scales = torch.logspace(-2, 1, count)[:, None]
        return self._device.put((torch.randn(count, width, generator=self._random) + 0.3) * scales)


def _agree(ours: torch.Tensor, its: torch.Tensor) -> bool:
    if ours.shape != its.shape or ours.dtype != its.dtype:
        return False
    return bool(((ours - its).abs() <= _NEAR * its.abs() + 1e-6 * its.abs().max()).all())
