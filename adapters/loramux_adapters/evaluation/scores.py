"""Scores of a predictor, each with its interval: of chosen labels, and of text token by token.

Precision, recall and F1 are functions of a whole stack of confusion tables, one for each resample. scikit-learn scores
one table a call, in 2.5 ms: 5 s for one interval, which takes milliseconds here. It also gives a label that is no
example's answer an F1 of 0, where it is not defined here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from loramux_adapters.evaluation.bootstrap import Array, Difference, Interval, Resampled, Statistic, difference, gap

NO_LABEL = -1  # a reply that is none of the labels


@dataclass(frozen=True, slots=True)
class ClassScores:
    """One label's scores.

    Attributes:
        support: examples whose answer it is.
        predicted: examples that it was the prediction for.
        precision: not defined where it was never predicted.
        recall, f1: not defined where it is no example's answer.
    """

    label: str
    support: int
    predicted: int
    precision: Interval
    recall: Interval
    f1: Interval


@dataclass(frozen=True, slots=True)
class LabelScores:
    """Scores of predicted labels.

    Attributes:
        macro_precision, macro_recall, macro_f1: means over the labels that occur among the answers; a precision that is
            not defined counts as 0 in them.
        headline: the score that predictors are compared by; `headline_name` says which.
        confusion: [labels][labels + 1] counts; row: the answer, column: the prediction, the last: none of the labels.
    """

    examples: int
    accuracy: Interval
    macro_precision: Interval
    macro_recall: Interval
    macro_f1: Interval
    headline: Interval
    headline_name: str
    classes: tuple[ClassScores, ...]
    confusion: tuple[tuple[int, ...], ...]

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(scores.label for scores in self.classes)

    @property
    def unlabelled(self) -> int:
        """Predictions that were none of the labels."""
        return sum(row[-1] for row in self.confusion)

    @property
    def rarest(self) -> ClassScores:
        """The label with the fewest examples, of those that have any."""
        return min((scores for scores in self.classes if scores.support), key=lambda scores: scores.support)


@dataclass(frozen=True, slots=True)
class TextScores:
    """Scores of the answers' own tokens, each predicted from all before it; end tokens count.

    Attributes:
        loss: mean negative log probability of a token, in nats.
        accuracy: share of tokens that were the likeliest.
    """

    examples: int
    tokens: int
    loss: Interval
    perplexity: Interval
    accuracy: Interval


@dataclass(frozen=True, slots=True)
class TokenScore:
    """One token of an answer: its log probability, and whether no other was likelier."""

    logprob: float
    is_best: bool


def apart(a: Sequence[Sequence[TokenScore]], b: Sequence[Sequence[TokenScore]]) -> tuple[list[float], int]:
    """The absolute differences of the log probabilities of the same tokens, and how many are the best in one alone."""
    pairs = [pair for ours, theirs in zip(a, b, strict=True) for pair in zip(ours, theirs, strict=True)]
    return [abs(one.logprob - other.logprob) for one, other in pairs], sum(
        one.is_best != other.is_best for one, other in pairs
    )


class LabelTask:
    """A fixed set of labels and the answers of the held-out examples among them."""

    def __init__(self, labels: Sequence[str], truth: Sequence[int]) -> None:
        """
        Args:
            labels: at least two.
            truth: for each example, the index of its label.
        """
        self.labels = tuple(labels)
        self.truth = np.asarray(truth, dtype=np.int64)
        support = np.bincount(self.truth, minlength=len(labels))
        present = [index for index in range(len(labels)) if support[index]]
        if len(labels) == 2 and len(present) == 2:
            rare = int(support.argmin())
            self.headline_name = f"F1 of {labels[rare]}"
            self._headline: Statistic = partial(_f1_of, size=2, label=rare)
        else:
            self.headline_name = "macro F1"
            self._headline = partial(_macro, size=len(labels), of=f1)

    def scores(self, predicted: Sequence[int]) -> LabelScores:
        """`predicted`: for each example a label's index, or NO_LABEL."""
        size, sample = len(self.labels), Resampled(self.features(predicted))
        table, one = _square(sample.sums, size).astype(np.int64), sample.interval
        return LabelScores(
            examples=len(self.truth),
            accuracy=one(partial(_accuracy, size=size)),
            macro_precision=one(partial(_macro, size=size, of=precision)),
            macro_recall=one(partial(_macro, size=size, of=recall)),
            macro_f1=one(partial(_macro, size=size, of=f1)),
            headline=one(self._headline),
            headline_name=self.headline_name,
            classes=tuple(
                ClassScores(
                    label=label,
                    support=int(table[index].sum()),
                    predicted=int(table[:, index].sum()),
                    precision=one(partial(_one_label, size=size, label=index, of=precision)),
                    recall=one(partial(_one_label, size=size, label=index, of=recall)),
                    f1=one(partial(_one_label, size=size, label=index, of=f1)),
                )
                for index, label in enumerate(self.labels)
            ),
            confusion=tuple(tuple(int(count) for count in row) for row in table),
        )

    def headline_difference(self, first: Sequence[int], second: Sequence[int]) -> Difference:
        """How much better the first predictor's headline is than the second's, on the same examples."""
        return difference(self.features(first), self.features(second), self._headline)

    def accuracy_difference(self, first: Sequence[int], second: Sequence[int]) -> Difference:
        return difference(self.features(first), self.features(second), partial(_accuracy, size=len(self.labels)))

    def headline_gap(self, other: LabelTask, others: Sequence[int], predicted: Sequence[int]) -> Difference:
        """The headline on another set of examples with the same labels minus that on this set."""
        return gap(other.features(others), self.features(predicted), self._headline)

    def features(self, predicted: Sequence[int]) -> Array:
        """[examples, cells of the confusion table], one 1 in each row."""
        width = len(self.labels) + 1
        columns = np.asarray(predicted, dtype=np.int64) % width  # NO_LABEL is the last column
        found = np.zeros((len(self.truth), len(self.labels) * width))
        found[np.arange(len(self.truth)), self.truth * width + columns] = 1
        return found


