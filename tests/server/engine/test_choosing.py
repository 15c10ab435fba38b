"""Tokens of sequences whose options change their logits: each alone as in company, on every set of kernels."""

from __future__ import annotations

from collections.abc import Sequence as ReadOnlyList
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux_adapters.device.cpu import CpuDevice
from loramux_adapters.lora.slots import ScaledSlot, Slot, SlotTable
from loramux_adapters.lora.weights import load_host_adapter
from loramux_server.base.loader import load_base_model
from loramux_server.engine.engine import Engine
from loramux_server.engine.inbox import Inbox
from loramux_server.engine.logit_rules import LogitRules
from loramux_server.engine.sampler import Sampler
from loramux_server.engine.scheduling.admission import SchedulerConfig
from loramux_server.engine.scheduling.kv_blocks import KVBlocks
from loramux_server.engine.scheduling.scheduler import Scheduler
from loramux_server.engine.scheduling.sequence import (
    NOT_FINITE,
    NOTHING_ALLOWED,
    Batch,
    RowResult,
    SamplingParams,
    ScheduledSequence,
    Sequence,
    TokenOutput,
)
from loramux_server.kernels.attention.kv_cache import BLOCK_SIZE
from loramux_server.kernels.choice import available_kernels, choose_kernels
from loramux_server.kernels.compiled.library import Compiled, native_library
from loramux_server.kernels.compiled.logit_changes import MOST_CHANGES
from loramux_server.kernels.compiled.sampling import NativeSampling, Sampling, TensorSampling
from support.adapter_files import write_adapter
from support.fakes_engine import FakeHost, FakeMetrics
from support.grammars import FakeGrammar
from support.stepping import Stepper
from support.tiny_models import save_tiny_model

CPU = CpuDevice()
SETS = [
    name
    for name in ("native", "native-avx2", "native-avx512", "native-portable", "modules", "tensor", "reference")
    if name in available_kernels(CPU)
]
PATHS: list[Sampling] = [TensorSampling()]
if (library := native_library()) is not None:
    PATHS += [NativeSampling(Compiled(library, isa)) for isa in library.isas]
GREEDY = SamplingParams(temperature=0.0, max_tokens=64)


def sample(sampler: Sampler, logits: torch.Tensor, sequences: ReadOnlyList[Sequence]) -> list[RowResult]:
    """A token for each sequence from its row of logits."""
    return sampler.results(logits, [ScheduledSequence(one, 1, samples=True) for one in sequences])


def one_of(params: SamplingParams, name: str = "s", prompt: ReadOnlyList[int] = (1,)) -> Sequence:
    return Sequence(name, list(prompt), params)


@pytest.mark.parametrize("sampling", PATHS)
def test_a_penalised_reply_differs_and_its_log_probabilities_are_the_models(sampling: Sampling) -> None:
    logits = torch.tensor([[0.0, 3.0, 2.5, 2.0]])
    one = one_of(replace(GREEDY, presence_penalty=1.0, logprobs=2))
    sampler, found = Sampler(sampling), []
    for _ in range(4):
        found.append(sample(sampler, logits, [one])[0])
        one.output.append(found[-1].token_id or 0)
    assert [each.token_id for each in found] == [1, 2, 1, 1]
    told = [each.logprob for each in found if each.logprob is not None]
    assert [each.is_greedy for each in told] == [True, False, True, True]
    expected = logits[0].double().log_softmax(0)
    for each in told:
        assert each.logprob == pytest.approx(float(expected[each.token_id]), abs=1e-6)
        assert [token for token, _ in each.top] == [1, 2]


