"""Logits -> the next token of each sequence, and log probabilities. Each row alone, with its own random numbers."""

from __future__ import annotations

import hashlib
import os
import time
from itertools import accumulate
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch

from loramux_server.engine.logit_rules import LogitRules
from loramux_server.engine.scheduling.sequence import (
    NOT_FINITE,
    NOTHING_ALLOWED,
    RowResult,
    ScheduledSequence,
    Sequence,
    TokenLogprob,
)
from loramux_server.errors import GrammarFailed, MaskLate
from loramux_server.kernels.compiled.logit_changes import MOST_CHANGES, RowChange
from loramux_server.kernels.compiled.sampling import Draw, Sampling, logprobs_of
from loramux_server.kernels.decoder.asks import Ask

MASK_PATIENCE = 0.005  # seconds that one step waits for the masks of all of its rows together
_MASK = (1 << 64) - 1


class Sampler:
    """Owner: the engine thread. It knows what was counted of replies whose params say `changes_logits`, and a secret of
    this process, which gives sequences without a seed one that nobody can guess.

    The n-th token of a sequence uses the n-th number of the stream that its seed gives, so the same seed gives the same
    reply whatever else is in the batch.
    """

    def __init__(self, sampling: Sampling) -> None:
        self._secret = os.urandom(32)
        self._sampling = sampling
        self._rules: WeakKeyDictionary[Sequence, LogitRules] = WeakKeyDictionary()

    def results(
        self, logits: torch.Tensor, rows: list[ScheduledSequence], first: list[int] | None = None
    ) -> list[RowResult]:
        """One for each row. A row with logits that are not finite, or for which nothing may be chosen, carries an error
        and nothing else. One whose grammar has not said yet what may come is late.

        Args:
            logits: [sum of `num_logits`, vocabulary], in order of the rows.
            first: the first largest of each row of finite logits, which then mean nothing; -1 where it is in the
                logits. Only for rows that `asks_first_token`.
        """
        greedy, finite = self._search(logits, first)
        starts = list(accumulate((row.num_logits for row in rows), initial=0))
        asked = [
            (start, row)
            for start, row in zip(starts, rows, strict=False)
            if all(finite[start : start + row.num_logits])
        ]
        chosen, failed = self._choose(logits, greedy, asked)
        asked = [(start, row) for start, row in asked if start not in failed]
        questions = [_questions(start, row, chosen) for start, row in asked]
        answers = iter(_answers(self._sampling, logits, greedy, [one for each in questions for one in each]))
        answered = {start: [next(answers) for _ in each] for (start, _), each in zip(asked, questions, strict=True)}
        results = []
        for start, row in zip(starts, rows, strict=False):
            if start not in answered:
                results.append(RowResult(error=failed.get(start, NOT_FINITE), is_impossible=start in failed))
                continue
            found, params, last = answered[start], row.sequence.params, start + row.num_logits - 1
            if last not in chosen:
                results.append(RowResult(is_late=row.samples, scores=found))
                continue
            logprob = found.pop(0) if params.logprobs is not None else None
            digest = digest_of(logits[last].float()) if params.digests else None
            results.append(RowResult(chosen[last], logprob, digest=digest, scores=found))
        return results

    def change(self, at: int, row: ScheduledSequence, vocabulary: int, deadline: float) -> RowChange | None:
        """How row `at` of the logits is changed before the next token of a sequence is chosen; None: it is not.

        Args:
            deadline: of `time.monotonic`, until when its grammar's mask is waited for.
        Raises:
            GrammarFailed: no token may follow within its grammar, or it takes too long to say which.
            MaskLate: the mask is not there; this may be asked again.
        """
        if not row.sequence.params.changes_logits:
            return None
        unknown = row.reply_index - len(row.sequence.output)
        patience = max(0.0, deadline - time.monotonic())
        return self._rules_of(row.sequence, vocabulary).change(at, unknown, patience)

    def ask(self, at: int, row: ScheduledSequence) -> Ask:
        """How the next token of a sequence is chosen, by whomever; `at`: its row of the logits."""
        params = row.sequence.params
        if params.forced:
            return Ask(at, token=params.forced[row.reply_index], top=params.logprobs)
        draw = None if params.temperature == 0 else self._draw(at, row)
        return Ask(at, draw, top=params.logprobs)

    def _search(self, logits: torch.Tensor, first: list[int] | None) -> tuple[list[int], list[bool]]:
        unknown = [row for row, token in enumerate(first or []) if token < 0]
        if first is None or len(unknown) == len(first):
            return self._sampling.search(logits)
        greedy, finite = list(first), [True] * len(first)
        if unknown:
            for row, token, is_finite in zip(unknown, *self._sampling.search(logits[unknown]), strict=True):
                greedy[row], finite[row] = token, is_finite
        return greedy, finite

    def _choose(
        self, logits: torch.Tensor, greedy: list[int], asked: list[tuple[int, ScheduledSequence]]
    ) -> tuple[dict[int, int], dict[int, str]]:
        """(row of the logits -> the token that is chosen from it; first row of a sequence -> why none can be).

        A row whose mask is not there is in neither.
        """
        deadline = mask_deadline()
        chosen: dict[int, int] = {}
        failed: dict[int, str] = {}
        draws: list[Draw] = []
        changes: list[tuple[int, Ask, RowChange]] = []
        for start, row in asked:
            if not row.samples:
                continue
            ask = self.ask(start + row.num_logits - 1, row)
            try:
                change = self.change(ask.row, row, logits.shape[1], deadline)
            except GrammarFailed as failure:
                failed[start] = str(failure)
                continue
            except MaskLate:
                continue
            if change is not None:
                changes.append((start, ask, change))
                continue
            if ask.token is not None:
                chosen[ask.row] = ask.token
            elif ask.draw is None:
                chosen[ask.row] = greedy[ask.row]
            else:
                draws.append(ask.draw)
        if draws:
            drawn = self._sampling.draw(logits, draws)
            chosen.update((draw.row, token) for draw, token in zip(draws, drawn, strict=True))
        for first in range(0, len(changes), MOST_CHANGES):
            self._choose_changed(logits, changes[first : first + MOST_CHANGES], chosen, failed)
        return chosen, failed

    def _choose_changed(
        self,
        logits: torch.Tensor,
        changes: list[tuple[int, Ask, RowChange]],
        chosen: dict[int, int],
        failed: dict[int, str],
    ) -> None:
        """The same for rows that are changed before: (first row of the sequence, what is asked, how it is changed)."""
        changed = self._sampling.changed(logits, [change for _, _, change in changes])
        draws: list[Draw] = []
        for at, (start, ask, _), first, possible in zip(
            range(len(changes)), changes, *self._sampling.search(changed), strict=True
        ):
            if not possible:
                failed[start] = NOTHING_ALLOWED
            elif ask.draw is None:
                chosen[ask.row] = first
            else:
                draws.append(ask.draw._replace(row=at))
        if draws:
            for draw, token in zip(draws, self._sampling.draw(changed, draws), strict=True):
                chosen[changes[draw.row][1].row] = token

    def _rules_of(self, sequence: Sequence, vocabulary: int) -> LogitRules:
        rules = self._rules.get(sequence)
        if rules is None:
            rules = self._rules[sequence] = LogitRules(sequence, vocabulary)
        return rules

    def _draw(self, at: int, row: ScheduledSequence) -> Draw:
        params = row.sequence.params
        number = uniform(self._seed(row.sequence), row.reply_index)
        return Draw(at, number, params.temperature, params.top_k, params.top_p, params.min_p)

    def _seed(self, sequence: Sequence) -> int:
        if sequence.params.seed is not None:
            return sequence.params.seed
        return int.from_bytes(hashlib.blake2b(sequence.id.encode(), key=self._secret, digest_size=8).digest(), "big")


