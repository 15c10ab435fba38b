"""What counts as the same answer, and what does not."""

from __future__ import annotations

import pytest

from loramux_server.fingerprint.file import Fingerprint, Witness
from loramux_server.fingerprint.replay import Scored, Verdict, foreign, judge

SAID = Witness("p", (1, 2), "r", (3, 4, 5, 6), (-0.5, -1.0, -0.25, -2.0))
SAME = [Scored(logprob, logprob) for logprob in SAID.logprobs]


def shifted(*differences: float, gap: float = 0.0) -> list[list[Scored]]:
    """Scores of one witness, each off by so much; in the last place another token is likelier by `gap`."""
    logprobs = [said + difference for said, difference in zip(SAID.logprobs, differences, strict=True)]
    return [[*(Scored(one, one) for one in logprobs[:-1]), Scored(logprobs[-1], logprobs[-1] + gap)]]


@pytest.mark.parametrize("same", [True, False])
def test_equal_bits_are_exact_whatever_the_machine(same: bool) -> None:
    assert judge([SAID, SAID], [SAME, SAME], same_numerics=same) == Verdict("exact")


def test_on_the_same_path_nothing_but_equal_bits_will_do() -> None:
    verdict = judge([SAID], shifted(0.0, 1e-7, 0.0, 0.0), same_numerics=True)
    assert verdict.outcome == "mismatch" and "numerics id is the same" in verdict.reason
    assert judge([SAID], shifted(0, 0, 0, 0, gap=1e-7), same_numerics=True).outcome == "mismatch"


@pytest.mark.parametrize(
    ("found", "outcome"),
    [
        (shifted(0.09, -0.09, 0.1, 0.1), "within_tolerance"),
        (shifted(0.0, 0.0, 0.0, 0.39), "within_tolerance"),
        (shifted(0.0, 0.0, 0.0, 0.0, gap=0.5), "within_tolerance"),
        (shifted(0.11, -0.11, 0.11, 0.11), "mismatch"),
        (shifted(0.0, 0.0, 0.0, -0.399999, gap=0.51), "mismatch"),
        (shifted(0.0, 0.0, -0.41, 0.0), "mismatch"),
        (shifted(0.0, 0.0, 0.0, 0.0, gap=0.5001), "mismatch"),
        (shifted(0.0, 0.0, float("nan"), 0.0), "mismatch"),
    ],
)
def test_elsewhere_small_differences_are_allowed(found: list[list[Scored]], outcome: str) -> None:
    verdict = judge([SAID], found, same_numerics=False)
    assert verdict.outcome == outcome
    assert bool(verdict.reason) == (outcome == "mismatch")


@pytest.mark.parametrize(("largest", "outcome"), [(0.74, "within_tolerance"), (-0.76, "mismatch")])
def test_one_token_may_be_further_off_than_the_mean(largest: float, outcome: str) -> None:
    found = shifted(0.0, 0.0, largest, 0.0) + shifted(0.0, 0.0, 0.0, 0.0)
    assert judge([SAID, SAID], found, same_numerics=False).outcome == outcome


def test_a_fingerprint_of_another_base_or_version_needs_no_model_to_be_refused() -> None:
    fingerprint = Fingerprint("n", "ba5e", "v1", (SAID,))
    assert foreign(fingerprint, base_id="ba5e", version="v1") is None
    assert "another base" in (foreign(fingerprint, base_id="other", version="v1") or Verdict("exact")).reason
    assert "another adapter" in (foreign(fingerprint, base_id="ba5e", version="v2") or Verdict("exact")).reason
