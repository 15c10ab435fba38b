"""What a layer's experts lie in where it is more than a router and them: experts that every row goes through too.

Most such blocks of transformers' add a gated MLP beside the experts: it is one as any, and their own code adds it. Two
kinds are computed here instead, in the place of the block:

    y = experts(x) + sigmoid(gate(x)) * shared(x)       Qwen2-MoE: a gate of one output
    y = sum_j expert_j(sigmoid(s_j) * x) + shared(x)    Llama 4: what experts read is weighted, not what they give

because a sigmoid of PyTorch's has other last bits at the end of a batch than within, and because an expert here takes
the rows that were chosen for it, and transformers' Llama 4 gives every row to every expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

from loramux_server.kernels.compiled.library import Compiled
from loramux_server.kernels.layers.packed_head import PackedHead, head_fits
from loramux_server.kernels.layers.routing import Routed

Sigmoid = Callable[[torch.Tensor], torch.Tensor]


class SharedGate(nn.Linear):
    """The gate of one output, kept in 16 bits as routers are; a linear layer as any to adapters."""


class GatedMixture(nn.Module):
    """Experts, and one for every row that a gate of its own weighs. Its parts have the names of Qwen2-MoE.

    Attributes:
        sigmoid: of every number of a dense tensor; compiled code where there is some.
    """

    def __init__(self, block: Any) -> None:
        """`block`: transformers' own, on the meta device, with `Experts`."""
        super().__init__()
        self.gate, self.experts, self.shared_expert = block.gate, block.experts, block.shared_expert
        own = block.shared_expert_gate
        self.shared_expert_gate: nn.Module = SharedGate(
            own.in_features, own.out_features, bias=own.bias is not None, dtype=own.weight.dtype, device="meta"
        )
        self.sigmoid: Sigmoid = torch.sigmoid

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [batch, rows, width], and what it gives."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        _, weights, experts = self.gate(flat)
        factor = self.sigmoid(self.shared_expert_gate(flat).contiguous()).to(flat.dtype)
        total: torch.Tensor = self.experts(flat, experts, weights) + factor * self.shared_expert(flat)
        return total.view_as(hidden)


class InputRouter(nn.Module):
    """Llama 4's router, which is no linear layer to adapters: which experts, and what their rows are multiplied by."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        own = block.router
        self.top_k = int(own.top_k)
        self.weight = nn.Parameter(torch.empty_like(own.weight), requires_grad=False)

    def forward(self, x: torch.Tensor) -> Routed:
        """x [rows, width]."""
        scores = functional.linear(x, self.weight)
        best, experts = scores.topk(self.top_k, dim=-1)
        return scores, best.float().sigmoid(), experts


class InputMixture(nn.Module):
    """Experts of rows that were weighted before, and one for every row. Its parts have the names of Llama 4."""

    def __init__(self, block: Any) -> None:
        """`block`: transformers' own, on the meta device, with `Experts`."""
        super().__init__()
        self.router, self.experts, self.shared_expert = InputRouter(block), block.experts, block.shared_expert

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden [batch, rows, width] -> ([batch * rows, width], scores [batch * rows, experts])."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        scores, weights, experts = self.router(flat)
        total: torch.Tensor = self.shared_expert(flat)
        whole = torch.ones_like(weights[:, :1])
        for weight, expert in zip(weights.to(flat.dtype).split(1, dim=1), experts.split(1, dim=1), strict=True):
            total = total + self.experts(flat * weight, expert, whole)
        return total, scores


def put_mixture(model: nn.Module, path: str) -> None:
    """Puts one of these in the place of a block that holds `Experts`, where it is of these kinds, in place."""
    block: Any = model.get_submodule(path)
    if isinstance(block, Llama4TextMoe):
        model.set_submodule(path, InputMixture(block))
    elif isinstance(getattr(block, "shared_expert_gate", None), nn.Linear):
        model.set_submodule(path, GatedMixture(block))


def use_compiled_gates(model: nn.Module, compiled: Compiled, sigmoid: Sigmoid) -> None:
    """Has the gates of a base in host memory computed by compiled code, in place."""
    for block in model.modules():
        if isinstance(block, GatedMixture):
            gate: Any = block.shared_expert_gate
            dense = nn.Linear(gate.in_features, gate.out_features, bias=gate.bias is not None, device="meta")
            dense.weight = nn.Parameter(gate.weight.detach().to(torch.bfloat16).contiguous(), requires_grad=False)
            if head_fits(dense):
                block.shared_expert_gate = PackedHead.of(dense, compiled)
            block.sigmoid = sigmoid
