"""Evaluations with scorers whose answers are known: what is asked, counted and compared."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from loramux_adapters.errors import DataError
from loramux_adapters.evaluation.evaluated import Evaluation, Level, Role
from loramux_adapters.evaluation.labels import labels_of
from loramux_adapters.evaluation.report import text_report
from loramux_adapters.evaluation.scores import TokenScore, apart
from loramux_adapters.training.data.conversation import Example, Message
from loramux_adapters.training.data.examples import ExampleSet
from loramux_server.evaluation.contenders import FIDELITY_EXAMPLES, SLICE, Contender, Said, Scorer, Subject, evaluate

SUBJECT = Subject(
    base="tiny", base_id="0" * 64, quantize="nf4", from_gguf=False, numerics_id="torch", notes=("a note",)
)


def example(question: str, answer: str, line: int = 1) -> Example:
    return Example((Message("user", question), Message("assistant", answer)), line)


def held(answers: Sequence[str]) -> ExampleSet:
    made = tuple(example(f"question {index} {answer}", answer, index + 1) for index, answer in enumerate(answers))
    return ExampleSet(made, (), "a" * 64, Path("somewhere/held.jsonl"))


@dataclass
class KnownScorer:
    """Chooses by `choose`, replies by `reply`, and gives every token of an answer the same loss."""

    choose: Callable[[Example], str] | None
    reply: Callable[[Example], str] = lambda each: each.answer
    loss: Callable[[Example], float] | None = lambda each: 1.0
    asked: list[tuple[int, bool]] = field(default_factory=list)

    def ask(self, examples: Sequence[Example], labels: Sequence[str], *, reply: bool) -> Said:
        self.asked.append((len(examples), reply))
        chosen = None
        if labels and self.choose is not None:
            chosen = [[0.0 if self.choose(each) == label else -5.0 for label in labels] for each in examples]
        tokens = None
        if self.loss is not None:
            tokens = [[TokenScore(-self.loss(each), True)] * len(each.answer) for each in examples]
        return Said(chosen, tokens, [self.reply(each) for each in examples] if reply and labels else None)


def contender(name: str, role: Role, scorer: Scorer) -> Contender:
    return Contender(name, role, lambda: scorer)


def right(each: Example) -> str:
    return each.answer


def ham(each: Example) -> str:
    return "ham"


ANSWERS = ["ham"] * 60 + ["spam"] * 40


def run(
    adapter: Scorer, base: Scorer, *, answers: Sequence[str] = ANSWERS, train: Sequence[Example] = ()
) -> Evaluation:
    data = held(answers)
    return evaluate(
        data,
        [contender("mine", Role.ADAPTER, adapter), contender("bare base", Role.BASE, base)],
        SUBJECT,
        labels=labels_of(data.examples),
        train=train,
    )


def test_labels_are_seen_in_answers_that_come_up_again_and_again() -> None:
    assert labels_of(held(["ham", "spam ", "ham", "ham", "spam", "ham"]).examples) == ("ham", "spam")
    assert labels_of(held([f"answer {index % 21}" for index in range(100)]).examples) == ()
    assert labels_of(held(["Paris", "Rome", "Paris"]).examples) == ()  # too few to be a pattern
    assert labels_of(held(["a" * 41, "b" * 41] * 10).examples) == ()


def test_named_labels_are_checked_against_the_answers() -> None:
    examples = held(["ham", "spam", "egg", "ham"]).examples
    with pytest.raises(DataError, match='1 of 4 answers are none of the labels ham, spam: line 3 "egg"'):
        labels_of(examples, ["ham", "spam"])
    assert labels_of(examples, ["ham", "spam", "egg", "unseen"]) == ("ham", "spam", "egg", "unseen")
    with pytest.raises(DataError, match="different"):
        labels_of(examples, ["ham", "ham"])
    with pytest.raises(DataError, match="at least two"):
        labels_of(examples, ["ham"])


@pytest.mark.parametrize("named", [[], ["ham", "spam"]])
def test_one_class_alone_is_refused(named: list[str]) -> None:
    with pytest.raises(DataError, match='all 9 answers are "ham": one class alone'):
        labels_of(held(["ham"] * 9).examples, named)


def test_everyone_is_scored_by_log_probability_and_by_replies() -> None:
    evaluation = run(KnownScorer(right, lambda each: f" {each.answer}\n"), KnownScorer(ham, lambda each: "I think ham"))
    mine, base, majority = evaluation.predictors

    assert mine.by_logprob is not None and mine.by_generation is not None
    assert mine.by_logprob.accuracy.value == mine.by_generation.accuracy.value == 1.0
    assert base.by_logprob is not None and base.by_generation is not None
    assert base.by_logprob.confusion == ((60, 0, 0), (40, 0, 0))
    assert base.by_generation.confusion == ((0, 0, 60), (0, 0, 40))
    assert majority.name == "majority: ham" and majority.by_logprob is not None
    assert majority.by_logprob.confusion == base.by_logprob.confusion
    assert evaluation.labels == ("ham", "spam")
    assert evaluation.data == "held.jsonl"
    assert evaluation.notes == ("a note",)


def test_the_adapter_is_compared_with_each_other_on_the_same_examples() -> None:
    evaluation = run(KnownScorer(right), KnownScorer(ham))
    found = {(each.other, each.score): each.difference for each in evaluation.comparisons}

    assert set(found) == {
        (other, score) for other in ("bare base", "majority: ham") for score in ("F1 of spam", "accuracy")
    }
    assert found["bare base", "F1 of spam"].value == 1.0
    assert found["bare base", "accuracy"].value == pytest.approx(0.4)
    assert any(each.level is Level.GOOD for each in evaluation.remarks)


def test_the_majority_is_that_of_the_training_data_where_there_is_any() -> None:
    train = [example(f"t{index}", "spam") for index in range(30)]
    evaluation = run(KnownScorer(right), KnownScorer(ham), train=train)

    majority = evaluation.find(Role.MAJORITY)
    assert majority is not None and majority.name == "majority: spam"
    assert majority.by_logprob is not None and majority.by_logprob.accuracy.value == pytest.approx(0.4)


def test_training_examples_show_overfitting_and_are_as_many_as_the_held_out_ones() -> None:
    def remembers(each: Example) -> str:
        return each.answer if each.messages[0].content.startswith("t") or hash(each.line) % 3 else "ham"

    train = [example(f"t{index}", "ham" if index % 2 else "spam") for index in range(1000)]
    scorer = KnownScorer(remembers)
    evaluation = run(scorer, KnownScorer(ham), train=train)

    assert evaluation.train_examples == 100
    assert evaluation.gap is not None and evaluation.gap.value > 0.05
    assert any("Overfitting" in each.text for each in evaluation.remarks)
    assert sum(count for count, _ in scorer.asked) == 200
    assert [reply for _, reply in scorer.asked] == [True, True, False, False]


def test_training_answers_that_are_no_label_are_left_out_and_said_to_be() -> None:
    train = [example("t", "ham"), example("t", "odd"), example("t", "spam"), example("t", "ham")] * 30
    evaluation = run(KnownScorer(right), KnownScorer(ham), train=train)

    assert any("left out" in note for note in evaluation.notes)
    assert evaluation.train_examples == 90


def test_without_log_probabilities_predictors_are_compared_by_their_replies() -> None:
    evaluation = run(
        KnownScorer(None, right, loss=None), KnownScorer(None, ham, loss=None), train=held(ANSWERS).examples
    )

    assert evaluation.adapter.by_logprob is None and evaluation.adapter.text is None
    assert evaluation.adapter.labelled is evaluation.adapter.by_generation
    compared = evaluation.compared(Role.BASE)
    assert compared is not None and compared.difference.value == 1.0
    majority = evaluation.compared(Role.MAJORITY)
    assert majority is not None and majority.difference.value == 1.0
    assert evaluation.gap is not None and evaluation.gap.value == 0.0
    assert any("by their replies" in note for note in evaluation.notes)


def test_one_example_without_log_probabilities_takes_them_from_all() -> None:
    class Gaps(KnownScorer):
        def ask(self, examples: Sequence[Example], labels: Sequence[str], *, reply: bool) -> Said:
            self.choose = right if not self.asked else None
            return super().ask(examples, labels, reply=reply)

    assert len(ANSWERS) > SLICE
    evaluation = run(Gaps(right), KnownScorer(ham))

    assert evaluation.adapter.by_logprob is None
    assert evaluation.adapter.by_generation is not None


def test_free_text_is_compared_by_the_loss_of_its_tokens() -> None:
    answers = [f"answer number {index}" for index in range(30)]
    train = held([f"train {index}" for index in range(30)]).examples
    evaluation = run(
        KnownScorer(None, loss=lambda each: 0.3 if "train" in each.answer else 1.0),
        KnownScorer(None, loss=lambda each: 2.0),
        answers=answers,
        train=train,
    )

    assert evaluation.labels == ()
    assert evaluation.adapter.text is not None
    assert evaluation.adapter.text.perplexity.value == pytest.approx(math.e)
    assert evaluation.adapter.text.tokens == sum(map(len, answers))
    (comparison,) = evaluation.comparisons
    assert (comparison.score, comparison.difference.value) == ("loss", pytest.approx(-1.0))
    assert evaluation.gap is not None and evaluation.gap.value == pytest.approx(0.7)
    assert any("Overfitting" in each.text for each in evaluation.remarks)
    assert evaluation.find(Role.MAJORITY) is None


def test_contenders_are_open_one_at_a_time_and_progress_is_told() -> None:
    events: list[str] = []
    told: list[tuple[str, int, int]] = []

    def open_as(name: str) -> Callable[[], Scorer]:
        def start() -> Scorer:
            events.append(f"open {name}")
            return KnownScorer(right)

        return start

    contenders = [
        Contender(name, role, open_as(name), lambda name=name: events.append(f"close {name}"))  # type: ignore[misc]
        for name, role in (("a", Role.ADAPTER), ("b", Role.BASE))
    ]
    evaluate(held(ANSWERS), contenders, SUBJECT, labels=("ham", "spam"), progress=lambda *step: told.append(step))

    assert events == ["open a", "close a", "open b", "close b"]
    assert told == [(name, done, 100) for name in "ab" for done in (0, SLICE, 100)]


def test_the_first_answers_are_scored_in_fp32_too_and_the_report_says_how_far_that_is() -> None:
    served = KnownScorer(None, loss=lambda each: 1.0 + 0.01 * len(each.answer))
    exact = KnownScorer(None, loss=lambda each: 1.0)
    closed: list[str] = []
    held_out = held([f"answer {index}" for index in range(10)])

    def found(scorer: Scorer | None) -> Evaluation:
        return evaluate(
            held_out,
            [contender("mine", Role.ADAPTER, served)],
            SUBJECT,
            labels=(),
            exact=scorer and Contender("in fp32", Role.REFERENCE, lambda: scorer, lambda: closed.append("closed")),
        )

    evaluation = found(exact)
    assert evaluation.fidelity is not None
    assert (evaluation.fidelity.examples, evaluation.fidelity.tokens) == (FIDELITY_EXAMPLES, FIDELITY_EXAMPLES * 8)
    assert evaluation.fidelity.mean == pytest.approx(0.08) and evaluation.fidelity.max == pytest.approx(0.08)
    assert evaluation.fidelity.unlike == 0 and closed == ["closed"] and exact.asked == [(FIDELITY_EXAMPLES, False)]
    assert [predictor.name for predictor in evaluation.predictors] == ["mine"]
    report = " ".join(text_report(evaluation).split())
    assert "64 tokens of 8 answers: log probabilities differ by 0.08000 on average and 0.08000 at most" in report
    assert "the likeliest tokens are the same in both" in report
    assert json.loads(json.dumps(evaluation.as_json()))["fidelity"]["tokens"] == 64

    assert found(None).fidelity is None and "fp32" not in text_report(found(None))
    assert found(KnownScorer(None, loss=None)).fidelity is None, "where it cannot be had nothing is said"


def test_what_is_shown_names_the_scoring_in_fp32_before_its_base_is_loaded() -> None:
    told: list[tuple[str, int, int]] = []

    def load() -> Scorer:
        told.append(("loading", 0, 0))
        return KnownScorer(None, loss=lambda each: 1.0)

    evaluate(
        held(["answer"]),
        [contender("mine", Role.ADAPTER, KnownScorer(None, loss=lambda each: 1.0))],
        SUBJECT,
        labels=(),
        exact=Contender("in fp32", Role.REFERENCE, load),
        progress=lambda *step: told.append(step),
    )
    at = told.index(("loading", 0, 0))
    assert told[at - 1] == ("in fp32", 0, 1) and told[-1] == ("in fp32", 1, 1)


def test_tokens_that_are_the_best_in_one_arithmetic_alone_are_counted() -> None:
    ours = [[TokenScore(-1.0, True), TokenScore(-2.0, False)], [TokenScore(-3.0, True)]]
    theirs = [[TokenScore(-1.5, True), TokenScore(-2.0, True)], [TokenScore(-2.75, False)]]
    assert apart(ours, theirs) == ([0.5, 0.0, 0.25], 2)
