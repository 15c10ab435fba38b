"""Evaluations made of given predictions, for tests of what is said about them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from loramux_adapters.evaluation.bootstrap import Difference, difference, gap
from loramux_adapters.evaluation.evaluated import Evaluation, Predictor, Role, ScoreComparison
from loramux_adapters.evaluation.scores import LabelTask, TokenScore, mean_loss, text_features, text_scores
from loramux_adapters.evaluation.verdict import judge

LABELS = ("ham", "spam")
HAM, SPAM, NONE = 0, 1, -1


def flipped(truth: Sequence[int], *, ham: int, spam: int) -> list[int]:
    """Predictions that are wrong on so many ham and so many spam."""
    left = {HAM: ham, SPAM: spam}
    predicted = []
    for label in truth:
        wrong = left[label] > 0
        left[label] -= wrong
        predicted.append(1 - label if wrong else label)
    return predicted


def truth_of(ham: int, spam: int) -> list[int]:
    return [HAM] * ham + [SPAM] * spam


def labelled(
    truth: Sequence[int],
    judged: Sequence[int],
    others: Mapping[Role, Sequence[int]],
    *,
    generated: Sequence[int] | None = None,
    labels: Sequence[str] = LABELS,
    train_gap: Difference | None = None,
    from_gguf: bool = False,
) -> Evaluation:
    """One of a labelled task; `judged` and `others` are by log probability."""
    task = LabelTask(labels, truth)
    found = [
        Predictor(
            "spam",
            Role.ADAPTER,
            by_logprob=task.scores(judged),
            by_generation=None if generated is None else task.scores(generated),
        )
    ]
    comparisons: list[ScoreComparison] = []
    for role, predicted in others.items():
        name = {Role.BASE: "bare base", Role.MAJORITY: f"majority: {labels[0]}"}.get(role, role.value)
        found.append(Predictor(name, role, by_logprob=task.scores(predicted)))
        for score, value in (
            (task.headline_name, task.headline_difference(judged, predicted)),
            ("accuracy", task.accuracy_difference(judged, predicted)),
        ):
            comparisons.append(ScoreComparison(name, role, score, value))
    return _judged(found, comparisons, tuple(labels), len(truth), train_gap, from_gguf)


def text(judged: Sequence[float], base: Sequence[float], *, seen: Sequence[float] = ()) -> Evaluation:
    """One of free text: losses of one-token answers."""
    ours, theirs = ([[TokenScore(-loss, loss < math.log(2))] for loss in losses] for losses in (judged, base))
    found = [
        Predictor("story", Role.ADAPTER, text=text_scores(ours)),
        Predictor("bare base", Role.BASE, text=text_scores(theirs)),
    ]
    value = difference(text_features(ours), text_features(theirs), mean_loss)
    train = [[TokenScore(-loss, True)] for loss in seen]
    apart = gap(text_features(ours), text_features(train), mean_loss) if train else None
    return _judged(found, [ScoreComparison("bare base", Role.BASE, "loss", value)], (), len(judged), apart, False)


def _judged(
    found: Sequence[Predictor],
    comparisons: Sequence[ScoreComparison],
    labels: tuple[str, ...],
    examples: int,
    train_gap: Difference | None,
    from_gguf: bool,
) -> Evaluation:
    made = Evaluation(
        data="held.jsonl",
        data_sha256="0" * 64,
        examples=examples,
        labels=labels,
        base="smollm2-135m-instruct",
        base_id="1" * 64,
        quantize="nf4",
        from_gguf=from_gguf,
        numerics_id="torch 2",
        predictors=tuple(found),
        comparisons=tuple(comparisons),
        gap=train_gap,
        train_examples=0 if train_gap is None else 400,
        notes=("Only the first 800 of 837 examples are used.",),
        seconds=71.0,
    )
    return replace(made, remarks=judge(made))
