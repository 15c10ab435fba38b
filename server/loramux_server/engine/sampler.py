"""Logits -> the next token of each sequence, and log probabilities. Each row alone, with its own random numbers."""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import replace

import torch

from loramux_server.engine.sequence import (
    NOT_FINITE,
    RowResult,
    SamplingParams,
    ScheduledSequence,
    Sequence,
    TokenLogprob,
)
from loramux_server.kernels.argmax import Argmax

_SORTED = 1024  # top-p looks at this many tokens first; only where they do not reach p is the whole row sorted
_MASK = (1 << 64) - 1


class Sampler:
    """Stateless but for a secret of this process, which gives sequences without a seed one that nobody can guess.

    The n-th token of a sequence uses the n-th number of the stream that its seed gives, so the same seed gives the same
    reply whatever else is in the batch.
    """

    def __init__(self, argmax: Argmax) -> None:
        self._secret = os.urandom(32)
        self._argmax = argmax

    def results(self, logits: torch.Tensor, rows: list[ScheduledSequence]) -> list[RowResult]:
        """One for each row. logits: [sum of `num_logits`, vocabulary], in order of the rows.

        A row with logits that are not finite carries an error and nothing else.
        """
        greedy, finite = self._argmax(logits)
        results, start = [], 0
        for row in rows:
            end = start + row.num_logits
            if all(finite[start:end]):
                result = self._choose(logits[end - 1], greedy[end - 1], row.sequence) if row.samples else RowResult()
                if row.num_scored:
                    scored = slice(end - row.num_scored, end)
                    result = replace(result, scores=score(logits[scored], greedy[scored], row))
            else:
                result = RowResult(error=NOT_FINITE)
            results.append(result)
            start = end
        return results

    def _choose(self, logits: torch.Tensor, greedy: int, sequence: Sequence) -> RowResult:
        """logits: [vocabulary]; `greedy`: the first of the largest."""
        params = sequence.params
        if params.forced:
            token = params.forced[len(sequence.output)]
        else:
            token = greedy if params.temperature == 0 else self._draw(logits.float(), sequence)
        logprob = None
        if params.logprobs is not None:
            logprob = report_logprob(logits.float().log_softmax(-1), token, params.logprobs, greedy)
        digest = digest_of(logits.float()) if params.digests else None
        return RowResult(token, logprob, digest=digest)

    def _draw(self, logits: torch.Tensor, sequence: Sequence) -> int:
        params = sequence.params
        seed = params.seed
        if seed is None:
            seed = int.from_bytes(
                hashlib.blake2b(sequence.id.encode(), key=self._secret, digest_size=8).digest(), "big"
            )
        values, tokens = candidates(logits.cpu() / params.temperature, params)
        mass = values.double().softmax(-1).cumsum(-1)
        threshold = uniform(seed, len(sequence.output)) * mass[-1].item()
        # the last entry may round below the threshold; the draw must stay inside the candidates
        index = min(int(torch.searchsorted(mass, threshold, right=True)), mass.shape[0] - 1)
        return index if tokens is None else int(tokens[index])


def digest_of(logits: torch.Tensor) -> bytes:
    """The same for the same bits of logits [vocabulary] fp32, and for no others."""
    return hashlib.blake2b(logits.cpu().numpy().tobytes(), digest_size=16).digest()


def uniform(seed: int, index: int) -> float:
    """Number `index` in [0, 1) of the stream of `seed`: SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return ((z ^ (z >> 31)) >> 11) * 2.0**-53


def candidates(logits: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The logits that may be drawn from: (values [n], token ids [n]); ids None means the whole vocabulary in order.

    Filters apply in the order top-k, top-p, min-p, each on what the one before has left.
    """
    values: torch.Tensor = logits
    tokens: torch.Tensor | None = None
    if 0 < params.top_k < values.shape[0]:
        values, tokens = values.topk(params.top_k)
    if params.top_p < 1.0:
        values, order = _nucleus(values, params.top_p)
        tokens = order if tokens is None else tokens[order]
    if params.min_p > 0.0:
        kept = (values >= values.max() + math.log(params.min_p)).nonzero().flatten()
        values = values[kept]
        tokens = kept if tokens is None else tokens[kept]
    return values, tokens


def _nucleus(values: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The fewest largest of `values` [n] whose probability reaches `top_p`: (values, their indices)."""
    total = values.double().logsumexp(-1)
    count = min(_SORTED, values.shape[0])
    while True:
        largest, order = values.topk(count)
        below = int(((largest.double() - total).exp().cumsum(-1) < top_p).sum())
        if below < count or count == values.shape[0]:
            return largest[: below + 1], order[: below + 1]
        count = values.shape[0]


def score(logits: torch.Tensor, greedy: list[int], row: ScheduledSequence) -> list[TokenLogprob]:
    """Log probabilities of given text, in the order of `Sequence.scored_at`.

    logits: [num_scored, vocabulary], at the row's last positions; `greedy`: the first of the largest of each.
    """
    sequence, end = row.sequence, row.first + row.num_tokens
    logprobs = logits.float().log_softmax(-1)
    found = []
    for index, position in enumerate(range(end - row.num_scored, end)):
        top = sequence.params.prompt_logprobs or 0 if position < len(sequence.prompt) - 1 else 0
        for token in sequence.scored_at(position):
            found.append(report_logprob(logprobs[index], token, top, greedy[index]))
    return found


def report_logprob(logprobs: torch.Tensor, token: int, top: int, greedy: int) -> TokenLogprob:
    """What is reported of `token`, and of the `top` most likely tokens beside it.

    logprobs: [vocabulary] fp32, of the model's own distribution, before temperature and filters.
    """
    likely: tuple[tuple[int, float], ...] = ()
    if top:
        values, tokens = logprobs.topk(min(top, logprobs.shape[-1]))
        likely = tuple(zip(tokens.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token, logprobs[token].item(), likely, token == greedy)
