"""`sample` by PyTorch's operations: every ask is answered by sorting its whole row. A graph can hold it.

Semantics: those of `sample_reference`, with weights as the device computes them.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from loramux_server.kernels.decoder.asks import MOST_LIKELY
from loramux_server.kernels.gpu import sampling_kernels as kernels
from loramux_server.kernels.gpu.sampling import SamplingTables, weights_of

_AT_ONCE = 16  # asks: some 40 bytes for each of their logits


def sample(launch: Any, tables: SamplingTables, logits: torch.Tensor, asks: int) -> None:
    for first in range(0, asks, _AT_ONCE):
        some = slice(first, min(first + _AT_ONCE, asks))
        _answer(tables.asks[some], tables.answers[some], logits)


def _answer(asks: torch.Tensor, answers: torch.Tensor, logits: torch.Tensor) -> None:
    """asks [n, 5] and answers [n, 23] int64, which hold numbers of several kinds as sampling.py lays them out."""
    numbers = asks.view(torch.int32)
    # An ask that asks nothing may hold anything: its numbers must not lead out of the tensors.
    last = logits.shape[1] - 1
    row, token, top = numbers[:, 6], numbers[:, 8].clamp(max=last), numbers[:, 9]
    own = logits[row.clamp(0, len(logits) - 1).long()]  # [n, vocabulary]
    ordered, order = own.sort(dim=1, descending=True, stable=True)  # of equal ones the lower token is the first
    largest, greedy = ordered[:, :1], order[:, 0]
    finite = largest[:, 0].isfinite() & ~own.isnan().any(1)
    drawn = _drawn(asks, own - largest, order)
    chosen = torch.where(token >= 0, token.long(), torch.where(asks.view(torch.float32)[:, 4] > 0, drawn, greedy))

    total = weights_of(own - largest).sum(1)
    log_sum = largest[:, 0].double() + (total * 2.0**-kernels.UNIT_BITS).log()
    logprobs = (ordered[:, :MOST_LIKELY].double() - log_sum[:, None]).float()
    listed = torch.arange(logprobs.shape[1], device=own.device) < top[:, None]
    behind = MOST_LIKELY - logprobs.shape[1]  # of a small vocabulary
    likeliest = torch.where(listed, order[:, :MOST_LIKELY], -1)
    likeliest = torch.nn.functional.pad(likeliest, (0, behind), value=-1)
    logprobs = torch.where(listed, logprobs, -math.inf)
    logprobs = torch.nn.functional.pad(logprobs, (0, behind), value=-math.inf)
    logprob = (own.gather(1, chosen[:, None])[:, 0].double() - log_sum).float()

    asked = (row >= 0)[:, None]
    whole = answers.view(torch.int32)
    told = [greedy[:, None], finite[:, None], chosen[:, None], likeliest]
    for at, values in zip(((0, 1), (1, 2), (2, 3), (6, 26)), told, strict=True):
        _write(whole[:, slice(*at)], values.int(), asked)
    for at, values in (((3, 4), logprob[:, None]), ((26, 46), logprobs)):
        _write(answers.view(torch.float32)[:, slice(*at)], values, asked)
    _write(answers.view(torch.float64)[:, 2:3], log_sum[:, None], asked)


def _write(to: torch.Tensor, values: torch.Tensor, asked: torch.Tensor) -> None:
    to.copy_(torch.where(asked, values, to))


def _drawn(asks: torch.Tensor, distance: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """The token [n] that each ask draws; distance [n, vocabulary] to the largest logit, order [n, vocabulary]"""
    exact, single, numbers = asks.view(torch.float64), asks.view(torch.float32), asks.view(torch.int32)
    uniform, top_p = exact[:, 0], exact[:, 1]
    last = order.shape[1] - 1
    factor, cut, top_k = single[:, 4:5], single[:, 5:6], numbers[:, 7].long().clamp(0, last)
    distance = distance * factor
    weights = weights_of(distance)
    kept = torch.where(distance >= cut, weights, 0)
    by_token, by_order = kept.cumsum(1), weights.gather(1, order).cumsum(1)

    limit = torch.where(top_k > 0, by_order.gather(1, (top_k - 1).clamp(min=0)[:, None])[:, 0], by_order[:, -1])
    needed = torch.minimum((top_p * limit.double()).ceil().long(), limit)
    nucleus = (by_order < needed[:, None]).sum(1, keepdim=True).clamp(max=last)
    limit = torch.where(top_p < 1.0, by_order.gather(1, nucleus)[:, 0], limit)
    limit = torch.minimum(limit, by_token[:, -1])

    in_order = (top_k > 0) | (top_p < 1.0)
    limit = torch.where(in_order, limit, by_token[:, -1])
    threshold = torch.minimum((uniform * limit.double()).long(), limit - 1)[:, None]
    by_order_at = (by_order <= threshold).sum(1, keepdim=True).clamp(max=last)
    by_token_at = (by_token <= threshold).sum(1).clamp(max=last)
    return torch.where(in_order, order.gather(1, by_order_at)[:, 0], by_token_at)
