"""A loaded base's embedding, norms and gated MLPs on compiled CPU kernels, where these do what its own code does.

transformers computes a norm in six operations and an activation in two; between small products their calls cost more
than their numbers, and PyTorch's own differ in the last bits with the instruction set. Each kernel takes the place of a
module's own `forward` only after it was tried on that module. Other modules, and other inputs, keep their own code.

Semantics, all in fp32: embedding(t) = factor * w[t], norm(x) = w * x / sqrt(mean(x^2) + eps), where w already holds the
one that some models add to their weight, mlp(x) = down(activation(gate(x)) * up(x)). The whole compiled step
(csrc/exact/decoder.h) computes them by the same code, so both give the same bits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from loramux_server.kernels.compiled.library import Compiled
from loramux_server.kernels.layers.fp32 import run_in_fp32
from loramux_server.kernels.layers.packed_embedding import Widened, factor_of, widened

_VECTOR = 16  # widths are a multiple of this
_NEAR = 1e-5  # relative difference of the same numbers, summed in another order
_NEAR_PRODUCT = 1e-3  # of a whole MLP: a number that changes in the last bit may be rounded to another whole one

Forward = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class RMSNorm:
    """Attribute `loramux_norm` of a norm whose forward is ours: what it multiplies with [dim] fp32, and its epsilon."""

    weight: torch.Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class GatedMLP:
    """Attribute `loramux_mlp` of an MLP whose forward is ours.

    Attributes:
        gelu: its activation is GELU by tanh, else SiLU.
        fused: `gate_up_proj` gives both, the gate first; else there are `gate_proj` and `up_proj`.
    """

    gelu: bool
    fused: bool


_KINDS = {"loramux_embedding": "embedding", "loramux_norm": "norm", "loramux_mlp": "MLP"}


@torch.no_grad()
def use_compiled_ops(model: Any, compiled: Compiled) -> None:
    """Has a base on the CPU compute in fp32, and gives its modules their compiled forward, in place. Inference only."""
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    keep = embedding.weight if embedding is not None and _widen(embedding) else None
    run_in_fp32(model, keep=keep)
    kernels = _CompiledOps(compiled)
    for module in model.modules():
        if not kernels.use_mlp(module):
            kernels.use_norm(module)


def compiled_ops(model: nn.Module) -> str:
    """What runs on them, for the start-up report and the numerics id: "30 MLPs, 1 embedding, 61 norms"; "none"."""
    counts = Counter(kind for module in model.modules() if (kind := kernel_of(module)))
    return ", ".join(f"{n} {kind}{'s' if n > 1 else ''}" for kind, n in sorted(counts.items())) or "none"


def kernel_of(module: nn.Module) -> str | None:
    """Which of them a module runs on: "embedding", "norm", "MLP"; None if its own code."""
    return next((kind for name, kind in _KINDS.items() if name in module.__dict__), None)


def _give(module: nn.Module, forward: Forward, **mark: Any) -> None:
    module.__dict__.update(mark, forward=forward)  # beside nn.Module's own registers


def _widen(module: Any) -> bool:
    """Whether a token embedding of bf16 gives its numbers in fp32 from now on; else its own code does what it does."""
    factor = factor_of(module)
    if factor is not None:
        _give(module, partial(widened, module.weight, factor), loramux_embedding=Widened(factor))
    return factor is not None


class _CompiledOps:
    def __init__(self, compiled: Compiled) -> None:
        self._norm = compiled.function("loramux_exact_rms_norm")
        self._gate = compiled.function("loramux_exact_gate")
        self._isa = compiled.isa
        self._random = torch.Generator().manual_seed(0)

    def use_norm(self, module: Any) -> bool:
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if list(module._parameters) != ["weight"] or module._modules or not isinstance(eps, float):
            return False
        own = module.forward
        if module.weight.dim() != 1 or len(module.weight) % _VECTOR or module.weight.dtype != torch.float32:
            return False
        x = self._inputs(8, len(module.weight))
        expected = own(x)
        for one in (0.0, 1.0):
            norm = RMSNorm((module.weight.detach() + one).contiguous(), eps)
            forward = self._norm_forward(norm, own)
            if _agree(forward(x), expected, expected):
                _give(module, forward, loramux_norm=norm)
                return True
        return False

    def _norm_forward(self, norm: RMSNorm, own: Forward) -> Forward:
        dim, at, eps, call, isa = len(norm.weight), norm.weight.data_ptr(), norm.eps, self._norm, self._isa

        def forward(x: torch.Tensor) -> torch.Tensor:
            if x.dtype != torch.float32:
                return own(x)
            x = x.contiguous()
            y = torch.empty_like(x)
            call(y.data_ptr(), x.data_ptr(), at, x.numel() // dim, dim, eps, isa, torch.get_num_threads())
            return y

        return forward

    def use_mlp(self, module: Any) -> bool:
        """Modules look alike, so what they do is tried."""
        activation = module._modules.get("act_fn", module._modules.get("activation_fn"))
        fused = "gate_up_proj" in module._modules
        gates = ("gate_up_proj",) if fused else ("gate_proj", "up_proj")
        layers = [module._modules.get(name) for name in (*gates, "down_proj")]
        if activation is None or not all(isinstance(layer, nn.Linear) for layer in layers):
            return False
        inner = module.down_proj.in_features
        if inner % _VECTOR or layers[0].out_features != inner * (1 + fused):
            return False
        g, u = self._inputs(8, inner), self._inputs(8, inner)
        x = self._inputs(4, layers[0].in_features)
        expected, its = activation(g) * u, module.forward(x)
        for gelu in (False, True):
            if _agree(self._gated(g, u, gelu), expected, g * u):
                forward = self._mlp_forward(module, gelu, fused)
                if (forward(x) - its).norm() <= _NEAR_PRODUCT * its.norm():
                    _give(module, forward, loramux_mlp=GatedMLP(gelu, fused))
                    return True
        return False

    def _mlp_forward(self, module: Any, gelu: bool, fused: bool) -> Forward:
        own = module.forward

        def forward(x: torch.Tensor) -> torch.Tensor:
            if x.dtype != torch.float32:
                other: torch.Tensor = own(x)
                return other
            # by name: a layer may have been wrapped since
            if fused:
                g, u = module.gate_up_proj(x).contiguous().chunk(2, dim=-1)
            else:
                g, u = module.gate_proj(x).contiguous(), module.up_proj(x).contiguous()
            y: torch.Tensor = module.down_proj(self._gated(g, u, gelu))
            return y

        return forward

    def _gated(self, g: torch.Tensor, u: torch.Tensor, gelu: bool) -> torch.Tensor:
        """activation(g) * u of rows [..., dim], dense or halves of dense rows."""
        dim = g.shape[-1]
        y = torch.empty(g.shape)
        places = (tensor.data_ptr() for tensor in (y, g, u))
        self._gate(*places, g.numel() // dim, dim, g.stride(-2), gelu, self._isa, torch.get_num_threads())
        return y

    def _inputs(self, rows: int, width: int) -> torch.Tensor:
        """[rows, width] fp32 of sizes from small to large, none with a mean of zero."""
        scales = torch.logspace(-2, 1, rows)[:, None]
        return (torch.randn(rows, width, generator=self._random) + 0.3) * scales


def _agree(ours: torch.Tensor, its: torch.Tensor, size: torch.Tensor) -> bool:
    """Whether both are the same numbers, up to some of the last bits of theirs and of `size`."""
    if ours.shape != its.shape or ours.dtype != its.dtype:
        return False
    return bool(((ours - its).abs() <= _NEAR * its.abs() + 1e-6 * size.abs()).all())
