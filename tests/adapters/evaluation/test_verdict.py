"""What is said of scores, for each thing that must not go unsaid."""

from __future__ import annotations

from dataclasses import replace

import pytest

from loramux_adapters.evaluation.bootstrap import Difference
from loramux_adapters.evaluation.evaluated import Evaluation, Level, Role
from loramux_adapters.evaluation.verdict import Standing, judge, standing
from support.evaluations import HAM, NONE, flipped, labelled, text, truth_of

TRUTH = truth_of(690, 110)
GOOD = flipped(TRUTH, ham=3, spam=5)
BAD_BASE = flipped(TRUTH, ham=200, spam=60)


def said(evaluation: Evaluation, words: str) -> Level | None:
    """The level of the remark with these words, None if there is no such remark."""
    found = [remark.level for remark in evaluation.remarks if words in remark.text]
    assert len(found) <= 1
    return found[0] if found else None


def test_an_adapter_that_helps_is_called_better_than_the_base() -> None:
    evaluation = labelled(TRUTH, GOOD, {Role.BASE: BAD_BASE, Role.MAJORITY: [HAM] * 800})

    assert said(evaluation, "Better than the bare base: F1 of spam") is Level.GOOD
    assert {remark.level for remark in evaluation.remarks} == {Level.GOOD}


SURE, LOW = 0.001, 0.3  # values of p
POINTS = [
    # difference, its interval, p -> how it stands
    ((0.20, 0.10, 0.30, SURE), Standing.BETTER),
    ((0.01, 0.001, 0.02, 0.04), Standing.BETTER),  # small, but sure
    ((0.20, -0.05, 0.40, LOW), Standing.PERHAPS_BETTER),
    ((0.03, 0.00, 0.06, 0.06), Standing.PERHAPS_BETTER),
    ((0.02, -0.10, 0.12, LOW), Standing.EQUAL),
    ((0.00, 0.00, 0.00, 1.0), Standing.EQUAL),
    ((-0.02, -0.10, 0.05, LOW), Standing.EQUAL),
    ((-0.03, -0.10, 0.05, LOW), Standing.PERHAPS_WORSE),
    ((-0.60, -0.90, 0.10, 0.06), Standing.PERHAPS_WORSE),
    ((-0.01, -0.02, -0.001, 0.04), Standing.WORSE),
    ((-0.60, -0.80, -0.40, SURE), Standing.WORSE),
]


@pytest.mark.parametrize(("difference", "stands"), POINTS)
def test_a_difference_is_read_by_its_sign_its_size_and_its_certainty(
    difference: tuple[float, float, float, float], stands: Standing
) -> None:
    assert standing(Difference(*difference), 0.02) is stands


@pytest.mark.parametrize(
    ("stands", "of_base", "base_level", "of_majority", "majority_level"),
    [
        (Standing.BETTER, "Better than the bare base: F1 of spam +60.0", Level.GOOD, None, None),
        (
            Standing.PERHAPS_BETTER,
            "Perhaps better than the bare base, but 20 held-out examples are too few to be sure: F1 of spam +20.0",
            Level.WARNING,
            'Perhaps more accurate than always answering "ham", but 20 held-out examples are too few to be sure',
            Level.WARNING,
        ),
        (
            Standing.EQUAL,
            "No gain over the bare base: F1 of spam +1.0",
            Level.BAD,
            'No more accurate than always answering "ham": accuracy +1.0',
            Level.BAD,
        ),
        (
            Standing.PERHAPS_WORSE,
            "Below the bare base, though 20 held-out examples are too few to be sure: F1 of spam -60.0",
            Level.BAD,
            'Below always answering "ham", though 20 held-out examples are too few to be sure: accuracy -60.0',
            Level.BAD,
        ),
        (
            Standing.WORSE,
            "WORSE than the bare base: F1 of spam -60.0",
            Level.BAD,
            'LESS accurate than always answering "ham": accuracy -60.0',
            Level.BAD,
        ),
    ],
)
def test_every_standing_has_words_that_say_it(
    stands: Standing, of_base: str, base_level: Level, of_majority: str | None, majority_level: Level | None
) -> None:
    value = {
        Standing.BETTER: Difference(0.6, 0.4, 0.8, SURE),
        Standing.PERHAPS_BETTER: Difference(0.2, -0.05, 0.4, LOW),
        Standing.EQUAL: Difference(0.01, -0.1, 0.1, LOW),
        Standing.PERHAPS_WORSE: Difference(-0.6, -0.9, 0.1, 0.06),
        Standing.WORSE: Difference(-0.6, -0.8, -0.4, SURE),
    }[stands]
    truth = truth_of(14, 6)
    made = labelled(truth, truth, {Role.BASE: truth, Role.MAJORITY: [HAM] * 20})
    made = replace(made, comparisons=tuple(replace(each, difference=value) for each in made.comparisons))
    evaluation = replace(made, remarks=judge(made))

    assert said(evaluation, of_base) is base_level
    majority = [remark for remark in evaluation.remarks if "always answering" in remark.text]
    assert [remark.level for remark in majority] == ([] if majority_level is None else [majority_level])
    assert all(str(of_majority) in remark.text for remark in majority)
    assert not any("significant" in remark.text for remark in evaluation.remarks)


def test_an_adapter_that_is_worse_than_the_base_is_called_out() -> None:
    worse = labelled(TRUTH, BAD_BASE, {Role.BASE: GOOD})

    assert said(worse, "WORSE than the bare base") is Level.BAD