@pytest.mark.parametrize("sampling", PATHS)
def test_a_row_for_which_nothing_is_left_ends_alone_and_says_why(sampling: Sampling) -> None:
    grammar = FakeGrammar(4, {None: [3]})
    asked = [
        GREEDY,
        replace(GREEDY, allowed_token_ids=(0, 1), bad_words=((0,), (1,))),
        replace(GREEDY, grammar=FakeGrammar(4, {})),
        replace(GREEDY, grammar=grammar),
        replace(GREEDY, allowed_token_ids=(9,), temperature=1.0),
        replace(GREEDY, presence_penalty=1.0),
        replace(GREEDY, grammar=FakeGrammar(4, {}), forced=(2,), max_tokens=1),
        replace(GREEDY, grammar=FakeGrammar(4, {None: [1]}), bad_words=((1,),), temperature=0.7, top_k=3),
    ]
    logits = torch.tensor([[0.0, 3.0, 2.5, 2.0]]).repeat(len(asked), 1)
    logits[5, 0] = float("nan")
    found = sample(Sampler(sampling), logits, [one_of(params, str(i)) for i, params in enumerate(asked)])
    dead_end = "the grammar has come to a dead end behind None"
    expected = [None, NOTHING_ALLOWED, dead_end, None, NOTHING_ALLOWED, NOT_FINITE, None, NOTHING_ALLOWED]
    assert [each.error for each in found] == expected
    assert [each.is_impossible for each in found] == [each not in (None, NOT_FINITE) for each in expected]
    assert [each.token_id for each in found] == [1, None, None, 3, None, None, 2, None]


@pytest.mark.parametrize("sampling", PATHS)
def test_more_rows_than_are_changed_at_a_time_are_told_what_each_is_alone(sampling: Sampling) -> None:
    count = 2 * MOST_CHANGES + 3
    logits = torch.randn(count, 50, generator=torch.Generator().manual_seed(0))
    asked = [
        SamplingParams(temperature=0.8 * (index % 2), seed=index, logprobs=1, allowed_token_ids=(index % 50, 7))
        for index in range(count)
    ]
    found = sample(Sampler(sampling), logits, [one_of(params, str(i)) for i, params in enumerate(asked)])
    for index, params in enumerate(asked):
        assert sample(Sampler(sampling), logits[index : index + 1], [one_of(params)]) == [found[index]]
        assert found[index].token_id in (index % 50, 7)


def test_what_is_counted_of_a_reply_is_forgotten_with_it() -> None:
    sampler = Sampler(PATHS[-1])
    sequences = [one_of(replace(GREEDY, presence_penalty=1.0), str(i)) for i in range(3)]
    sample(sampler, torch.zeros(3, 5), sequences)
    assert len(sampler._rules) == 3
    del sequences[1:]
    assert len(sampler._rules) == 1


def test_a_row_whose_options_change_nothing_now_is_taken_as_it_is() -> None:
    """Before the reply has its least length stop tokens are forbidden, and nothing is copied from then on."""

    class Counting(NativeSampling):
        changed_rows = 0

        def changed(self, logits: torch.Tensor, changes: ReadOnlyList[object]) -> torch.Tensor:
            Counting.changed_rows += len(changes)
            return PATHS[-1].changed(logits, changes)  # type: ignore[arg-type]

    assert library is not None
    one = one_of(replace(GREEDY, min_tokens=1, stop_token_ids=frozenset([1])))
    plain, sampler = one_of(GREEDY, "plain"), Sampler(Counting(library.best))
    logits = torch.tensor([[0.0, 3.0, 2.0]] * 2)
    assert [each.token_id for each in sample(sampler, logits, [one, plain])] == [2, 1]
    one.output.append(2)
    assert [each.token_id for each in sample(sampler, logits, [one, plain])] == [1, 1]
    assert Counting.changed_rows == 1


WIDTH = 40
tokens = st.integers(0, 6) | st.integers(0, WIDTH - 1)
grammars = st.sampled_from([None, None, (1, 2, 3), tuple(range(0, WIDTH, 3)), ()])


