"""What options make of logits, token by token, beside a slow reference over the whole reply and beside transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from loramux_server.engine.logit_rules import BadWords, LogitRules
from loramux_server.engine.scheduling.sequence import SamplingParams, Sequence
from loramux_server.errors import GrammarFailed
from loramux_server.kernels.compiled.sampling import TensorSampling
from support.grammars import FakeGrammar

WIDTH = 70
NEVER = float("-inf")
tokens = st.integers(0, 5) | st.integers(0, WIDTH - 1)
penalties = st.sampled_from([0.0, 0.4, -1.5, 2.0])


def logits_of(seed: int) -> torch.Tensor:
    return torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(seed)) * 3


def changed(rules: LogitRules, logits: torch.Tensor) -> torch.Tensor:
    change = rules.change(0)
    return logits[0] if change is None else TensorSampling().changed(logits, [change])[0]


def slow_reference(sequence: Sequence, logits: torch.Tensor) -> torch.Tensor:
    """From the whole prompt and reply, a token of the vocabulary at a time."""
    params, reply = sequence.params, sequence.output
    values = []
    for token, logit in enumerate(logits[0].numpy()):
        value = logit + np.float32(dict(params.logit_bias).get(token, 0.0))
        if params.repetition_penalty != 1.0 and token in (*sequence.prompt, *reply):
            factor = np.float32(params.repetition_penalty)
            value = value / factor if value > 0 else value * factor
        times = reply.count(token)
        if times:
            value = value - np.float32(params.frequency_penalty * times + params.presence_penalty)
        if params.allowed_token_ids is not None and token not in (*params.allowed_token_ids, *params.stop_token_ids):
            value = NEVER
        if len(reply) < params.min_tokens and token in params.stop_token_ids:
            value = NEVER
        text = (*reply, token)
        if any(word == text[-len(word) :] for word in params.bad_words):
            value = NEVER
        values.append(value)
    return torch.tensor(np.array(values, dtype=np.float32))


@given(
    prompt=st.lists(tokens, min_size=1, max_size=8),
    reply=st.lists(tokens, max_size=30),
    looked=st.sets(st.integers(0, 30)),
    params=st.builds(
        SamplingParams,
        presence_penalty=penalties,
        frequency_penalty=penalties,
        repetition_penalty=st.sampled_from([1.0, 1.0, 1.2, 0.5]),
        logit_bias=st.dictionaries(tokens, st.sampled_from([-100.0, 0.3, 100.0]), max_size=4).map(
            lambda bias: tuple(bias.items())
        ),
        allowed_token_ids=st.none() | st.lists(tokens, min_size=1, max_size=9).map(tuple),
        bad_words=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4).map(tuple), max_size=6).map(tuple),
        min_tokens=st.integers(0, 12),
        stop_token_ids=st.frozensets(tokens, max_size=3),
    ),
    seed=st.integers(0, 9),
)
@settings(max_examples=200, deadline=None)
def test_token_by_token_it_is_what_the_whole_reply_makes_it(
    prompt: list[int], reply: list[int], looked: set[int], params: SamplingParams, seed: int
) -> None:
    sequence, logits = Sequence("s", prompt, params), logits_of(seed)
    rules = LogitRules(sequence, WIDTH)
    for index in range(len(reply) + 1):
        if index in looked or index == len(reply):  # it may be asked at some tokens only
            assert torch.equal(changed(rules, logits), slow_reference(sequence, logits))
        sequence.output += reply[index : index + 1]


@given(
    words=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5).map(tuple), max_size=8),
    text=st.lists(st.integers(0, 3), max_size=40),
)
@settings(max_examples=300, deadline=None)
def test_bad_words_that_overlap_are_all_found(words: list[tuple[int, ...]], text: list[int]) -> None:
    bad, node = BadWords(words, 4), 0
    for end in range(len(text) + 1):
        expected = {
            word[-1] for word in words if len(word) <= end + 1 and word[:-1] == tuple(text[end + 1 - len(word) : end])
        }
        assert bad.forbidden(node).tolist() == sorted(expected)
        node = bad.after(node, text[end]) if end < len(text) else node


@pytest.mark.parametrize("penalty", [1.3, 0.6])
def test_the_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    prompt, reply = [3, 3, 9, 12], [5, 9, 69]
    sequence = Sequence("s", prompt, SamplingParams(repetition_penalty=penalty))
    sequence.output = reply
    for seed in range(5):
        logits = logits_of(seed)
        theirs = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt + reply]), logits.clone())
        assert torch.equal(changed(LogitRules(sequence, WIDTH), logits), theirs[0])


def test_bad_words_and_min_tokens_are_those_of_transformers() -> None:
    words, stop, prompt = [[4], [7, 8], [7, 8, 9]], 11, [1, 2]
    params = SamplingParams(
        bad_words=tuple(map(tuple, words)), min_tokens=3, stop_token_ids=frozenset([stop]), temperature=0.0
    )
    sequence = Sequence("s", prompt, params)
    rules, logits = LogitRules(sequence, WIDTH), logits_of(0)
    oracles: list[Any] = [
        NoBadWordsLogitsProcessor(words, eos_token_id=stop),
        MinNewTokensLengthLogitsProcessor(len(prompt), 3, stop),
    ]
    for token in (7, 8, 7, 7, 8, 3):
        ids, theirs = torch.tensor([prompt + sequence.output]), logits.clone()
        for oracle in oracles:
            theirs = oracle(ids, theirs)
        assert torch.equal(changed(rules, logits), theirs[0])
        sequence.output.append(token)


def test_penalties_are_those_that_openai_documents() -> None:
    """mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence, of what was sampled so far."""
    sequence = Sequence("s", [5, 5], SamplingParams(frequency_penalty=0.5, presence_penalty=0.75))
    sequence.output = [7, 7, 8]
    logits = logits_of(1)
    expected = logits[0].clone()
    expected[7] -= 2 * 0.5 + 0.75
    expected[8] -= 0.5 + 0.75
    assert torch.equal(changed(LogitRules(sequence, WIDTH), logits), expected)


def test_tokens_outside_the_vocabulary_change_nothing() -> None:
    params = SamplingParams(
        logit_bias=((WIDTH, 5.0), (-1, 5.0)),
        bad_words=((WIDTH,), (3, WIDTH)),
        min_tokens=2,
        stop_token_ids=frozenset([WIDTH + 7]),
    )
    assert params.changes_logits
    assert LogitRules(Sequence("s", [1], params), WIDTH).change(0) is None


@pytest.mark.parametrize("words", [None, 1, 9])
def test_a_grammar_allows_what_the_request_allows_too(words: int | None) -> None:
    """Its mask may have fewer bits than there are logits, or more; what it has none for may not come."""
    allowed = (3, 20, 40, 69)
    grammar = FakeGrammar(WIDTH, {None: [20, 40, 50]}, words=words)
    sequence = Sequence("s", [1], SamplingParams(grammar=grammar, allowed_token_ids=allowed))
    logits = logits_of(0)
    found = changed(LogitRules(sequence, WIDTH), logits)
    assert np.flatnonzero(found > NEVER).tolist() == ([20] if words == 1 else [20, 40])
    alone = Sequence("s", [1], SamplingParams(grammar=grammar))
    found = changed(LogitRules(alone, WIDTH), logits)
    assert np.flatnonzero(found > NEVER).tolist() == ([20] if words == 1 else [20, 40, 50])
    grammar.advance(20)
    with pytest.raises(GrammarFailed, match="dead end behind 20"):
        LogitRules(alone, WIDTH).change(0)


def test_a_reply_that_is_forced_is_changed_by_nothing() -> None:
    params = SamplingParams(presence_penalty=1.0, min_tokens=4, forced=(1,), max_tokens=1)
    assert not params.changes_logits
    assert not SamplingParams().changes_logits