def test_an_adapter_that_only_knows_the_majority_is_called_out() -> None:
    evaluation = labelled(TRUTH, [HAM] * 800, {Role.BASE: BAD_BASE, Role.MAJORITY: [HAM] * 800})

    assert said(evaluation, 'No more accurate than always answering "ham"') is Level.BAD
    assert said(evaluation, 'Never answers "spam"') is Level.BAD
    assert said(evaluation, 'Accuracy of 86.2% hides that only 0.0% of "spam" is found') is Level.BAD


def test_high_accuracy_with_low_recall_of_the_rare_class_is_called_out() -> None:
    blind = labelled(TRUTH, flipped(TRUTH, ham=0, spam=33), {})
    seeing = labelled(TRUTH, flipped(TRUTH, ham=3, spam=5), {})
    balanced = labelled(truth_of(400, 400), flipped(truth_of(400, 400), ham=0, spam=200), {})

    assert said(blind, 'Accuracy of 95.9% hides that only 70.0% of "spam" is found') is Level.BAD
    assert said(seeing, "hides") is None
    assert said(balanced, "hides") is None  # half of the examples: nothing is rare


@pytest.mark.parametrize(
    ("spam", "level", "words"),
    [
        (0, Level.GOOD, "Better than the 16-bit reference"),
        (10, Level.GOOD, "As good as the 16-bit reference (within 2 points)"),
        (13, Level.GOOD, "As good as the 16-bit reference (within 2 points)"),
        (18, Level.WARNING, "Weaker than the 16-bit reference"),
        (30, Level.BAD, "Much weaker than the 16-bit reference (more than 5 points)"),
    ],
)
def test_the_distance_to_the_reference_decides(spam: int, level: Level, words: str) -> None:
    judged, reference = flipped(TRUTH, ham=0, spam=spam), flipped(TRUTH, ham=0, spam=10)

    assert said(labelled(TRUTH, judged, {Role.REFERENCE: reference}), words) is level


def test_what_may_be_better_by_chance_is_called_no_worse() -> None:
    truth = [0] * 30 + [1] * 10
    judged, reference = [1] * 2 + truth[2:], [0] * 2 + [1] * 3 + truth[5:]

    assert said(labelled(truth, judged, {Role.REFERENCE: reference}), "No worse than the 16-bit") is Level.GOOD


def test_a_difference_that_chance_may_make_is_said_to_be_one() -> None:
    evaluation = labelled(TRUTH, flipped(TRUTH, ham=3, spam=11), {Role.REFERENCE: flipped(TRUTH, ham=4, spam=9)})

    assert said(evaluation, "The difference is within what chance does.") is Level.GOOD


def test_a_16_bit_reference_of_a_gguf_base_is_said_to_be_4_bit_already() -> None:
    with_reference = labelled(TRUTH, GOOD, {Role.REFERENCE: GOOD}, from_gguf=True)
    without = labelled(TRUTH, GOOD, {Role.BASE: BAD_BASE}, from_gguf=True)

    assert said(with_reference, "dequantized 4-bit") is Level.NOTE
    assert said(without, "dequantized") is None


def test_a_gap_to_the_training_examples_is_overfitting() -> None:
    wide = labelled(TRUTH, GOOD, {}, train_gap=Difference(0.09, 0.05, 0.13, 0.001))
    unsure = labelled(TRUTH, GOOD, {}, train_gap=Difference(0.06, -0.01, 0.13, 0.1))
    none = labelled(TRUTH, GOOD, {}, train_gap=Difference(0.01, -0.01, 0.03, 0.4))

    assert said(wide, "Overfitting: 9.0 points better on 400 training examples") is Level.BAD
    assert said(unsure, "Perhaps overfitting: 6.0 points better on 400 training examples") is Level.WARNING
    assert said(none, "No sign of overfitting: 1.0 points") is Level.NOTE


def test_a_label_without_examples_and_one_with_few_are_named() -> None:
    three = labelled([0] * 100 + [1] * 12, [0] * 100 + [1] * 12, {}, labels=["a", "b", "c"])

    assert said(three, 'No held-out answer is "c"') is Level.WARNING
    assert said(three, 'Few held-out examples of "b" 12') is Level.WARNING


def test_replies_that_are_no_label_are_counted() -> None:
    few, many = [*GOOD[:-2], NONE, NONE], [*GOOD[:-80], *[NONE] * 80]

    assert said(labelled(TRUTH, GOOD, {}, generated=few), "0.2% of the replies (2) are none") is Level.WARNING
    evaluation = labelled(TRUTH, GOOD, {}, generated=many)
    assert said(evaluation, "10.0% of the replies (80) are none") is Level.BAD
    assert said(evaluation, "lower in replies than by log probability") is Level.WARNING


def test_free_text_is_judged_by_its_loss() -> None:
    low, high = [0.5 + 0.01 * (i % 7) for i in range(60)], [1.5 + 0.01 * (i % 5) for i in range(60)]

    assert said(text(low, high), "Better than the bare base: loss -0.99") is Level.GOOD
    assert said(text(high, low), "WORSE than the bare base: loss +0.99") is Level.BAD
    assert said(text(low, low), "No gain over the bare base") is Level.BAD
    assert said(text(high, high, seen=low), "Overfitting: 0.99") is Level.BAD
    assert said(text(low, high, seen=low), "No sign of overfitting") is Level.NOTE


def test_the_worst_comes_first() -> None:
    evaluation = labelled(TRUTH, flipped(TRUTH, ham=0, spam=33), {Role.BASE: BAD_BASE, Role.REFERENCE: GOOD})
    levels = [remark.level for remark in evaluation.remarks]

    assert levels == sorted(levels, key=[Level.BAD, Level.WARNING, Level.GOOD, Level.NOTE].index)
    assert levels[0] is Level.BAD
