"""Evaluates an adapter on held-out examples beside the bare base, the majority class and other adapters."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import fsum
from typing import Protocol, TypeVar

from loramux_adapters.evaluation.bootstrap import Difference, difference, gap
from loramux_adapters.evaluation.evaluated import Evaluation, Fidelity, Predictor, Role, ScoreComparison
from loramux_adapters.evaluation.labels import majority_of, truth_of
from loramux_adapters.evaluation.scores import (
    NO_LABEL,
    LabelTask,
    TokenScore,
    apart,
    mean_loss,
    text_features,
    text_scores,
)
from loramux_adapters.evaluation.verdict import judge
from loramux_adapters.training.data.conversation import Example
from loramux_adapters.training.data.examples import ExampleSet

T = TypeVar("T")

SLICE = 64  # examples between two reports of progress
FIDELITY_EXAMPLES = 8  # that are scored in fp32 as well

Progress = Callable[[str, int, int], None]  # what is being done, examples done, of how many


@dataclass(frozen=True, slots=True)
class Said:
    """What a scorer says of some examples, in their order; None where it cannot be had.

    Attributes:
        labels: [examples][labels] log probability that the label is the answer.
        tokens: the scores of each answer's own tokens.
        replies: the text of each greedy reply, cut behind the longest label.
    """

    labels: list[list[float]] | None
    tokens: list[list[TokenScore]] | None
    replies: list[str] | None


class Scorer(Protocol):
    """One adapter, or the bare base, that can be asked."""

    def ask(self, examples: Sequence[Example], labels: Sequence[str], *, reply: bool) -> Said:
        """Whatever can be had. `labels` may be empty; replies are given only with `reply` and labels."""


@dataclass(frozen=True, slots=True)
class Contender:
    """A predictor to be. `close` is called when it has answered everything."""

    name: str
    role: Role
    open: Callable[[], Scorer]
    close: Callable[[], None] = lambda: None


@dataclass(slots=True)
class _Answers:
    """What one contender said."""

    name: str
    role: Role
    by_logprob: list[int] | None = None
    by_generation: list[int] | None = None
    tokens: list[list[TokenScore]] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is evaluated on, in words, as `Evaluation` records it."""

    base: str
    base_id: str
    quantize: str
    from_gguf: bool
    numerics_id: str
    notes: tuple[str, ...] = field(default=())


