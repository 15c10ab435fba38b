"""What the parts of a transformers model between its linear layers compute: recognized by trying them.

Modules of many families look alike and differ in a detail (a one added to a norm's weight, another activation), so each
is given numbers and compared with the formulas below. What is recognized is noted on the module, for a whole step to
be made from (decoder/description.py):

    loramux_embedding   embedding(t) = factor * w[t]
    loramux_norm        norm(x) = w * x / sqrt(mean(x^2) + eps), where w already holds the one that some models add
    loramux_mlp         mlp(x) = down(activation(gate(x)) * up(x))
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional

from loramux_adapters.device.cpu import CpuDevice
from loramux_adapters.device.device import Device
from loramux_server.kernels.layers.packed_embedding import Widened, factor_of

_CPU = CpuDevice()
_PLAIN = 64  # numbers of a row that a norm without a weight is tried on
_NEAR = 1e-5  # relative difference of the same numbers, summed in another order
_NEAR_PRODUCT = {
    torch.float32: 1e-3,
    torch.bfloat16: 2e-2,
    torch.float16: 5e-3,
}  # of a whole MLP, by what it computes in


# names of a gated MLP's linear layers, and of its activation
_MLPS: tuple[tuple[str, ...], ...] = (
    ("gate_up_proj", "down_proj"),
    ("gate_proj", "up_proj", "down_proj"),
    ("input_linear", "output_linear"),
)
_ACTIVATIONS = ("act_fn", "activation_fn", "activation")


@dataclass(frozen=True, slots=True)
class RMSNorm:
    """Attribute `loramux_norm` of a norm: what it multiplies with [dim] fp32, and its epsilon.

    One that takes rows of any width and multiplies them with nothing (Llama 4's, of queries and keys) has [0].
    """

    weight: torch.Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class GatedMLP:
    """Attribute `loramux_mlp` of an MLP.

    Attributes:
        gelu: its activation is GELU by tanh, else SiLU.
        layers: names of its linear layers, as one of _MLPS has them.
    """

    gelu: bool
    layers: tuple[str, ...]

    @property
    def fused(self) -> bool:
        """Whether one layer gives both, the gate first; else there are two."""
        return len(self.layers) == 2


class Formulas(Protocol):
    """Who computes what modules are compared with.

    Attributes:
        multiple: of numbers that it takes at once; rows of other widths it does not compute.
    """

    multiple: int

    def norm(self, norm: RMSNorm, x: torch.Tensor) -> torch.Tensor:
        """x [rows, dim] fp32."""
        ...

    def gated(self, g: torch.Tensor, u: torch.Tensor, gelu: bool) -> torch.Tensor:
        """activation(g) * u of rows [..., dim] fp32."""
        ...


class TensorFormulas:
    """By PyTorch."""

    multiple = 1

    def norm(self, norm: RMSNorm, x: torch.Tensor) -> torch.Tensor:
        return norm.weight * (x * (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt())

    def gated(self, g: torch.Tensor, u: torch.Tensor, gelu: bool) -> torch.Tensor:
        return (functional.gelu(g, approximate="tanh") if gelu else functional.silu(g)) * u


def norm_of(module: Any, formulas: Formulas) -> RMSNorm | None:
    """What a norm in fp32 on the CPU computes; None for other modules, and for what it is not."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if module._modules or not isinstance(eps, float):
        return None
    if not module._parameters and not module._buffers:
        return _plain_norm_of(module, eps, formulas)
    if list(module._parameters) != ["weight"] or module.weight is None:
        return None
    weight = module.weight
    if weight.dim() != 1 or len(weight) % formulas.multiple or weight.dtype != torch.float32:
        return None
    x = inputs(8, len(module.weight))
    expected = module.forward(x)
    for one in (0.0, 1.0):
        norm = RMSNorm((module.weight.detach() + one).contiguous(), eps)
        if _agree(formulas.norm(norm, x), expected, expected):
            return norm
    return None


def _plain_norm_of(module: Any, eps: float, formulas: Formulas) -> RMSNorm | None:
    """Of one without a weight, whose rows may have any width."""
    x = inputs(8, _PLAIN)
    try:
        expected = module.forward(x)
    except (TypeError, ValueError, RuntimeError):  # it is no norm, and takes something else
        return None
    if not isinstance(expected, torch.Tensor):
        return None
    same = _agree(formulas.norm(RMSNorm(torch.ones(_PLAIN), eps), x), expected, expected)
    return RMSNorm(torch.empty(0), eps) if same else None


def mlp_of(
    module: Any, formulas: Formulas, dtype: torch.dtype = torch.float32, device: Device = _CPU
) -> GatedMLP | None:
    """What an MLP computes; None for other modules. `dtype`: of its rows; `device`: where its layers lie."""
    activation = next((module._modules[name] for name in _ACTIVATIONS if name in module._modules), None)
    names: tuple[str, ...] = next((names for names in _MLPS if names[0] in module._modules), ())
    layers = [module._modules.get(name) for name in names]
    if activation is None or not layers or not all(isinstance(layer, nn.Linear) for layer in layers):
        return None
    gate, down = module._modules[names[0]], module._modules[names[-1]]
    inner = down.in_features
    if inner % formulas.multiple or gate.out_features != inner * (1 + (len(names) == 2)):
        return None
    g, u = inputs(8, inner), inputs(8, inner, seed=1)
    expected = activation(g) * u
    for gelu in (False, True):
        found = GatedMLP(gelu, names)
        if _agree(formulas.gated(g, u, gelu), expected, g * u) and _whole(module, found, formulas, dtype, device):
            return found
    return None


def gate_and_up(module: Any, found: GatedMLP, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What an MLP's layers give; by name, since a layer may have been wrapped since."""
    gates = [getattr(module, name)(x).contiguous() for name in found.layers[:-1]]
    g, u = gates[0].chunk(2, dim=-1) if found.fused else gates
    return g, u


def last_layer(module: Any, found: GatedMLP, x: torch.Tensor) -> torch.Tensor:
    """Of an MLP, by name as well: x [rows, inner] -> [rows, outer]."""
    y: torch.Tensor = getattr(module, found.layers[-1])(x)
    return y


def _whole(module: Any, found: GatedMLP, formulas: Formulas, dtype: torch.dtype, device: Device) -> bool:
    """Whether the module as a whole computes this."""
    put, take = device.put, device.take
    x = put(inputs(4, getattr(module, found.layers[0]).in_features).to(dtype))
    its = take(module.forward(x))
    g, u = (take(part).float() for part in gate_and_up(module, found, x))
    ours = take(last_layer(module, found, put(formulas.gated(g, u, found.gelu).to(dtype))))
    return bool((ours - its).norm() <= _NEAR_PRODUCT[dtype] * its.norm())


@torch.no_grad()
def recognize(model: Any, device: Device) -> None:
    """Notes on the modules of a base on a device what they compute. They keep their own code. Inference only."""
    formulas = TensorFormulas()
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    factor = None if embedding is None else factor_of(embedding)
    if factor is not None:
        embedding.__dict__["loramux_embedding"] = Widened(factor)
    with device.used():
        for module in model.modules():
            if (mlp := mlp_of(module, formulas, model.dtype, device)) is not None:
                module.__dict__["loramux_mlp"] = mlp
            elif "weight" in module._parameters and not isinstance(module, (nn.Linear, nn.Embedding)):
                norm = norm_of(_in_fp32(module, device), formulas)
                if norm is not None:
                    module.__dict__["loramux_norm"] = RMSNorm(device.put(norm.weight), norm.eps)


def _in_fp32(module: nn.Module, device: Device) -> nn.Module:
    """A copy in host memory."""
    held = copy.deepcopy(module)
    for parameter in held.parameters():
        parameter.data = device.take(parameter.data).float()
    return held


def inputs(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    """[rows, width] fp32 of sizes from small to large, none with a mean of zero."""
    scales = torch.logspace(-2, 1, rows)[:, None]
    return (torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) + 0.3) * scales


def _agree(ours: torch.Tensor, its: torch.Tensor, size: torch.Tensor) -> bool:
    """Whether both are the same numbers, up to some of the last bits of theirs and of `size`."""
    if ours.shape != its.shape or ours.dtype != its.dtype:
        return False
    return bool(((ours - its).abs() <= _NEAR * its.abs() + 1e-6 * size.abs()).all())