@st.composite
def options(draw: st.DrawFn) -> tuple[SamplingParams, tuple[int, ...] | None]:
    """How a sequence is sampled, and what its grammar allows."""
    params = SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.0, 0.7, 2.0])),
        top_k=draw(st.sampled_from([0, 1, 3, 1000])),
        top_p=draw(st.sampled_from([1.0, 0.9, 0.0, 0.9999999])),
        min_p=draw(st.sampled_from([0.0, 0.1, 1.0])),
        presence_penalty=draw(st.sampled_from([0.0, 0.0, 0.7, -2.0])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.0, 0.3])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.4])),
        logit_bias=tuple(draw(st.dictionaries(tokens, st.sampled_from([-100.0, 2.0, 100.0]), max_size=2)).items()),
        allowed_token_ids=draw(st.none() | st.lists(tokens, min_size=1, max_size=5).map(tuple)),
        bad_words=tuple(draw(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=3).map(tuple), max_size=3))),
        min_tokens=draw(st.sampled_from([0, 0, 3])),
        stop_token_ids=draw(st.frozensets(tokens, max_size=2)),
        seed=draw(st.integers(0, 5)),
        max_tokens=9,
        logprobs=draw(st.sampled_from([None, 0, 3])),
    )
    return params, draw(grammars)


def slow_choice(sequence: Sequence, logits: torch.Tensor) -> int | None:
    """By a change made from the whole reply and PyTorch's operations; None where nothing may be chosen."""
    change = LogitRules(sequence, WIDTH).change(0) if sequence.params.changes_logits else None
    slow = TensorSampling()
    changed = logits[None] if change is None else slow.changed(logits[None], [change])
    if not slow.search(changed)[1][0]:
        return None
    ask = Sampler(slow).ask(0, ScheduledSequence(sequence, 1, samples=True))
    return int(slow.search(changed)[0][0] if ask.draw is None else slow.draw(changed, [ask.draw])[0])