def evaluate(
    held: ExampleSet,
    contenders: Sequence[Contender],
    subject: Subject,
    *,
    labels: tuple[str, ...],
    train: Sequence[Example] = (),
    exact: Contender | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Evaluation:
    """Asks everyone and compares.

    Args:
        contenders: the judged adapter first; one is open at a time.
        labels: from `labels_of`; empty scores the answers as text alone.
        train: training examples: their commonest label is the majority baseline, and the judged adapter is scored on
            as many of them as there are held-out ones, to see whether it overfits.
        exact: the judged adapter in fp32: scores the first few examples, to say how far what is served is from that.
    Raises:
        DataError: an example does not fit into the base's context.
    """
    began = time.monotonic()
    examples = held.examples
    known = [example for example in train if not labels or example.answer.strip() in labels]
    seen = _sample(known, len(examples))
    task = LabelTask(labels, truth_of(examples, labels)) if labels else None
    answers: list[_Answers] = []
    on_seen: _Answers | None = None
    for contender in contenders:
        scorer = contender.open()
        try:
            answers.append(_ask(contender, scorer, examples, labels, progress))
            if contender is contenders[0] and seen:
                on_seen = _ask(
                    contender,
                    scorer,
                    seen,
                    labels,
                    progress,
                    suffix=", training examples",
                    reply=answers[0].by_logprob is None,
                )
        finally:
            contender.close()
    fidelity = _fidelity(answers[0], exact, examples[:FIDELITY_EXAMPLES], labels, progress) if exact else None
    notes = list(subject.notes)
    if labels and answers[0].by_logprob is None:
        notes.append(
            "The labels' log probabilities cannot be had for every example: predictors are compared by their replies."
        )
    if answers[0].tokens is None:
        notes.append("Perplexity cannot be had over HTTP; evaluate in process for it.")
    predictors = [_predictor(each, task) for each in answers]
    comparisons = _comparisons(answers, task)
    if task is not None:
        constant = majority_of(known or examples, labels)
        name = f"majority: {labels[constant]}"
        always = _Answers(name, Role.MAJORITY, by_logprob=[constant] * len(examples))
        predictors.append(_predictor(always, task))
        comparisons += _against(answers[0], always, task, force=True)
        if len(known) < len(train):
            notes.append("Some training answers are none of the held-out labels; they were left out.")
    evaluation = Evaluation(
        data=held.path.name,
        data_sha256=held.sha256,
        examples=len(examples),
        labels=labels,
        base=subject.base,
        base_id=subject.base_id,
        quantize=subject.quantize,
        from_gguf=subject.from_gguf,
        numerics_id=subject.numerics_id,
        predictors=tuple(predictors),
        comparisons=tuple(comparisons),
        gap=_gap(task, answers[0], on_seen, seen, labels),
        train_examples=len(seen) if on_seen is not None else 0,
        fidelity=fidelity,
        notes=tuple(notes),
        seconds=time.monotonic() - began,
    )
    return replace(evaluation, remarks=judge(evaluation))


def _ask(
    contender: Contender,
    scorer: Scorer,
    examples: Sequence[Example],
    labels: tuple[str, ...],
    progress: Progress,
    *,
    suffix: str = "",
    reply: bool = True,
) -> _Answers:
    """Everything that one contender says; its replies only with `reply`."""
    what = contender.name + suffix
    answers = _Answers(contender.name, contender.role, [], [], [])
    for start in range(0, len(examples), SLICE):
        part = examples[start : start + SLICE]
        progress(what, start, len(examples))
        said = scorer.ask(part, labels, reply=reply)
        chosen = None if said.labels is None else [max(range(len(row)), key=row.__getitem__) for row in said.labels]
        replied = None if said.replies is None else [_label_in(text, labels) for text in said.replies]
        answers.by_logprob = _joined(answers.by_logprob, chosen)
        answers.by_generation = _joined(answers.by_generation, replied)
        answers.tokens = _joined(answers.tokens, said.tokens)
    progress(what, len(examples), len(examples))
    return answers


def _fidelity(
    served: _Answers, exact: Contender, examples: Sequence[Example], labels: tuple[str, ...], progress: Progress
) -> Fidelity | None:
    if not served.tokens:
        return None
    progress(exact.name, 0, len(examples))  # to open it takes seconds
    try:
        found = _ask(exact, exact.open(), examples, labels, progress, reply=False)
    finally:
        exact.close()
    if not found.tokens:
        return None
    differences, unlike = apart(served.tokens[: len(examples)], found.tokens)
    return Fidelity(len(examples), len(differences), fsum(differences) / len(differences), max(differences), unlike)


def _joined(before: list[T] | None, more: list[T] | None) -> list[T] | None:
    """What is missing once is missing for good."""
    return None if before is None or more is None else before + more


def _label_in(reply: str, labels: Sequence[str]) -> int:
    """The label that the reply is, but for space around it."""
    stripped = reply.strip()
    return labels.index(stripped) if stripped in labels else NO_LABEL


def _predictor(said: _Answers, task: LabelTask | None) -> Predictor:
    return Predictor(
        said.name,
        said.role,
        by_logprob=task.scores(said.by_logprob) if task is not None and said.by_logprob is not None else None,
        by_generation=task.scores(said.by_generation) if task is not None and said.by_generation is not None else None,
        text=text_scores(said.tokens) if said.tokens else None,
    )


def _comparisons(answers: Sequence[_Answers], task: LabelTask | None) -> list[ScoreComparison]:
    return [comparison for other in answers[1:] for comparison in _against(answers[0], other, task)]


def _against(
    judged: _Answers, other: _Answers, task: LabelTask | None, *, force: bool = False
) -> list[ScoreComparison]:
    """The differences to another, by log probability where both have it. `force`: the other always says the same."""
    found: list[tuple[str, Difference]] = []
    if task is not None:
        both = judged.by_logprob is not None and other.by_logprob is not None
        first = judged.by_logprob if both else judged.by_generation
        second = other.by_logprob if both or force else other.by_generation
        if first is not None and second is not None:
            found.append((task.headline_name, task.headline_difference(first, second)))
            found.append(("accuracy", task.accuracy_difference(first, second)))
    elif judged.tokens and other.tokens:
        found.append(("loss", difference(text_features(judged.tokens), text_features(other.tokens), mean_loss)))
    return [ScoreComparison(other.name, other.role, score, value) for score, value in found]


def _gap(
    task: LabelTask | None,
    on_held: _Answers,
    on_seen: _Answers | None,
    seen: Sequence[Example],
    labels: tuple[str, ...],
) -> Difference | None:
    if on_seen is None:
        return None
    if task is None:
        if not (on_held.tokens and on_seen.tokens):
            return None
        return gap(text_features(on_held.tokens), text_features(on_seen.tokens), mean_loss)
    first = on_seen.by_logprob if on_held.by_logprob is not None else on_seen.by_generation
    second = on_held.by_logprob if on_held.by_logprob is not None else on_held.by_generation
    if first is None or second is None:
        return None
    return task.headline_gap(LabelTask(labels, truth_of(seen, labels)), first, second)


def _sample(examples: Sequence[Example], count: int) -> list[Example]:
    """As many as `count`, spread evenly over the file."""
    step = max(1.0, len(examples) / max(1, count))
    return [examples[int(index * step)] for index in range(min(count, len(examples)))]
