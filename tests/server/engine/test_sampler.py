"""Sampling: filters, seeds, log probabilities, and rows that do not influence one another."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from loramux_server.engine.sampler import Sampler, asks_first_token, uniform
from loramux_server.engine.scheduling.sequence import NOT_FINITE, RowResult, SamplingParams, ScheduledSequence, Sequence
from loramux_server.kernels.compiled.library import Compiled, native_library
from loramux_server.kernels.compiled.sampling import NativeSampling, Sampling, TensorSampling

LOGITS = torch.tensor([0.0, 3.0, 1.0, 2.0, -1.0])
PROBABILITIES = LOGITS.softmax(-1)
PATHS: list[Sampling] = [TensorSampling()]
if (library := native_library()) is not None:
    PATHS += [NativeSampling(Compiled(library, isa)) for isa in library.isas]


def sequence(params: SamplingParams, drawn: int = 0, name: str = "s") -> Sequence:
    made = Sequence(name, [1], params)
    made.output = [0] * drawn
    return made


def sample(sampler: Sampler, logits: torch.Tensor, sequences: list[Sequence]) -> list[RowResult]:
    """One token for each sequence from its row of logits."""
    return sampler.results(logits, [ScheduledSequence(one, 1, samples=True) for one in sequences])


def draws(params: SamplingParams, count: int) -> list[int]:
    """The first `count` tokens a sequence would get if its logits never changed."""
    sampler = Sampler(PATHS[-1])
    rows = [sequence(params, drawn) for drawn in range(count)]
    return [token.token_id or 0 for token in sample(sampler, LOGITS.expand(count, -1), rows)]


def test_temperature_zero_takes_the_most_likely() -> None:
    assert set(draws(SamplingParams(temperature=0.0), 5)) == {1}


def test_a_first_token_that_is_known_is_taken_and_others_are_looked_for() -> None:
    rows = [ScheduledSequence(sequence(SamplingParams(temperature=0.0)), 1, samples=True) for _ in range(4)]
    logits = LOGITS.expand(4, -1).clone()
    logits[0] = float("nan")  # what is known needs no logits
    logits[3] = float("nan")
    results = Sampler(PATHS[-1]).results(logits, rows, [2, -1, 0, -1])
    assert [result.token_id for result in results] == [2, 1, 0, None] and results[3].error == NOT_FINITE
    unknown = Sampler(PATHS[-1]).results(logits, rows, [-1] * 4)
    assert unknown == Sampler(PATHS[-1]).results(logits, rows)


@pytest.mark.parametrize(
    "asks_more",
    [
        {"temperature": 0.5},
        {"logprobs": 0},
        {"digests": True},
        {"forced": (1,)},
        {"presence_penalty": 0.1},
        {"bad_words": ((3,),)},
    ],
)
def test_only_who_asks_for_no_more_asks_for_the_first_token(asks_more: dict[str, Any]) -> None:
    greedy = SamplingParams(temperature=0.0)
    assert asks_first_token(ScheduledSequence(sequence(greedy), 1, samples=True))
    assert not asks_first_token(ScheduledSequence(sequence(replace(greedy, **asks_more)), 1, samples=True))
    assert not asks_first_token(ScheduledSequence(sequence(greedy), 1, samples=True, num_scored=1))
    assert not asks_first_token(ScheduledSequence(sequence(greedy), 1, samples=False, num_scored=1))


def test_frequencies_follow_the_distribution() -> None:
    count = 5000
    seen = Counter(draws(SamplingParams(seed=7), count))
    for token, probability in enumerate(PROBABILITIES.tolist()):
        error = math.sqrt(probability * (1 - probability) / count)
        assert abs(seen[token] / count - probability) < 5 * error


def test_temperature_sharpens_and_flattens() -> None:
    cold, hot = (Counter(draws(SamplingParams(seed=1, temperature=t), 2000))[1] for t in (0.3, 2.0))
    assert cold > 1800 > 1000 > hot


def test_a_filtered_draw_stays_inside_the_filter() -> None:
    assert set(draws(SamplingParams(seed=3, top_k=2), 500)) == {1, 3}


def test_the_same_seed_gives_the_same_tokens_whatever_else_runs() -> None:
    params = SamplingParams(seed=11)
    alone = draws(params, 30)
    sampler = Sampler(PATHS[-1])
    logits = torch.randn(7, 5)
    logits[4] = LOGITS
    company = []
    for drawn in range(30):
        rows = [sequence(SamplingParams(), name=f"other-{i}") for i in range(7)]
        rows[4] = sequence(params, drawn)
        company.append(sample(sampler, logits, rows)[4].token_id)
    assert company == alone
    assert draws(SamplingParams(seed=12), 30) != alone


def test_without_a_seed_two_sequences_differ() -> None:
    sampler = Sampler(PATHS[-1])
    first, second = (
        [sample(sampler, LOGITS[None], [sequence(SamplingParams(), i, name)])[0].token_id for i in range(40)]
        for name in ("a", "b")
    )
    assert first != second


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63)])
def test_every_seed_gives_numbers_in_range(seed: int) -> None:
    numbers = [uniform(seed, index) for index in range(1000)]
    assert 0 <= min(numbers) and max(numbers) < 1
    assert abs(sum(numbers) / 1000 - 0.5) < 0.05


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_fails_alone(bad: float) -> None:
    logits = LOGITS.repeat(3, 1)
    logits[1, 2] = bad
    rows = [sequence(SamplingParams(temperature=0.0), name=str(i)) for i in range(3)]
    tokens = sample(Sampler(PATHS[-1]), logits, rows)
    assert [token.error is None for token in tokens] == [True, False, True]
    assert tokens[0].token_id == tokens[2].token_id == 1


def test_log_probabilities_are_the_models_own_before_temperature() -> None:
    params = SamplingParams(temperature=0.5, seed=1, logprobs=2)
    token = sample(Sampler(PATHS[-1]), LOGITS[None].bfloat16(), [sequence(params)])[0]
    assert token.logprob is not None
    assert token.logprob.logprob == pytest.approx(math.log(PROBABILITIES[token.token_id]), abs=1e-6)
    assert [index for index, _ in token.logprob.top] == [1, 3]


@pytest.mark.parametrize("sampling", PATHS)
def test_asking_for_no_alternatives_still_reports_the_chosen_one(sampling: Sampling) -> None:
    params = SamplingParams(temperature=0.0, logprobs=0)
    reported = sample(Sampler(sampling), LOGITS[None], [sequence(params)])[0].logprob
    assert reported is not None and reported.top == () and reported.is_greedy
    assert reported.logprob == pytest.approx(math.log(PROBABILITIES[1]), abs=1e-6)


@pytest.mark.parametrize("sampling", PATHS)
def test_every_sequence_hears_what_it_asked_and_nothing_of_its_neighbours(sampling: Sampling) -> None:
    """Sequences that want none, few or many alternatives, score text, and fail, in one step and each alone."""
    asked = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.0, logprobs=3),
        SamplingParams(seed=5, logprobs=1),
        SamplingParams(temperature=0.0, logprobs=0, prompt_logprobs=2),
        SamplingParams(temperature=0.0, logprobs=2),
        SamplingParams(seed=9, top_p=0.9, top_k=4, logprobs=0),
    ]
    prompt = [3, 1, 4, 1]
    made = [Sequence(str(index), list(prompt), params) for index, params in enumerate(asked)]
    rows = [
        ScheduledSequence(one, 4, samples=True, num_scored=4 if index == 3 else 0) for index, one in enumerate(made)
    ]
    counts = [row.num_logits for row in rows]
    padded = torch.randn(sum(counts), 32, generator=torch.Generator().manual_seed(0)) * 2
    padded[-2, 6] = float("nan")  # of the fifth
    padded[:, 7:] = 99.0  # what pads a row is no token
    logits = padded[:, :7]
    together = Sampler(sampling).results(logits, rows)
    start = 0
    for row, count, found in zip(rows, counts, together, strict=True):
        assert Sampler(sampling).results(logits[start : start + count].contiguous(), [row]) == [found]
        start += count
    assert [found.error is None for found in together] == [True] * 4 + [False, True]
    assert together[0].logprob is None and together[4] == RowResult(error=NOT_FINITE)
    assert [len(found.logprob.top) for found in together if found.logprob is not None] == [3, 1, 0, 0]
    expected = logits.double().log_softmax(-1)
    scores = together[3].scores
    assert [(one.token_id, len(one.top)) for one in scores] == [(1, 2), (4, 2), (1, 2)]
    for index, one in enumerate(scores):
        assert one.logprob == pytest.approx(float(expected[3 + index, one.token_id]), abs=1e-6)
        assert [token for token, _ in one.top] == expected[3 + index].topk(2).indices.tolist()
        assert one.is_greedy == (one.token_id == int(expected[3 + index].argmax()))


def test_forced_tokens_are_the_reply_and_are_scored_beside_the_likeliest() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0]] * 2)
    one = Sequence("forced", [1], SamplingParams(temperature=0.0, logprobs=1, max_tokens=2, forced=(2, 1)))
    first = sample(Sampler(PATHS[-1]), logits[:1], [one])[0]
    assert first.token_id is not None
    one.output.append(first.token_id)
    second = sample(Sampler(PATHS[-1]), logits[:1], [one])[0]
    assert [first.token_id, second.token_id] == [2, 1]
    assert first.logprob is not None and second.logprob is not None
    ((best, value),) = first.logprob.top
    assert best == 1 and value == second.logprob.logprob > first.logprob.logprob


def test_a_digest_tells_the_smallest_difference_in_any_logit() -> None:
    params = SamplingParams(temperature=0.0, max_tokens=1, digests=True)
    logits = torch.zeros(3, 1000)
    logits[:, 5] = 80.0
    logits[1, 7] = -1e-30  # far too unlikely to show in any log probability
    tokens = sample(Sampler(PATHS[-1]), logits, [Sequence(str(row), [1], params) for row in range(3)])
    assert tokens[0].digest == tokens[2].digest != tokens[1].digest
    assert sample(Sampler(PATHS[-1]), logits[:1], [Sequence("x", [1], SamplingParams())])[0].digest is None