@given(asked=st.lists(options(), min_size=1, max_size=7), seed=st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_replies_of_any_options_are_those_of_the_slow_reference_alone_and_in_company(
    asked: list[tuple[SamplingParams, tuple[int, ...] | None]], seed: int
) -> None:
    def made() -> list[Sequence]:
        return [
            one_of(
                params if allowed is None else replace(params, grammar=Anything(allowed)), str(i), prompt=[i, 3, i + 1]
            )
            for i, (params, allowed) in enumerate(asked)
        ]

    class Anything:
        """A grammar by which any of some tokens may always come."""

        ended = False

        def __init__(self, allowed: tuple[int, ...]) -> None:
            self._grammar = FakeGrammar(WIDTH, {None: allowed})
            self.mask = self._grammar.mask

        def advance(self, token: int) -> None: ...

    random = torch.Generator().manual_seed(seed)
    steps = [torch.randn(len(asked), WIDTH, generator=random) * 3 for _ in range(6)]
    for sampling in PATHS:
        company, alone = made(), made()
        together, single = Sampler(sampling), [Sampler(sampling) for _ in alone]
        for logits in steps:
            found = sample(together, logits, company)
            for at, (one, other, result) in enumerate(zip(company, alone, found, strict=True)):
                assert sample(single[at], logits[at : at + 1], [other]) == [result]
                expected = slow_choice(one, logits[at])
                assert result.token_id == expected
                assert result.error == (NOTHING_ALLOWED if expected is None else None)
                one.output.append(expected or 0)
                other.output.append(expected or 0)


SLOTS = [None, Slot(0, 8), Slot(16, 16), (ScaledSlot(Slot(16, 16), 0.7), ScaledSlot(Slot(0, 8), -0.4))]
OPTIONS = [
    GREEDY,
    replace(GREEDY, presence_penalty=0.7, frequency_penalty=0.4, logprobs=3),
    replace(GREEDY, temperature=0.9, seed=5, top_p=0.95, repetition_penalty=1.3, logprobs=0),
    replace(GREEDY, temperature=0.9, seed=6, top_k=9),
    replace(GREEDY, temperature=1.5, seed=7, allowed_token_ids=tuple(range(40, 90)), bad_words=((40,), (41, 42))),
    replace(GREEDY, logit_bias=((7, 100.0), (9, 99.0)), bad_words=((7, 7),), min_tokens=3),
]
GRAMMAR = {None: range(10, 60), **{token: range(token % 7, 256, 3) for token in range(256)}}


@pytest.mark.skipif("native" not in SETS, reason="there is no compiled step here")
def test_draws_that_share_a_prompt_are_those_of_each_alone(tmp_path: Path) -> None:
    base = load_base_model(
        str(save_tiny_model(tmp_path / "base")), device=CPU, cache_dir=tmp_path / "cache", report=lambda line: None
    )
    runner = Stepper(base.model, blocks=64, kernels="native").runner
    prompt = list(range(3, 43))  # two blocks of 16 and a part of a third
    asked = [replace(OPTIONS[index % 4], seed=index, max_tokens=6) for index in range(5)]

    def replies(sequences: list[Sequence], kept: int) -> dict[str, list[TokenOutput]]:
        config = SchedulerConfig(max_num_seqs=3, max_batch_tokens=16)
        scheduler = Scheduler(config, KVBlocks(64, BLOCK_SIZE, max_kept=kept), SlotTable(8), FakeHost())
        engine = Engine(scheduler, runner, Inbox(16), FakeMetrics())
        outputs: dict[str, list[TokenOutput]] = {one.id: [] for one in sequences}

        def deliver(delivered: list[tuple[str, TokenOutput]]) -> None:
            for name, output in delivered:
                outputs[name].append(output)

        engine.submit(*sequences)
        engine.work_off(deliver)
        return outputs

    first, *others = [one_of(params, str(index), prompt) for index, params in enumerate(asked)]
    for one in others:
        one.shares_prompt_with = first.id
    together = replies([first, *others], 16)
    assert [found[0].cached_tokens for found in together.values()] == [0, 32, 32, 32, 32]
    for index, params in enumerate(asked):
        alone = replies([one_of(params, str(index), prompt)], 0)[str(index)]
        told = [[(one.token_id, one.logprob) for one in outputs] for outputs in (alone, together[str(index)])]
        assert told[0] == told[1]


@pytest.mark.parametrize("kernels", SETS)
def test_a_mixed_batch_gives_every_reply_the_tokens_it_has_alone(kernels: str, tmp_path: Path) -> None:
    base = load_base_model(
        str(save_tiny_model(tmp_path / "base")),
        device=CPU,
        cache_dir=tmp_path / "cache",
        report=lambda line: None,
        kernels=choose_kernels(CPU, kernels),
    )
    stepper = Stepper(base.model, kernels=kernels)
    for index, slot in enumerate((Slot(0, 8), Slot(16, 16))):
        directory = write_adapter(tmp_path / str(index), dict(base.linears), rank=slot.rank, seed=index, std_b=0.2)
        stepper.load(slot, load_host_adapter(directory))
    kinds = [(params, slot) for params in OPTIONS for slot in SLOTS]
    kinds += [(replace(OPTIONS[-4], seed=i), slot) for i, slot in enumerate(SLOTS)]
    grammatical = range(len(kinds) - len(SLOTS), len(kinds))

    def made() -> list[Sequence]:
        found = []
        for index, (params, slot) in enumerate(kinds):
            if index in grammatical:
                params = replace(params, grammar=FakeGrammar(256, GRAMMAR))
            found.append(stepper.sequence(str(index), [5 + index, 7, 5], slot, replace(params, max_tokens=8)))
        return found

    def run(sequences: list[Sequence]) -> list[list[RowResult]]:
        seen: list[list[RowResult]] = [[] for _ in sequences]
        for _ in range(8):
            rows = [ScheduledSequence(one, one.num_tokens - one.num_computed, samples=True) for one in sequences]
            results = stepper.runner.start(Batch(rows)).results()
            for one, result, its in zip(sequences, results, seen, strict=True):
                assert result.token_id is not None
                one.num_computed = one.num_tokens
                one.output.append(result.token_id)
                if one.params.grammar is not None:
                    one.params.grammar.advance(result.token_id)
                its.append(result)
        for one in sequences:
            stepper.release(one)
        return seen

    by_slots = sorted(made(), key=lambda one: one.slots)
    company = dict(zip((one.id for one in by_slots), run(by_slots), strict=True))
    assert [run([one])[0] for one in made()] == [company[str(index)] for index in range(len(kinds))]
    plain = [[result.token_id for result in company[str(index)]] for index in range(len(SLOTS))]
    assert all(
        [result.token_id for result in company[str(index)]] not in plain for index in range(len(SLOTS), len(kinds))
    )
