"""Which experts a row goes through, and with what weights: recognized in transformers' routers, by kernels of our own.

Semantics, for a row x in fp32: s = x @ w.T (+ bias), and p = softmax(s) over all experts, or sigmoid(s). Its experts
are the k with the largest s, of equal ones the first; where experts have corrections c, or lie in groups, those with
the largest p + c in the groups that are best by their largest p + c, or by the sum of their two largest. Their weights
are p, divided by their sum where the model normalizes them, times a factor. On the compiled kernels w lies in whole
numbers of 12 bits, as an output head does, and no other function than theirs lies between a row and its choice: so it
is the same alone and in company, and on every processor.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from loramux_server.errors import BaseModelError
from loramux_server.kernels.compiled.library import Compiled
from loramux_server.kernels.layers.experts import Experts
from loramux_server.kernels.layers.packed_head import PackedHead, head_fits
from loramux_server.kernels.layers.recognition import inputs

# (scores, weights, experts), as transformers' routers give them
Routed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Softmax = Callable[[torch.Tensor], torch.Tensor]
_TRIED = 16  # rows at random, and for each two ways of choosing that differ
_LOOKED_AT = 1024  # rows, for those that tell ways of choosing apart
_NONZERO = 64  # numbers of such a row
_SHIFTS = (
    0.0,
    -3.0,
)  # of corrections: where all are below zero, what takes the place of groups that do not count shows
_CORRECTION = 0.3  # size of a correction, so that shares count as well
_NEAR = 1e-4
_SCORE = 4.0
_GROUPS = (("num_group", "topk_group"), ("n_group", "topk_group"))  # names of how many there are, and of how many count
CORRECTIONS = "e_score_correction_bias"  # name of a router's parameter or buffer
_PLAIN = (bool, int, float, str)
_SMALLEST = 1e-20  # that weights are divided by


@dataclass(frozen=True, slots=True)
class Router:
    """Attribute `loramux_router` of a router.

    Attributes:
        chosen: experts of a row.
        normalized: their weights add up to one, before `factor`.
        sigmoid: an expert's p is the sigmoid of its score; else the softmax over all.
        corrected: experts have corrections that count where they are chosen, and not in their weights.
        groups: that experts lie in, of equal size, and how many of them count; (1, 1): there are none.
        two: groups are compared by the sum of their two best; else by their best.
        factor: multiplies the weights.
    """

    chosen: int
    normalized: bool
    sigmoid: bool = False
    corrected: bool = False
    groups: tuple[int, int] = (1, 1)
    two: bool = False
    factor: float = 1.0

    @property
    def is_plain(self) -> bool:
        """Whether it is told by `chosen` and `normalized`."""
        return self == Router(self.chosen, self.normalized)

    def route(self, scores: torch.Tensor, softmax: Softmax, corrections: torch.Tensor | None = None) -> Routed:
        """From the scores [rows, experts] fp32 of all experts. `corrections`: [experts] fp32, where it has some."""
        by_scores = not self.corrected and self.groups == (1, 1)
        shares = None if by_scores and self.normalized and not self.sigmoid else self._shares(scores, softmax)
        ordered = scores
        if not by_scores:
            assert shares is not None
            ordered = self._in_groups(shares if corrections is None else shares + corrections)
        best, experts = (part[:, : self.chosen] for part in ordered.sort(dim=-1, descending=True, stable=True))
        if shares is None:
            weights = softmax(best.contiguous())
        else:
            weights = shares.gather(1, experts)
            if self.normalized:
                weights = weights / _sums(weights).clamp(min=_SMALLEST)
        return scores, weights if self.factor == 1.0 else weights * self.factor, experts

    def _shares(self, scores: torch.Tensor, softmax: Softmax) -> torch.Tensor:
        return sigmoid_by(softmax, scores) if self.sigmoid else softmax(scores)

    def _in_groups(self, values: torch.Tensor) -> torch.Tensor:
        """Minus infinity for experts [rows, experts] of groups that do not count."""
        count, kept = self.groups
        if count == 1:
            return values
        grouped = values.view(len(values), count, -1)
        best = grouped.sort(dim=-1, descending=True, stable=True).values
        worth = best[..., 0] + best[..., 1] if self.two else best[..., 0]
        counts = torch.zeros_like(worth, dtype=torch.bool)
        counts.scatter_(1, worth.sort(dim=-1, descending=True, stable=True).indices[:, :kept], True)
        kept_alone: torch.Tensor = grouped.masked_fill(~counts[..., None], float("-inf"))
        return kept_alone.view(values.shape)


def _sums(weights: torch.Tensor) -> torch.Tensor:
    """Of each row [rows, few], in order: [rows, 1]."""
    total = weights[:, :1]
    for rank in range(1, weights.shape[1]):
        total = total + weights[:, rank : rank + 1]
    return total


def sigmoid_by(softmax: Softmax, x: torch.Tensor) -> torch.Tensor:
    """Of every number, by a softmax over it and zero."""
    pairs = torch.stack([x.reshape(-1), torch.zeros(x.numel(), device=x.device)], dim=1)
    return softmax(pairs)[:, 0].view(x.shape)


def routers_of(model: nn.Module) -> list[tuple[str, Any]]:
    """(path, module) of all that choose for `Experts`."""
    found = []
    for path, block in model.named_modules():
        if any(isinstance(child, Experts) for child in block.children()):
            found += [
                (f"{path}.{name}", child)
                for name, child in block.named_children()
                if not isinstance(child, Experts) and isinstance(getattr(child, "top_k", None), int)
            ]
    return found


@torch.no_grad()
def router_of(path: str, module: Any) -> Router:
    """What a router computes, whatever its weights. Raises BaseModelError: something else than is known here."""
    name = _corrections(module)
    possible = list(_possible(module, corrected=name is not None))
    left = {(router, factor) for router in possible for factor in _factors(module)}
    for seed, shift in enumerate(_SHIFTS):
        random = torch.Generator().manual_seed(seed)
        tried = {
            its: torch.randn(own.shape, generator=random)
            for its, own in (*module.named_parameters(), *module.named_buffers())
        }
        corrections = None
        if name is not None:
            tried[name] = tried[name] * _CORRECTION + shift
            corrections = tried[name].flatten()
        x = _telling(possible, tried["weight"], tried.get("bias"), corrections, seed)
        scores = functional.linear(x, tried["weight"], tried.get("bias"))
        theirs = _by_number(*functional_call(module, tried, (x,))[1:])
        for router in possible:
            ours = _by_number(*router.route(scores, _softmax, corrections)[1:])
            same = torch.equal(ours[1], theirs[1])
            for factor in _factors(module):
                near = same and torch.allclose(ours[0] * factor, theirs[0].float(), rtol=_NEAR, atol=_NEAR)
                if not near:
                    left.discard((router, factor))
    found = next((pair for pair in itertools.product(possible, _factors(module)) if pair in left), None)
    if found is None:
        raise BaseModelError(f"the base's {path} ({type(module).__name__}) chooses experts in a way that is not served")
    return replace(found[0], factor=found[1])


def _factors(module: Any) -> tuple[float, ...]:
    """That weights may be multiplied by."""
    return tuple(dict.fromkeys((1.0, float(getattr(module, "routed_scaling_factor", None) or 1.0))))


def _softmax(x: torch.Tensor) -> torch.Tensor:
    return x.softmax(-1)


def _telling(
    possible: list[Router],
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    corrections: torch.Tensor | None,
    seed: int,
) -> torch.Tensor:
    """Rows [some, width] for a router of these numbers: some at random, and some for each two of `possible` that choose
    other experts, of which most rows may tell nothing: groups, or how they are compared, seldom count where most of
    them are kept.
    """
    width = weight.shape[1]
    few = min(width, _NONZERO)
    ways = list({(router.sigmoid, router.groups, router.two): router for router in possible}.values())
    x = inputs(_LOOKED_AT, few, seed)
    x *= _SCORE / functional.linear(x, weight[:, :few]).abs().amax(1, keepdim=True)  # no softmax of them rounds to zero
    scores = functional.linear(x, weight[:, :few], bias)
    chosen = [_by_number(*router.route(scores, _softmax, corrections)[1:])[1] for router in ways]
    rows = set(range(0, _LOOKED_AT, _LOOKED_AT // _TRIED))
    for one, other in itertools.combinations(chosen, 2):
        rows.update((one != other).any(1).nonzero().flatten()[:_TRIED].tolist())
    return functional.pad(x[sorted(rows)], (0, width - few))


def _possible(module: Any, *, corrected: bool) -> Iterator[Router]:
    groups = next(
        (
            (getattr(module, all_of_them), getattr(module, kept))
            for all_of_them, kept in _GROUPS
            if isinstance(getattr(module, all_of_them, None), int) and isinstance(getattr(module, kept, None), int)
        ),
        (1, 1),
    )
    in_groups = [((1, 1), False)]
    if groups != (1, 1):
        size = module.weight.shape[0] // groups[0]
        in_groups += [(groups, False), *([(groups, True)] if size > 1 else [])]
    for sigmoid, normalized in itertools.product((False, True), (True, False)):
        for its, two in in_groups:
            yield Router(module.top_k, normalized, sigmoid, corrected, its, two)


def _corrections(module: nn.Module) -> str | None:
    """The name of a router's corrections."""
    names = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    return next((name for name in names if name.rpartition(".")[2] == CORRECTIONS), None)


