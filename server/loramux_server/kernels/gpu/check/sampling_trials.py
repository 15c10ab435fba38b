"""Trials of the kernels that choose tokens: every way to ask, and to change logits before, of the model's vocabulary.

Near enough: tokens are the same; draws stand where a last place of a weight does not change them. Log probabilities
are of sums whose error is below 10^-6.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from loramux_server.kernels.compiled.logit_changes import EDIT, RowChange, bits_of
from loramux_server.kernels.compiled.sampling import Draw
from loramux_server.kernels.decoder.asks import ANSWER, MOST_LIKELY, Ask
from loramux_server.kernels.gpu.changes import ChangeTables, adopt_reference, change_reference
from loramux_server.kernels.gpu.check.bench import Bench
from loramux_server.kernels.gpu.check.trial import KernelTrial, Near, Results
from loramux_server.kernels.gpu.cuts import ChangeSizes
from loramux_server.kernels.gpu.sampling import (
    ANSWER_WORDS,
    ASK_WORDS,
    LARGEST_VOCABULARY,
    SamplingSizes,
    SamplingTables,
    answers_of,
    fill,
    sample_reference,
)
from loramux_server.kernels.gpu.step.changes import StepChanges
from loramux_server.kernels.gpu.step.operations import Operation

_EXACT, _LOGS = Near(0.0, 0.0), Near(2.0**-19, 2.0**-19)
_EDITED = Near(2.0**-21, 2.0**-21)  # a product and a difference may be one operation
_CHANGED = 6  # rows
_MARGIN = 1e-5  # of a draw's number, within which its token is the same
_TRIES = 50  # to find such a number
_SPREAD = 3.0  # of the logits


def sample(bench: Bench) -> Iterator[KernelTrial]:
    vocabulary = bench.decoder.description.vocabulary
    if vocabulary > LARGEST_VOCABULARY:
        return
    likeliest = min(5, vocabulary)
    draws = [
        Draw(0, 0.0),
        Draw(0, 0.0, temperature=0.7, top_k=min(40, vocabulary)),
        Draw(0, 0.0, top_p=0.9),
        Draw(0, 0.0, temperature=1.3, top_k=min(300, vocabulary), top_p=0.8, min_p=0.001),
        Draw(0, 0.0, min_p=0.05),
    ]
    asks = [Ask(0), Ask(1, top=likeliest), Ask(2, token=vocabulary - 1, top=0)]
    asks += [Ask(3 + index, draw, top=likeliest) for index, draw in enumerate(draws)]
    asks.append(Ask(len(asks)))  # the row that is not finite
    logits = bench.normal(len(asks), vocabulary, size=_SPREAD, dtype=torch.float32)
    logits[0, vocabulary // 2 :] = logits[0, : vocabulary - vocabulary // 2].clone()  # equal logits: the first counts
    logits[-1, vocabulary - 2] = torch.inf
    trial = _Asked(bench, asks, logits)

    def run(operation: Operation, first: int, count: int) -> Results:
        return trial.answers(operation, trial.asks[first : first + count])

    def expected() -> Results:
        return trial.answers(lambda launch, *given: sample_reference(*given), trial.asks)

    what = f"{vocabulary} tokens"
    yield KernelTrial("sample", what, run, expected, [_EXACT, _LOGS], len(asks))


def change(bench: Bench) -> Iterator[KernelTrial]:
    """Rows with few and many edits, of which some are not finite, behind bits of all kinds."""
    vocabulary = bench.decoder.description.vocabulary
    if vocabulary > LARGEST_VOCABULARY:
        return
    random = np.random.default_rng(0)
    logits = bench.normal(_CHANGED, vocabulary, size=_SPREAD, dtype=torch.float32)
    logits[1, ::5] = -torch.inf
    changes = []
    for row, share in enumerate(np.linspace(0.0, 1.0, _CHANGED)):
        edits = np.zeros(min(vocabulary, 200), EDIT)
        edits["token"] = random.choice(vocabulary, len(edits), replace=False)
        edits["repeated"] = random.integers(0, 2, len(edits))
        edits["add"], edits["less"] = random.normal(0, _SPREAD, (2, len(edits)))
        edits["add"][::50] = np.inf, -np.inf, np.nan, 3e38
        allowed = bits_of(np.flatnonzero(random.random(vocabulary) < share).tolist(), vocabulary)
        forbidden = random.integers(0, vocabulary, row).astype(np.int32)
        changes.append(RowChange(row, edits, forbidden, None if row % 3 == 2 else allowed, 0.5 + 0.3 * row))

    def changed_by(operation: Operation, some: list[RowChange]) -> Results:
        changed = bench.untouched(len(some), vocabulary, dtype=torch.float32)
        step = StepChanges(bench.device, ChangeSizes(len(some), vocabulary), changed)
        return [step.run(operation, logits, some)]

    def run(operation: Operation, first: int, count: int) -> Results:
        return changed_by(operation, changes[first : first + count])

    def expected() -> Results:
        return changed_by(lambda launch, *given, **options: change_reference(*given, **options), changes)

    yield KernelTrial("change", f"{vocabulary} tokens", run, expected, [_EDITED], _CHANGED)


def adopt(bench: Bench) -> Iterator[KernelTrial]:
    """Answers about finite logits and others, with log probabilities and without, some of which nothing is left for."""
    vocabulary = bench.decoder.description.vocabulary
    if vocabulary > LARGEST_VOCABULARY:
        return
    logits = bench.normal(_CHANGED, vocabulary, size=_SPREAD, dtype=torch.float32)
    tokens = bench.whole(vocabulary, _CHANGED).tolist()

    def adopted(operation: Operation, rows: list[int]) -> Results:
        count = len(rows)
        sizes = ChangeSizes(count, vocabulary)
        numbers = bench.device.reserve((sizes.numbers,), torch.int32)
        tables = ChangeTables(sizes, numbers, bench.untouched(count, vocabulary, dtype=torch.float32))
        chosen, step = (_tables(bench, SamplingSizes(asks, vocabulary)) for asks in (count, count + 1))
        asks = np.zeros((count + 1, ASK_WORDS), np.int64)
        fill(asks, [Ask(0), *(Ask(row, top=None if row % 3 == 1 else 2) for row in reversed(rows))], vocabulary)
        told, own = np.zeros(count + 1, ANSWER), np.zeros(count, ANSWER)
        for at, row in enumerate(rows):
            own[at]["finite"], own[at]["chosen"] = row != 2, tokens[row]
            answer = told[count - at]
            answer["finite"], answer["log_sum"], answer["logprob"] = row != 4, 5.0 + row, -1.0
        step.asks.copy_(torch.from_numpy(asks))
        step.answers.copy_(torch.from_numpy(told.view(np.int64).reshape(count + 1, ANSWER_WORDS)))
        chosen.answers.copy_(torch.from_numpy(own.view(np.int64).reshape(count, ANSWER_WORDS)))
        tables.places.copy_(torch.arange(count, 0, -1, dtype=torch.int32))
        tables.rows.copy_(torch.tensor(rows, dtype=torch.int32))
        operation(bench.launch, tables, chosen, step, logits, count)
        found = answers_of(bench.device.take(step.answers).numpy())[:0:-1]
        whole = np.stack([found[name].astype(np.float64) for name in ("greedy", "finite", "chosen", "log_sum")], 1)
        return [torch.from_numpy(whole), torch.from_numpy(found["logprob"].astype(np.float64)[:, None])]

    def run(operation: Operation, first: int, count: int) -> Results:
        return adopted(operation, list(range(first, first + count)))

    def expected() -> Results:
        return adopted(lambda launch, *given: adopt_reference(*given), list(range(_CHANGED)))

    yield KernelTrial("adopt", f"{vocabulary} tokens", run, expected, [_EXACT, _EXACT], _CHANGED)


class _Asked:
    """Asks of rows of logits, and how they are answered.

    Attributes:
        asks: with numbers for the draws that leave no doubt about the token.
    """

    def __init__(self, bench: Bench, asks: list[Ask], logits: torch.Tensor) -> None:
        self._bench, self._logits = bench, logits
        self.asks = [ask if ask.draw is None else self._settled(ask, ask.draw) for ask in asks]

    def _settled(self, ask: Ask, draw: Draw) -> Ask:
        for _ in range(_TRIES):
            middle = _MARGIN + self._bench.uniform() * (1 - 2 * _MARGIN)
            near = [ask._replace(draw=draw._replace(uniform=middle + by)) for by in (-_MARGIN, 0.0, _MARGIN)]
            chosen = self.answers(lambda launch, *given: sample_reference(*given), near)[0][:, 2]
            if bool((chosen == chosen[0]).all()):
                break
        return near[1]

    def answers(self, operation: Operation, asks: list[Ask]) -> Results:
        """Tokens and logarithms of what was asked for, each [asks, any]; zeros elsewhere."""
        bench, vocabulary = self._bench, self._logits.shape[1]
        sizes = SamplingSizes(len(asks), vocabulary)
        staging = np.zeros((len(asks), ASK_WORDS), np.int64)
        fill(staging, asks, vocabulary)
        tables = _tables(bench, sizes)
        tables.asks.copy_(torch.from_numpy(staging))
        operation(bench.launch, tables, self._logits, len(asks))
        told = answers_of(bench.device.take(tables.answers).numpy())
        tokens, logs = np.zeros((len(asks), 3 + MOST_LIKELY)), np.zeros((len(asks), 2 + MOST_LIKELY))
        for ask, answer, whole, log in zip(asks, told, tokens, logs, strict=True):
            whole[1] = answer["finite"]
            if not answer["finite"]:
                continue
            whole[0], whole[2] = answer["greedy"], answer["chosen"]
            if ask.top is not None:
                whole[3 : 3 + ask.top] = answer["likeliest"][: ask.top]
                log[:2] = answer["log_sum"], answer["logprob"]
                log[2 : 2 + ask.top] = answer["logprobs"][: ask.top]
        return [torch.from_numpy(tokens), torch.from_numpy(logs)]


def _tables(bench: Bench, sizes: SamplingSizes) -> SamplingTables:
    asks, answers = (bench.device.reserve((sizes.asks, words), torch.int64) for words in (ASK_WORDS, ANSWER_WORDS))
    scratch = {name: bench.device.scratch((count,), dtype) for name, (count, dtype) in sizes.scratch().items()}
    return SamplingTables(sizes, asks, answers, scratch)
