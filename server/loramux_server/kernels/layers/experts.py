"""The experts of a layer: gated MLPs of which each row goes through a few, weighted by its router.

Semantics: y[t] = sum_j w[t, j] * expert[e[t, j]](x[t]) in fp32, over the row's experts in the order that its router
gives them, with expert(x) = down(activation(gate(x)) * up(x)).

transformers keeps the experts of a layer in one tensor. Here each has three linear layers of its own, under the names
that checkpoints and adapters have for them ("experts.3.gate_proj"): they are quantized, kept and adapted as any other
layer is. The rows of a batch are grouped by expert, and each expert multiplies its rows at once; which rows are in a
group changes no bit of any of them. On the CPU all of it is one call (csrc/exact/experts.h), with the same bits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from loramux_adapters.lora.lora_linear import LoRALinear, PicksRows
from loramux_adapters.lora.ops import LoraRows
from loramux_server.kernels.compiled.abi import ExactExperts, ExactLinear, LoraArena
from loramux_server.kernels.compiled.adapter_kernels import arena_of, rows_of
from loramux_server.kernels.compiled.library import Compiled
from loramux_server.kernels.layers.nf4_linear import NF4Linear

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
        together: computes all of it in one call where there is one; with None, an expert after the other.
    """

    def __init__(self, form: ExpertForm, dtype: torch.dtype | None = None) -> None:
        super().__init__(Expert(form, dtype) for _ in range(form.count))
        self.form = form
        self.gated: Gated = _gelu_gated if form.gelu else _silu_gated
        self.together: ExpertsTogether | None = None

    def layers_changed(self) -> None:
        if self.together is not None:
            self.together.forget()

    def forward(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """
        Args:
            hidden: [rows, outer].
            index: [rows, chosen] int64: experts of each row.
            weights: [rows, chosen] of any float dtype.
        Returns:
            [rows, outer].
        """
        if self.together is not None:
            return self.together(hidden, index, weights, self._rows)
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


class ExpertsTogether:
    """The experts of a layer in one call of the compiled CPU kernels; `Experts`' own loop is its reference. Owner: the
    engine thread.
    """

    def __init__(self, experts: Experts, compiled: Compiled) -> None:
        """Every layer of `experts` is an NF4Linear, or will be before the first call."""
        self._experts = experts
        self._call = compiled.function("loramux_exact_experts")
        self._isa = compiled.isa
        self._exact: ExactExperts | None = None
        self._layers: ctypes.Array[ExactLinear] | None = None

    def forget(self) -> None:
        """Where the layers lie, or that adapters have no room beside them."""
        self._exact = self._layers = None

    def exact(self, chosen: int) -> ExactExperts:
        """As the compiled code reads them, `chosen` for a row: valid until `forget`."""
        if self._exact is None or self._exact.chosen != chosen:
            layers = [_exact_linear(getattr(expert, name)) for expert in self._experts for name in PROJECTIONS]
            self._layers = (ExactLinear * len(layers))(*layers)
            self._exact = exact_experts(self._experts.form, chosen, self._layers)
        return self._exact

    def __call__(
        self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, rows: LoraRows | None
    ) -> torch.Tensor:
        """As `Experts.forward`. `rows`: which adapters each row uses."""
        hidden_at, index, weights = hidden.float().contiguous(), index.contiguous(), weights.float().contiguous()
        y = torch.empty_like(hidden_at)
        exact, layers = self.exact(index.shape[1]), self._layers
        entries = None if rows is None else rows_of(rows)
        self._call(
            *(y.data_ptr(), hidden_at.data_ptr(), ctypes.addressof(exact), index.data_ptr(), weights.data_ptr()),
            *(None if entries is None else ctypes.addressof(entries), len(y), self._isa, torch.get_num_threads()),
        )
        assert layers is self._layers  # they are in use until here
        return y.to(hidden.dtype)


def exact_experts(form: ExpertForm, chosen: int, layers: ctypes.Array[ExactLinear]) -> ExactExperts:
    """Experts as compiled code reads them, as long as `layers` lives: gate, up and down of each."""
    return ExactExperts(
        layers=ctypes.addressof(layers),
        count=form.count,
        outer=form.outer,
        inner=form.inner,
        chosen=chosen,
        gelu=form.gelu,
        alpha=form.alpha,
        limit=form.limit,
        above=form.above,
    )


def _exact_linear(module: nn.Module) -> ExactLinear:
    """Of a layer with room for adapters beside it, or without."""
    layer, arena = module, LoraArena()
    if isinstance(module, LoRALinear):
        layer, arena = module.base_layer, arena_of(module.arena)
    assert isinstance(layer, NF4Linear)
    bias = None if layer.bias is None else layer.bias.data_ptr()
    places = (layer.weight.data_ptr(), layer.scales.data_ptr(), bias)
    return ExactLinear(*places, arena, layer.in_features, layer.out_features)


def _silu_gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return nn.functional.silu(gate) * up


def _gelu_gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return nn.functional.gelu(gate, approximate="tanh") * up
