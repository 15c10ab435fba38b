"""The experts of a layer: gated MLPs of which each row goes through a few, weighted by its router.

Semantics: y[t] = sum_j w[t, j] * expert[e[t, j]](x[t]) in fp32, over the row's experts in the order that its router
gives them, with expert(x) = down(activation(gate(x)) * up(x)).

transformers keeps the experts of a layer in one tensor. Here each has three linear layers of its own, under the names
that checkpoints and adapters have for them ("experts.3.gate_proj"): they are quantized, kept and adapted as any other
layer is. The rows of a batch are grouped by expert, and each expert multiplies its rows at once; which rows are in a
group changes no bit of any of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from loramux_adapters.lora.lora_linear import PicksRows

# (g [rows, inner], u [rows, inner]) -> activation(g) * u
Gated = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class ExpertForm:
    """What the experts of a layer are.

    Attributes:
        count: how many there are.
        outer, inner: numbers of a row outside and inside of an expert.
        bias: their layers have biases.
        gelu: the activation is GELU by tanh, else SiLU.
        alpha: activation(g) is silu(alpha * g) / alpha.
        limit: gates are cut off above it, and the other factor above it and below its negative; 0: none.
        above: is added to the other factor.
        interleaved, turned: how transformers keeps them: outputs of gate and up alternate; weights are [in, out].
    """

    count: int
    outer: int
    inner: int
    bias: bool = False
    gelu: bool = False
    alpha: float = 1.0
    limit: float = 0.0
    above: float = 0.0
    interleaved: bool = False
    turned: bool = False


class Expert(nn.Module):
    """One expert's layers; `Experts` runs it."""

    def __init__(self, form: ExpertForm, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(form.outer, form.inner, bias=form.bias, dtype=dtype)
        self.up_proj = nn.Linear(form.outer, form.inner, bias=form.bias, dtype=dtype)
        self.down_proj = nn.Linear(form.inner, form.outer, bias=form.bias, dtype=dtype)


class Experts(PicksRows, nn.ModuleList):
    """All experts of a layer, in the place of transformers' own module. Inference only.

    Attributes:
        gated: computes activation(g) * u; compiled code where there is some.
    """

    def __init__(self, form: ExpertForm, dtype: torch.dtype | None = None) -> None:
        super().__init__(Expert(form, dtype) for _ in range(form.count))
        self.form = form
        self.gated: Gated = _gelu_gated if form.gelu else _silu_gated

    def forward(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """
        Args:
            hidden: [rows, outer].
            index: [rows, chosen] int64: experts of each row.
            weights: [rows, chosen] of any float dtype.
        Returns:
            [rows, outer].
        """
        rows, chosen = index.shape
        flat = index.reshape(-1)
        order = flat.argsort(stable=True)
        counts = flat.bincount(minlength=len(self)).tolist()
        parts = hidden.new_empty(rows * chosen, hidden.shape[1], dtype=torch.float32)
        factors = weights.reshape(-1, 1).float()
        first = 0
        for expert, count in enumerate(counts):
            if not count:
                continue
            places = order[first : first + count]
            first += count
            parts[places] = self._expert(expert, hidden, places // chosen).float() * factors[places]
        each = parts.view(rows, chosen, -1)
        total = each[:, 0]
        for rank in range(1, chosen):
            total = total + each[:, rank]
        return total.to(hidden.dtype)

    def _expert(self, number: int, hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """What one expert gives for some rows."""
        expert: Any = self[number]
        form = self.form
        self.pick(rows, [expert.gate_proj, expert.up_proj, expert.down_proj])
        x = hidden[rows]
        gate, up = expert.gate_proj(x), expert.up_proj(x)
        if form.limit:
            gate, up = gate.clamp(max=form.limit), up.clamp(-form.limit, form.limit)
        if form.above:
            up = up + form.above
        if form.alpha != 1.0:
            gate = gate * form.alpha
        inner = self.gated(gate, up)
        if form.alpha != 1.0:
            inner = inner / form.alpha
        result: torch.Tensor = expert.down_proj(inner)
        return result


def _silu_gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return nn.functional.silu(gate) * up


def _gelu_gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return nn.functional.gelu(gate, approximate="tanh") * up