def text_scores(answers: Sequence[Sequence[TokenScore]]) -> TextScores:
    """`answers`: the token scores of each example's answer, at least one token in all."""
    sample = Resampled(text_features(answers))
    return TextScores(
        examples=len(answers),
        tokens=int(sample.sums[1]),
        loss=sample.interval(mean_loss),
        perplexity=sample.interval(lambda sums: np.exp(mean_loss(sums))),
        accuracy=sample.interval(lambda sums: sums[..., 2] / sums[..., 1]),
    )


def text_features(answers: Sequence[Sequence[TokenScore]]) -> Array:
    """[examples, 3]: loss, tokens, likeliest tokens."""
    return np.array(
        [
            (-sum(token.logprob for token in answer), len(answer), sum(token.is_best for token in answer))
            for answer in answers
        ],
        dtype=np.float64,
    )


def mean_loss(sums: Array) -> Array:
    """Loss of a token, from sums as `text_features` gives them [..., 3]."""
    result: Array = sums[..., 0] / sums[..., 1]
    return result


def precision(table: Array) -> Array:
    """[..., labels, labels + 1] -> [..., labels]; NaN where a label was never predicted."""
    size = table.shape[-2]
    return _ratio(_hits(table), table[..., :size].sum(-2))


def recall(table: Array) -> Array:
    """[..., labels, labels + 1] -> [..., labels]; NaN where a label is no example's answer."""
    return _ratio(_hits(table), table.sum(-1))


def f1(table: Array) -> Array:
    """[..., labels, labels + 1] -> [..., labels]; NaN where a label is no example's answer."""
    size = table.shape[-2]
    support = table.sum(-1)
    scores = _ratio(2 * _hits(table), support + table[..., :size].sum(-2))
    return np.where(support > 0, scores, np.nan)


def _hits(table: Array) -> Array:
    size = table.shape[-2]
    result: Array = table[..., np.arange(size), np.arange(size)]
    return result


def _ratio(above: Array, below: Array) -> Array:
    result: Array = np.divide(above, below, out=np.full(np.shape(above), np.nan), where=below > 0)
    return result


def _square(sums: Array, size: int) -> Array:
    return sums.reshape(*sums.shape[:-1], size, size + 1)


def _accuracy(sums: Array, *, size: int) -> Array:
    table = _square(sums, size)
    return _ratio(_hits(table).sum(-1), table.sum((-2, -1)))


def _macro(sums: Array, *, size: int, of: Statistic) -> Array:
    table = _square(sums, size)
    occurs = table.sum(-1) > 0
    scores = np.where(occurs, np.nan_to_num(of(table)), 0.0)
    return _ratio(scores.sum(-1), occurs.sum(-1).astype(np.float64))


def _one_label(sums: Array, *, size: int, label: int, of: Statistic) -> Array:
    result: Array = of(_square(sums, size))[..., label]
    return result


def _f1_of(sums: Array, *, size: int, label: int) -> Array:
    return _one_label(sums, size=size, label=label, of=f1)
