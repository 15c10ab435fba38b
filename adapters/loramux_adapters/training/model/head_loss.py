"""The loss of the learned tokens with its gradient, a part of them at a time, straight from the output head.

A [tokens, vocabulary] matrix of logits is the largest tensor of a step, and PyTorch's loss makes several of its size.
Here logits of a part of the tokens become their gradients in place and go back through the head at once, so that never
more than `_MOST_BYTES` of them are there, and what is kept for the backward pass has the size of the hidden states.

Semantics: sum over tokens of -ln softmax(z)[label], z = softcap(factor * hidden @ W.T).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast

from loramux_adapters.device.device import Device
from loramux_adapters.training.model.ops import TrainingOps

_MOST_BYTES = 64 * 2**20  # of logits at once
_FEWEST = 16  # tokens at once, whatever they take


@runtime_checkable
class MultipliedHead(Protocol):
    """An output head that multiplies both ways; what is beyond the vocabulary is zero."""

    out_features: int
    padded: int

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, in] -> [rows, padded]."""

    def product_transposed(self, dy: torch.Tensor) -> torch.Tensor:
        """[rows, padded] -> [rows, in]."""


@dataclass(frozen=True, slots=True)
class HeadLoss:
    """The head of one model and what the model does with its logits; `softcap` 0 means none."""

    head: MultipliedHead
    ops: TrainingOps
    factor: float
    softcap: float

    def of(self, hidden: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, float, int]:
        """hidden [tokens, in], labels [tokens] -> the summed loss with its graph, and as a number; how many right."""
        apply: Any = _HeadLoss.apply
        total, loss, correct = apply(hidden, labels, self, torch.is_grad_enabled())
        return total, float(loss), int(correct)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, labels: torch.Tensor, how: HeadLoss, gradient: bool
    ) -> tuple[torch.Tensor, ...]:
        together = max(_FEWEST, _MOST_BYTES // (4 * how.head.padded))
        parts = -(-len(labels) // together)  # of nearly equal size
        slopes = torch.empty_like(hidden) if gradient else None
        loss, correct = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.int64)  # the host's
        for part in range(parts):
            own = slice(len(labels) * part // parts, len(labels) * (part + 1) // parts)
            logits = how.head.product(hidden[own])
            losses, said = how.ops.token_losses(
                logits,
                labels[own],
                how.head.out_features,
                factor=how.factor,
                softcap=how.softcap,
                gradient=gradient,
            )
            if slopes is not None:
                slopes[own] = how.head.product_transposed(logits)
            for value in losses.tolist():  # one after the other: a sum of PyTorch's has an order of its own
                loss += value
            correct += int(said.sum())
        ctx.slopes = slopes
        ctx.mark_non_differentiable(loss, correct)
        return loss.float(), loss, correct

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[Any, ...]:
        return ctx.slopes * grad, None, None, None


@torch.no_grad()
def head_loss(model: Any, ops: TrainingOps, device: Device) -> HeadLoss | None:
    """For a transformers model whose head multiplies both ways.

    None for another, and where a trial shows that the logits are not the head's, scaled and capped as the config says.
    """
    head, config = model.get_output_embeddings(), model.config
    if not isinstance(head, MultipliedHead):
        return None
    factor = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = float(getattr(config, "final_logit_softcapping", None) or 0.0)
    base = getattr(model, model.base_model_prefix)
    hidden = device.put(torch.randn(2, config.hidden_size, generator=torch.Generator().manual_seed(0)))
    tokens = device.put(torch.zeros(1, 2, dtype=torch.int64))
    base.forward = lambda *args, **kwargs: BaseModelOutputWithPast(last_hidden_state=hidden[None])
    try:
        theirs = model(input_ids=tokens, use_cache=False).logits[0].float()
    finally:
        del base.__dict__["forward"]
    ours = head.product(hidden)[:, : head.out_features] * factor
    ours = softcap * torch.tanh(ours / softcap) if softcap else ours
    return HeadLoss(head, ops, factor, softcap) if torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5) else None
