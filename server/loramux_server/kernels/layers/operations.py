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
from functools import partial
from typing import Any

import torch
from torch import nn

from loramux_server.kernels.compiled.library import Compiled
from loramux_server.kernels.layers.experts import Experts, ExpertsTogether
from loramux_server.kernels.layers.fp32 import run_in_fp32
from loramux_server.kernels.layers.mixture import use_compiled_gates
from loramux_server.kernels.layers.packed_embedding import Widened, factor_of, widened
from loramux_server.kernels.layers.recognition import GatedMLP, RMSNorm, gate_and_up, last_layer, mlp_of, norm_of
from loramux_server.kernels.layers.routing import CompiledRouting

Forward = Callable[[torch.Tensor], torch.Tensor]

_KINDS = {"loramux_embedding": "embedding", "loramux_norm": "norm", "loramux_mlp": "MLP", "loramux_router": "router"}


@torch.no_grad()
def use_compiled_ops(model: Any, compiled: Compiled) -> None:
    """Has a base on the CPU compute in fp32, and gives its modules their compiled forward, in place. Inference only."""
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    keep = embedding.weight if embedding is not None and _widen(embedding) else None
    run_in_fp32(model, keep=keep)
    kernels = CompiledOps(compiled)
    routing = CompiledRouting(compiled)
    routing.use(model)
    use_compiled_gates(model, compiled, routing.sigmoid)
    for module in model.modules():
        if isinstance(module, Experts):
            module.gated = partial(kernels.gated_dense, gelu=module.form.gelu)
            module.together = ExpertsTogether(module, compiled)
        if not kernels.use_mlp(module):
            kernels.use_norm(module)


def compiled_ops(model: nn.Module) -> str:
    """What runs on them, for the start-up report and the numerics id: "30 MLPs, 1 embedding, 61 norms"; "none"."""
    counts = Counter(kind for module in model.modules() if (kind := kernel_of(module)))
    return ", ".join(f"{n} {kind}{'s' if n > 1 else ''}" for kind, n in sorted(counts.items())) or "none"


def kernel_of(module: nn.Module) -> str | None:
    """Which of them a module runs on: "embedding", "norm", "MLP", "router"; None if its own code."""
    return next((kind for name, kind in _KINDS.items() if name in module.__dict__), None)


def _give(module: nn.Module, forward: Forward, **mark: Any) -> None:
    module.__dict__.update(mark, forward=forward)  # beside nn.Module's own registers


def _widen(module: Any) -> bool:
    """Whether a token embedding of bf16 gives its numbers in fp32 from now on; else its own code does what it does."""
    factor = factor_of(module)
    if factor is not None:
        _give(module, partial(widened, module.weight, factor), loramux_embedding=Widened(factor))
    return factor is not None


class CompiledOps:
    """The formulas that modules are compared with (recognition.py), by the kernels that take their place."""

    multiple = 16  # a vector

    def __init__(self, compiled: Compiled) -> None:
        self._norm = compiled.function("loramux_exact_rms_norm")
        self._gate = compiled.function("loramux_exact_gate")
        self._isa = compiled.isa

    def use_norm(self, module: Any) -> None:
        norm = norm_of(module, self)
        if norm is not None:
            _give(module, self._norm_forward(norm, module.forward), loramux_norm=norm)

    def use_mlp(self, module: Any) -> bool:
        found = mlp_of(module, self)
        if found is None:
            return False
        _give(module, self._mlp_forward(module, found), loramux_mlp=found)
        return True

    def norm(self, norm: RMSNorm, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        y = torch.empty_like(x)
        dim, threads = len(norm.weight), torch.get_num_threads()
        places = (tensor.data_ptr() for tensor in (y, x, norm.weight))
        self._norm(*places, x.numel() // dim, dim, norm.eps, self._isa, threads)
        return y

    def gated(self, g: torch.Tensor, u: torch.Tensor, gelu: bool) -> torch.Tensor:
        """Rows dense, or halves of dense rows."""
        dim = g.shape[-1]
        y = torch.empty(g.shape)
        places = (tensor.data_ptr() for tensor in (y, g, u))
        self._gate(*places, g.numel() // dim, dim, g.stride(-2), gelu, self._isa, torch.get_num_threads())
        return y

    def gated_dense(self, g: torch.Tensor, u: torch.Tensor, *, gelu: bool) -> torch.Tensor:
        """Rows that lie anyhow."""
        return self.gated(g.contiguous(), u.contiguous(), gelu)

    def _norm_forward(self, norm: RMSNorm, own: Forward) -> Forward:
        if not len(norm.weight):
            return self._plain_norm_forward(norm, own)

        def forward(x: torch.Tensor) -> torch.Tensor:
            return self.norm(norm, x) if x.dtype == torch.float32 else own(x)

        return forward

    def _plain_norm_forward(self, norm: RMSNorm, own: Forward) -> Forward:
        """Of one that multiplies with nothing."""
        ones = torch.empty(0)

        def forward(x: torch.Tensor) -> torch.Tensor:
            nonlocal ones
            width = x.shape[-1]
            if x.dtype != torch.float32 or width % self.multiple:
                return own(x)
            if len(ones) != width:
                ones = torch.ones(width)
            return self.norm(RMSNorm(ones, norm.eps), x)

        return forward

    def _mlp_forward(self, module: Any, found: GatedMLP) -> Forward:
        own = module.forward

        def forward(x: torch.Tensor) -> torch.Tensor:
            if x.dtype != torch.float32:
                other: torch.Tensor = own(x)
                return other
            return last_layer(module, found, self.gated(*gate_and_up(module, found, x), found.gelu))

        return forward