def mask_deadline() -> float:
    """Of `time.monotonic`: until when a step that begins to wait for its masks now does so."""
    return time.monotonic() + MASK_PATIENCE


def asks_first_token(row: ScheduledSequence) -> bool:
    """Whether nothing but the first largest of its logits is asked for."""
    params = row.sequence.params
    chosen = row.samples and row.num_scored == 0 and params.temperature == 0 and not params.forced
    return chosen and params.logprobs is None and not params.digests and not params.changes_logits


class Question(NamedTuple):
    """What is asked of the model's own distribution, before temperature and filters.

    Attributes:
        row: of the logits.
        top: how many of the likeliest tokens are reported beside the one that it is about.
    """

    row: int
    token: int
    top: int


def _questions(start: int, row: ScheduledSequence, chosen: dict[int, int]) -> list[Question]:
    """What is reported of one scheduled sequence: of the token that is chosen, then of text that it scores.

    start: the first of its rows of the logits.
    """
    params, last = row.sequence.params, start + row.num_logits - 1
    questions = scored(row, last)
    if last in chosen and params.logprobs is not None:
        questions.insert(0, Question(last, chosen[last], params.logprobs))
    return questions


def scored(row: ScheduledSequence, last: int) -> list[Question]:
    """What is asked of the text that a scheduled sequence scores, in the order of `scored_at`; `last`: its last row of
    the logits.
    """
    sequence, end = row.sequence, row.first + row.num_tokens
    questions = []
    for position in range(end - row.num_scored, end):
        top = sequence.params.prompt_logprobs or 0 if position < len(sequence.prompt) - 1 else 0
        questions += [Question(last - (end - 1 - position), token, top) for token in sequence.scored_at(position)]
    return questions


def _answers(
    sampling: Sampling, logits: torch.Tensor, greedy: list[int], questions: list[Question]
) -> list[TokenLogprob]:
    """In the order of the questions."""
    if not questions:
        return []
    wanted: dict[int, int] = {}
    for asked in questions:
        wanted[asked.row] = max(asked.top, wanted.get(asked.row, 0))
    sums = dict(zip(wanted, sampling.log_sums(logits, list(wanted)), strict=True))
    first: dict[int, list[int]] = dict.fromkeys(wanted, [])
    for count in set(wanted.values()) - {0}:
        rows = [row for row, its in wanted.items() if its == count]
        first.update(zip(rows, sampling.first_tokens(logits, rows, count), strict=True))
    told = [(asked.row, token) for asked in questions for token in (asked.token, *first[asked.row][: asked.top])]
    logprobs = iter(logprobs_of(logits, [row for row, _ in told], [token for _, token in told], sums))
    answers = []
    for asked in questions:
        logprob = next(logprobs)
        beside = tuple((token, next(logprobs)) for token in first[asked.row][: asked.top])
        answers.append(TokenLogprob(asked.token, logprob, beside, asked.token == greedy[asked.row]))
    return answers


def digest_of(logits: torch.Tensor) -> bytes:
    """The same for the same bits of logits [vocabulary] fp32, and for no others; what pads a row is no part of it."""
    return hashlib.blake2b(logits.cpu().numpy().tobytes(), digest_size=16).digest()


def uniform(seed: int, index: int) -> float:
    """Number `index` in [0, 1) of the stream of `seed`: SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return ((z ^ (z >> 31)) >> 11) * 2.0**-53
