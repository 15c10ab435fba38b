"""Scores against tables worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from loramux_adapters.evaluation.scores import NO_LABEL, LabelTask, TokenScore, text_scores

HAM, SPAM = 0, 1


def binary() -> tuple[LabelTask, list[int]]:
    """90 ham, 10 spam; 88 + 2 of the ham right and wrong, 7 spam found, 2 missed, 1 reply that is no label."""
    truth = [HAM] * 90 + [SPAM] * 10
    return LabelTask(["ham", "spam"], truth), [HAM] * 88 + [SPAM] * 2 + [SPAM] * 7 + [HAM] * 2 + [NO_LABEL]


def test_the_scores_of_a_binary_table_are_those_of_the_definitions() -> None:
    task, predicted = binary()
    scores = task.scores(predicted)
    ham, spam = scores.classes

    assert scores.examples == 100
    assert scores.confusion == ((88, 2, 0), (2, 7, 1))
    assert scores.accuracy.value == pytest.approx(0.95)
    assert (spam.support, spam.predicted, spam.label) == (10, 9, "spam")
    assert spam.precision.value == pytest.approx(7 / 9)
    assert spam.recall.value == pytest.approx(0.7)
    assert spam.f1.value == pytest.approx(2 * (7 / 9) * 0.7 / (7 / 9 + 0.7))
    assert ham.precision.value == pytest.approx(88 / 90)
    assert ham.recall.value == pytest.approx(88 / 90)
    assert scores.macro_f1.value == pytest.approx((ham.f1.value + spam.f1.value) / 2)
    assert scores.macro_recall.value == pytest.approx((88 / 90 + 0.7) / 2)
    assert scores.macro_precision.value == pytest.approx((88 / 90 + 7 / 9) / 2)
    assert scores.unlabelled == 1
    assert scores.rarest.label == "spam"


def test_two_labels_are_judged_by_the_rarer_one_and_more_by_the_mean() -> None:
    task, predicted = binary()
    assert task.scores(predicted).headline_name == "F1 of spam"
    assert task.scores(predicted).headline == task.scores(predicted).classes[SPAM].f1
    three = LabelTask(["a", "b", "c"], [0, 1, 2, 2])
    assert three.scores([0, 1, 2, 1]).headline_name == "macro F1"
    assert three.scores([0, 1, 2, 1]).headline == three.scores([0, 1, 2, 1]).macro_f1


def test_three_labels_by_hand() -> None:
    task = LabelTask(["a", "b", "c"], [0, 0, 0, 1, 1, 2])
    scores = task.scores([0, 0, 1, 1, 2, 2])

    assert [c.precision.value for c in scores.classes] == pytest.approx([1, 1 / 2, 1 / 2])
    assert [c.recall.value for c in scores.classes] == pytest.approx([2 / 3, 1 / 2, 1])
    assert [c.f1.value for c in scores.classes] == pytest.approx([4 / 5, 1 / 2, 2 / 3])
    assert scores.macro_f1.value == pytest.approx((4 / 5 + 1 / 2 + 2 / 3) / 3)


def test_a_label_that_is_never_predicted_has_no_precision_and_an_f1_of_zero() -> None:
    scores = LabelTask(["ham", "spam"], [HAM, HAM, SPAM]).scores([HAM, HAM, HAM])
    spam = scores.classes[SPAM]

    assert not spam.precision.is_defined
    assert spam.recall.value == 0.0
    assert spam.f1.value == 0.0
    assert scores.macro_precision.value == pytest.approx(2 / 3 / 2)  # counts as zero
    assert scores.macro_f1.value == pytest.approx(0.8 / 2)


def test_a_label_that_no_answer_has_is_left_out_of_the_means() -> None:
    scores = LabelTask(["a", "b", "c"], [0, 0, 1, 1]).scores([0, 0, 1, 2])
    absent = scores.classes[2]

    assert (absent.support, absent.predicted) == (0, 1)
    assert not absent.recall.is_defined and not absent.f1.is_defined
    assert absent.precision.value == 0.0
    assert scores.macro_recall.value == pytest.approx((1 + 0.5) / 2)


def test_intervals_hold_their_value_and_are_narrower_with_more_examples() -> None:
    task, predicted = binary()
    few = task.scores(predicted)
    many = LabelTask(task.labels, list(task.truth) * 20).scores(predicted * 20)

    for scores in (few, many):
        for found in (scores.accuracy, scores.macro_f1, scores.headline, scores.classes[SPAM].recall):
            assert found.low <= found.value <= found.high
            assert 0.0 <= found.low and found.high <= 1.0
    assert many.headline.high - many.headline.low < (few.headline.high - few.headline.low) / 3
    assert many.headline.value == few.headline.value


def test_scores_are_the_same_each_time() -> None:
    task, predicted = binary()
    assert task.scores(predicted) == task.scores(predicted)


def test_perplexity_is_the_exponential_of_the_mean_loss_over_all_tokens() -> None:
    half, quarter = TokenScore(math.log(0.5), True), TokenScore(math.log(0.25), False)
    scores = text_scores([[half], [quarter, quarter, half]])

    assert (scores.examples, scores.tokens) == (2, 4)
    assert scores.loss.value == pytest.approx(1.5 * math.log(2))
    assert scores.perplexity.value == pytest.approx(2**1.5)
    assert scores.accuracy.value == pytest.approx(0.5)
    assert scores.perplexity.low == pytest.approx(2.0)
    assert scores.perplexity.high == pytest.approx(2 ** (5 / 3))


def test_differences_are_of_the_headline_and_of_accuracy() -> None:
    task, predicted = binary()
    perfect = list(task.truth)

    assert task.headline_difference(perfect, predicted).value == pytest.approx(1 - 14 / 19)
    assert task.accuracy_difference(perfect, predicted).value == pytest.approx(0.05)
    assert task.headline_difference(predicted, predicted).value == 0.0
    assert not task.headline_difference(predicted, predicted).is_significant


def test_the_gap_between_two_sets_of_examples_is_signed() -> None:
    held, predicted = binary()
    train = LabelTask(held.labels, [HAM] * 50 + [SPAM] * 50)

    gap = held.headline_gap(train, list(train.truth), predicted)

    assert gap.value == pytest.approx(1 - 14 / 19)
    assert np.isfinite([gap.low, gap.high, gap.p]).all()
