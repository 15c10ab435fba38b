"""A loaded base's norms, gated MLPs and output head on compiled CPU kernels, where these do what its own code does.

transformers computes a norm in eight operations and an activation in two; between small products their calls cost more
than their numbers. Each kernel takes the place of a module's own `forward` only after it was tried on that module: all
values within the last bit of bf16, nearly all of them equal. Other modules, and other inputs, keep their own code.

Semantics, rounding to bf16 where written: norm(x) = bf16(w * bf16(x / sqrt(mean(x^2) + eps))), mlp(x) =
down(bf16(bf16(silu(gate(x))) * up(x))), head(x) = bf16(x W^T) with sums in fp32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from loramux_server.kernels.abi import Isa
from loramux_server.kernels.native import NativeLibrary

_MARK = "loramux_kernel"  # attribute of a module whose forward is ours: which kernel
_LAST_BIT = 2.0**-7  # relative; bf16 has 8 bits
_EQUAL = 0.99  # share of values that must be equal to the last bit

Forward = Callable[[torch.Tensor], torch.Tensor]


@torch.no_grad()
def use_compiled_ops(model: nn.Module, library: NativeLibrary, isa: Isa) -> None:
    """Gives modules of a base on the CPU their compiled forward, in place. Inference only."""
    kernels = _CompiledOps(library, isa)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for module in model.modules():
        found = kernels.for_module(module, is_head=module is head)
        if found is not None:
            name, forward = found
            module.__dict__.update({_MARK: name, "forward": forward})  # beside nn.Module's own registers


def compiled_ops(model: nn.Module) -> str:
    """What runs on them, for the start-up report and the numerics id: "30 MLPs, 1 head, 61 norms"; "none"."""
    counts = Counter(kind for module in model.modules() if (kind := kernel_of(module)))
    return ", ".join(f"{n} {kind}{'s' if n > 1 else ''}" for kind, n in sorted(counts.items())) or "none"


def kernel_of(module: nn.Module) -> str | None:
    """Which of them a module runs on: "norm", "MLP", "head"; None if its own code."""
    kernel: str | None = module.__dict__.get(_MARK)
    return kernel


class _CompiledOps:
    def __init__(self, library: NativeLibrary, isa: Isa) -> None:
        self._norm = library.function("loramux_rms_norm")
        self._silu = library.function("loramux_silu_mul")
        self._head = library.function("loramux_head") if isa is Isa.AVX512_BF16 else None
        self._random = torch.Generator().manual_seed(0)

    def for_module(self, module: nn.Module, *, is_head: bool) -> tuple[str, Forward] | None:
        """(kernel, forward) if one does what the module does."""
        if is_head:
            return self._for_head(module)
        if {"gate_proj", "up_proj", "down_proj", "act_fn"} <= module._modules.keys():
            return self._for_mlp(module)
        return self._for_norm(module)

    def _for_norm(self, module: Any) -> tuple[str, Forward] | None:
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if list(module._parameters) != ["weight"] or module._modules or not isinstance(eps, float):
            return None
        weight, own = module.weight, module.forward
        if weight.dim() != 1 or weight.dtype != torch.bfloat16:
            return None
        dim, call, at = weight.shape[0], self._norm, weight.data_ptr()

        def forward(x: torch.Tensor) -> torch.Tensor:
            if x.dtype != torch.bfloat16 or not x.is_contiguous():
                other: torch.Tensor = own(x)
                return other
            y = torch.empty_like(x)
            call(y.data_ptr(), x.data_ptr(), at, x.numel() // dim, dim, eps, torch.get_num_threads())
            return y

        x = self._inputs(8, dim)
        return ("norm", forward) if _agree(forward(x), own(x)) else None

    def _for_mlp(self, module: Any) -> tuple[str, Forward] | None:
        gate, up, down, call, own = module.gate_proj, module.up_proj, module.down_proj, self._silu, module.forward

        def gated(g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
            y = torch.empty_like(g)
            width = g.shape[-1]
            call(y.data_ptr(), g.data_ptr(), u.data_ptr(), g.numel() // width, width, torch.get_num_threads())
            return y

        def forward(x: torch.Tensor) -> torch.Tensor:
            if x.dtype != torch.bfloat16:
                other: torch.Tensor = own(x)
                return other
            # by name: a layer may have been wrapped since
            y: torch.Tensor = module.down_proj(gated(module.gate_proj(x), module.up_proj(x)))
            return y

        if not all(isinstance(layer, nn.Linear) and layer.bias is None for layer in (gate, up, down)):
            return None
        g, u = self._inputs(8, gate.out_features), self._inputs(8, gate.out_features)
        x = self._inputs(4, gate.in_features)
        ours, its = forward(x).float(), own(x).float()
        if not _agree(gated(g, u), module.act_fn(g) * u) or (ours - its).norm() > 0.01 * its.norm():
            return None
        return "MLP", forward

    def _for_head(self, module: Any) -> tuple[str, Forward] | None:
        if type(module) is not nn.Linear or module.bias is not None or self._head is None:
            return None
        weight, own, call = module.weight, module.forward, self._head
        if weight.dtype != torch.bfloat16 or not weight.is_contiguous():
            return None
        (columns, dim), at = weight.shape, weight.data_ptr()

        def forward(x: torch.Tensor) -> torch.Tensor:
            if x.dtype != torch.bfloat16 or not x.is_contiguous():
                other: torch.Tensor = own(x)
                return other
            y = x.new_empty(*x.shape[:-1], columns)
            call(y.data_ptr(), x.data_ptr(), at, x.numel() // dim, dim, columns, torch.get_num_threads())
            return y

        x = self._inputs(5, dim)
        return ("head", forward) if _agree(forward(x), own(x)) else None

    def _inputs(self, rows: int, width: int) -> torch.Tensor:
        """[rows, width] bf16 of sizes from small to large, none with a mean of zero."""
        scales = torch.logspace(-2, 1, rows)[:, None]
        return ((torch.randn(rows, width, generator=self._random) + 0.3) * scales).bfloat16()


def _agree(ours: torch.Tensor, its: torch.Tensor) -> bool:
    if ours.shape != its.shape or ours.dtype != its.dtype:
        return False
    a, b = ours.float(), its.float()
    near = (a - b).abs() <= _LAST_BIT * b.abs() + 1e-6 * b.abs().max()
    return bool(near.all()) and float((ours == its).float().mean()) >= _EQUAL