def _by_number(weights: torch.Tensor, experts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A row's weights and experts in the order of the experts' numbers."""
    ordered, places = experts.sort(dim=-1)
    return weights.gather(1, places), ordered


class CompiledRouting:
    """Routers on the compiled CPU kernels."""

    def __init__(self, compiled: Compiled) -> None:
        self._compiled = compiled
        self._softmax = compiled.function("loramux_exact_softmax")

    def use(self, model: nn.Module) -> None:
        """Gives every router of a base in fp32 a forward of its own, in place.

        Raises:
            BaseModelError: one is not known here.
        """
        known: dict[Any, Router] = {}  # by all that tells one of a model's routers from another, but for its numbers
        for path, module in routers_of(model):
            numbers = ((name, own.shape) for name, own in (*module.named_parameters(), *module.named_buffers()))
            settings = ((name, value) for name, value in vars(module).items() if isinstance(value, _PLAIN))
            told = (type(module), *numbers, *settings)
            router = known[told] = known.get(told) or router_of(path, module)
            module.__dict__.update(loramux_router=router, forward=self._forward(path, module, router))

    def softmax(self, x: torch.Tensor) -> torch.Tensor:
        """Of each row [rows, count] fp32."""
        y = torch.empty_like(x)
        self._softmax(y.data_ptr(), x.data_ptr(), *x.shape, self._compiled.isa, torch.get_num_threads())
        return y

    def sigmoid(self, x: torch.Tensor) -> torch.Tensor:
        """Of every number of a dense tensor in fp32."""
        return sigmoid_by(self.softmax, x)

    def _forward(self, path: str, module: Any, router: Router) -> Callable[[torch.Tensor], Routed]:
        experts, width = module.weight.shape
        dense = nn.Linear(width, experts, bias=False, device="meta")
        dense.weight = nn.Parameter(module.weight.detach().to(torch.bfloat16).contiguous(), requires_grad=False)
        if not head_fits(dense):
            raise BaseModelError(f"the base's {path} takes rows of {width} numbers, and not of a multiple of 64")
        packed = PackedHead.of(dense, self._compiled)
        module.__dict__["loramux_scores"] = packed  # for the whole step
        bias = getattr(module, "bias", None)
        name = _corrections(module)
        corrections = None
        if router.corrected and name is not None:
            corrections = (
                (dict(module.named_parameters()) | dict(module.named_buffers()))[name].detach().float().flatten()
            )

        def forward(x: torch.Tensor) -> Routed:
            scores = packed(x.reshape(-1, width))
            scores = scores.contiguous() if bias is None else scores + bias
            return router.route(scores, self.softmax, corrections)

        return forward
