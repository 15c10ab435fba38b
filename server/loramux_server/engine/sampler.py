"""Chooses the next token of each sequence from its logits. Each row is worked on alone, with its own random numbers."""

from __future__ import annotations

import hashlib
import math
import os

import torch

from loramux_server.engine.sequence import NOT_FINITE, SampledToken, SamplingParams, Sequence, TokenLogprob
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

    def sample(self, logits: torch.Tensor, sequences: list[Sequence]) -> list[SampledToken]:
        """One token for each row of logits [rows, vocabulary], in order; `sequences` are the rows' owners.

        A row whose logits are not finite carries an error instead of a token.
        """
        greedy, finite = self._argmax(logits)
        sampled = []
        for row, sequence in enumerate(sequences):
            params = sequence.params
            if not finite[row]:
                sampled.append(SampledToken(-1, error=NOT_FINITE))
                continue
            if params.forced:
                token = params.forced[len(sequence.output)]
            else:
                token = greedy[row] if params.temperature == 0 else self._draw(logits[row].float(), sequence)
            logprob = None if params.logprobs is None else report_logprob(logits[row].float(), token, params.logprobs)
            digest = digest_of(logits[row].float()) if params.digests else None
            sampled.append(SampledToken(token, logprob, digest=digest))
        return sampled

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


def report_logprob(logits: torch.Tensor, token: int, top: int) -> TokenLogprob:
    """Log probability of `token` and of the `top` most likely tokens under the model's own distribution.

    logits: [vocabulary] fp32, before temperature and filters.
    """
    logprobs = logits.log_softmax(-1)
    likely: tuple[tuple[int, float], ...] = ()
    if top:
        values, tokens = logprobs.topk(min(top, logprobs.shape[-1]))
        likely = tuple(zip(tokens.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token, logprobs[token].item(), likely)
