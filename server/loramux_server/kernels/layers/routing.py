"""Which experts a row goes through, and with what weights: recognized in transformers' routers, by kernels of our own.

Semantics, for a row x in fp32: s = x @ w.T (+ bias); its experts are the k with the largest s, of equal ones the first.
Their weights are softmax(s) over all experts, divided by their sum where the model normalizes them, which is softmax
over the chosen ones. On the compiled kernels w lies in whole numbers of 12 bits, as an output head does, and no other
function than theirs lies between a row and its choice: so it is the same alone and in company, and on every processor.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from loramux_server.errors import BaseModelError
from loramux_server.kernels.compiled.library import Compiled
from loramux_server.kernels.layers.experts import Experts
from loramux_server.kernels.layers.packed_head import PackedHead, head_fits
from loramux_server.kernels.layers.recognition import inputs

# (scores, weights, experts), as transformers' routers give them
Routed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
_TRIED = 16
_NEAR = 1e-4
_SCORE = 4.0


@dataclass(frozen=True, slots=True)
class Router:
    """Attribute `loramux_router` of a router.

    Attributes:
        chosen: experts of a row.
        normalized: their weights add up to one.
    """

    chosen: int
    normalized: bool

    def route(self, scores: torch.Tensor, softmax: Callable[[torch.Tensor], torch.Tensor]) -> Routed:
        """From the scores [rows, experts] fp32 of all experts."""
        ordered, experts = scores.sort(dim=-1, descending=True, stable=True)
        best, experts = ordered[:, : self.chosen], experts[:, : self.chosen]
        weights = softmax(best.contiguous()) if self.normalized else softmax(scores).gather(1, experts)
        return scores, weights, experts


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
    random = torch.Generator().manual_seed(0)
    tried = {
        name: torch.randn(own.shape, generator=random) for name, own in module._parameters.items() if own is not None
    }
    x = inputs(_TRIED, module.weight.shape[1])
    x *= _SCORE / functional.linear(x, tried["weight"]).abs().amax(1, keepdim=True)  # no softmax of them rounds to zero
    scores = functional.linear(x, tried["weight"], tried.get("bias"))
    few = copy.copy(module)
    few.__dict__["_parameters"] = {name: nn.Parameter(own, requires_grad=False) for name, own in tried.items()}
    theirs = few(x)
    for normalized in (True, False):
        router = Router(module.top_k, normalized)
        _, weights, experts = router.route(scores, lambda part: part.softmax(-1))
        if torch.equal(experts, theirs[2]) and torch.allclose(weights, theirs[1].float(), rtol=_NEAR, atol=_NEAR):
            return router
    raise BaseModelError(f"the base's {path} ({type(module).__name__}) chooses experts in a way that is not served")


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
        for path, module in routers_of(model):
            router = router_of(path, module)
            module.__dict__.update(loramux_router=router, forward=self._forward(path, module, router))

    def softmax(self, x: torch.Tensor) -> torch.Tensor:
        """Of each row [rows, count] fp32."""
        y = torch.empty_like(x)
        self._softmax(y.data_ptr(), x.data_ptr(), *x.shape, self._compiled.isa, torch.get_num_threads())
        return y

    def _forward(self, path: str, module: Any, router: Router) -> Callable[[torch.Tensor], Routed]:
        experts, width = module.weight.shape
        dense = nn.Linear(width, experts, bias=False, device="meta")
        dense.weight = nn.Parameter(module.weight.detach().to(torch.bfloat16).contiguous(), requires_grad=False)
        if not head_fits(dense):
            raise BaseModelError(f"the base's {path} takes rows of {width} numbers, and not of a multiple of 64")
        packed = PackedHead.of(dense, self._compiled)
        bias = getattr(module, "bias", None)

        def forward(x: torch.Tensor) -> Routed:
            scores = packed(x.reshape(-1, width))
            scores = scores.contiguous() if bias is None else scores + bias
            return router.route(scores, self.softmax)

        return forward
