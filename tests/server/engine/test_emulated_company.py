"""What a row of a step is told, whatever is asked for beside it: by the device's kernels, or by the host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from support import triton_interpreter

if triton_interpreter.INSTALLED:
    triton_interpreter.prepare()
else:
    pytest.skip(triton_interpreter.WHY_NOT, allow_module_level=True)

from loramux_adapters.lora.host_cache import HostAdapter
from loramux_adapters.lora.slot_copy import StagedCopySlot
from loramux_adapters.lora.slots import Slot, SlotTable
from loramux_server.base.loader import load_base_model
from loramux_server.engine.engine import Engine
from loramux_server.engine.inbox import Inbox
from loramux_server.engine.model_runner import StartedStep
from loramux_server.engine.scheduling.admission import SchedulerConfig
from loramux_server.engine.scheduling.kv_blocks import KVBlocks
from loramux_server.engine.scheduling.scheduler import Scheduler
from loramux_server.engine.scheduling.sequence import (
    NOTHING_ALLOWED,
    Batch,
    FinishReason,
    RowResult,
    SamplingParams,
    ScheduledSequence,
    Sequence,
    SlotLoad,
    TokenOutput,
)
from loramux_server.engine.start_check import Checker
from loramux_server.kernels.attention.kv_cache import BLOCK_SIZE
from loramux_server.kernels.compiled.logit_changes import MOST_CHANGES
from loramux_server.kernels.gpu.cuts import ChangeSizes
from support.emulated import EmulatedDevice
from support.fakes_engine import FakeHost, FakeMetrics
from support.grammars import FakeGrammar, LateGrammar
from support.stepping import Stepper
from support.tiny_models import save_tiny_model

VOCABULARY = 320
STEPS = SchedulerConfig(max_num_seqs=3, max_batch_tokens=16)
ASKED = (
    SamplingParams(temperature=0.0, logprobs=20),
    SamplingParams(temperature=0.9, seed=5, top_p=0.9, logprobs=2),
    SamplingParams(temperature=1.3, seed=6, logprobs=20, prompt_logprobs=20),
)
OF_THE_HOST = (
    SamplingParams(temperature=0.0, logprobs=1, digests=True),
    SamplingParams(temperature=0.0, logprobs=25),
    SamplingParams(temperature=0.0, max_tokens=1, continuations=tuple((token, token + 1) for token in range(40))),
)
ALLOWED = tuple(range(5, 300, 7))
CHANGED = (
    SamplingParams(temperature=0.0, logprobs=2, allowed_token_ids=ALLOWED),
    SamplingParams(temperature=0.9, seed=5, logprobs=0, repetition_penalty=1.4, allowed_token_ids=ALLOWED),
    SamplingParams(temperature=1.3, seed=6, top_k=9, allowed_token_ids=ALLOWED, bad_words=((5,), (12,))),
    SamplingParams(temperature=0.7, seed=7, top_p=0.9, logit_bias=((40, 60.0),), bad_words=((40,),)),
)
TOKENS = 5  # of a prompt


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("company")
    save_tiny_model(directory / "base", num_hidden_layers=1, initializer_range=0.5)  # so that logits are far apart
    return directory


def stepper_of(files: Path, rows: int, config: SchedulerConfig) -> Stepper:
    """On a base of its own. `rows`: of the adapters' memory."""
    device = EmulatedDevice(kernels="triton")
    base = load_base_model(str(files / "base"), device=device, cache_dir=files / "cache", report=lambda _: None)
    return Stepper(base.model, rows=rows, blocks=64, device=device, config=config)


@pytest.fixture(scope="module")
def stepper(files: Path) -> Stepper:
    return stepper_of(files, 0, STEPS)


def told(stepper: Stepper, first: int, *asked: SamplingParams) -> list[RowResult]:
    """Of prompts that are read in one step side by side; `first`: their first token."""
    rows = []
    for params in asked:
        sequence = stepper.sequence(f"a-{params.temperature}", range(first, first + TOKENS), params=params)
        scored = TOKENS if params.prompt_logprobs is not None else int(bool(params.continuations))
        rows.append(ScheduledSequence(sequence, TOKENS, samples=True, num_scored=scored))
    results = stepper.runner.start(Batch(rows)).results()
    for row in rows:
        stepper.release(row.sequence)
    return results


@pytest.mark.parametrize("other", OF_THE_HOST, ids=["digests", "many logprobs", "continuations"])
def test_a_row_is_told_the_same_beside_one_that_is_the_hosts(stepper: Stepper, other: SamplingParams) -> None:
    for first in range(0, 90, 30):
        for params in ASKED:
            alone = told(stepper, first, params)
            assert alone[0].error is None
            assert told(stepper, first, params, other)[0] == alone[0]


def test_a_row_whose_logits_are_changed_is_told_the_same_alone_and_in_company(stepper: Stepper) -> None:
    for first in range(0, 90, 30):
        alone = [told(stepper, first, params)[0] for params in (*CHANGED, *ASKED)]
        assert told(stepper, first, *CHANGED) == alone[: len(CHANGED)]
        assert [told(stepper, first, params, CHANGED[0])[0] for params in ASKED] == alone[len(CHANGED) :]
        assert told(stepper, first, ASKED[2], CHANGED[1])[1] == alone[1]
        assert all(result.token_id in ALLOWED for result in alone[:3])
        assert alone[3].token_id != 40
        assert [result.logprob is None for result in alone[:4]] == [False, False, True, True]
        assert alone[0].logprob is not None and alone[0].logprob.top == (alone[4].logprob or alone[0].logprob).top[:2]


def many(rows: int) -> list[SamplingParams]:
    """With more edits than one launch takes, log probabilities, draws, and rows for which nothing is left."""
    random = torch.Generator().manual_seed(3)
    biases = (torch.randn(rows, VOCABULARY, generator=random) * 2).tolist()
    found = [
        SamplingParams(
            temperature=0.6 * (at % 3),
            seed=at,
            top_k=20 * (at % 2),
            top_p=0.95,
            logprobs=(None, 0, 3)[at % 3],
            logit_bias=tuple(enumerate(its)),
            repetition_penalty=1.0 + at % 2,
            allowed_token_ids=ALLOWED if at % 4 else None,
            max_tokens=8,
        )
        for at, its in enumerate(biases)
    ]
    found[5] = replace(found[5], allowed_token_ids=(5, 12), bad_words=((5,), (12,)))
    found[9] = replace(found[9], grammar=FakeGrammar(VOCABULARY, {}))
    return found


def test_one_answer_for_many_changed_rows_is_what_the_host_finds_in_several(files: Path) -> None:
    """More rows than are changed together; a row with digests has its whole step answered by the host's questions."""
    count = 2 * MOST_CHANGES + 3
    stepper = stepper_of(files, 0, SchedulerConfig(max_num_seqs=count + 1, max_batch_tokens=TOKENS * (count + 1)))
    device = stepper.device
    assert isinstance(device, EmulatedDevice)
    begin = len(device.started)
    found = told(stepper, 0, *many(count))
    started = device.started[begin:]
    assert [found[5].error, found[9].error] == [NOTHING_ALLOWED, "the grammar has come to a dead end behind None"]
    assert [at for at, each in enumerate(found) if each.error is not None] == [5, 9]
    assert all(found[at].is_impossible for at in (5, 9))
    assert found == told(stepper, 0, *many(count), OF_THE_HOST[0])[:-1]
    adopted = [at for at, work in enumerate(started) if work == ("launch", "_adopt")]
    assert len(adopted) == 3
    assert started[adopted[-1] + 1 :] == [("copy", "")], "one answer"
    edits = [len(params.logit_bias) for params in many(count)]
    assert sum(edits[:MOST_CHANGES]) > ChangeSizes(MOST_CHANGES, VOCABULARY).edits


def test_a_row_whose_mask_is_late_tells_its_scores_and_no_token(stepper: Stepper) -> None:
    """All masks of a step are waited for together; the other rows are what they are without it."""
    grammars = [LateGrammar(VOCABULARY) for _ in range(2)]
    late = [SamplingParams(temperature=0.0, prompt_logprobs=2, grammar=grammar) for grammar in grammars]
    alone = told(stepper, 30, CHANGED[1])[0]
    found = told(stepper, 30, CHANGED[1], *late)
    assert found[0] == alone
    for result, grammar in zip(found[1:], grammars, strict=True):
        assert (result.is_late, result.token_id, result.error, grammar.late) == (True, None, None, 1)
        grammar.open()
    opened = told(stepper, 30, CHANGED[1], *late)
    free = told(stepper, 30, replace(late[0], grammar=None))[0]
    assert opened == [alone, free, free] and free.token_id is not None
    assert [result.scores for result in found[1:]] == [free.scores] * 2 and len(free.scores) == TOKENS - 1
    assert told(stepper, 30, replace(late[0], grammar=LateGrammar(VOCABULARY)), OF_THE_HOST[0])[0] == found[1]


def test_who_sits_steps_out_on_a_device_has_the_reply_of_who_need_not(stepper: Stepper) -> None:
    params = SamplingParams(temperature=0.9, seed=8, logprobs=1, max_tokens=6)
    grammar, others = LateGrammar(VOCABULARY), SamplingParams(temperature=0.0, max_tokens=9)
    alone = {name: replies(stepper, {name: its})[name] for name, its in (("held", params), ("other", others))}

    def open_late(delivered: list[tuple[str, TokenOutput]]) -> None:
        if sum(name == "other" for name, _ in delivered) and grammar.late:
            grammar.open()

    held = {"held": replace(params, grammar=grammar), "other": others}
    assert replies(stepper, held, heard=open_late) == alone
    assert grammar.late == 1 and len(grammar.heard) == 6


def test_steps_that_are_changed_whatever_was_chosen_are_started_ahead(stepper: Stepper) -> None:
    asked = {
        "biased": SamplingParams(temperature=0.0, logprobs=1, max_tokens=6, logit_bias=((40, 3.0), (41, -100.0))),
        "long": SamplingParams(
            temperature=0.9, seed=3, max_tokens=6, min_tokens=4, stop_token_ids=frozenset(range(200))
        ),
        "few": SamplingParams(temperature=1.1, seed=4, max_tokens=6, allowed_token_ids=ALLOWED),
    }
    alone = {name: replies(stepper, {name: params})[name] for name, params in asked.items()}
    runner, seen = stepper.runner, []

    class Watching:
        """A runner that tells which steps may be overtaken."""

        def start(self, batch: Batch) -> StartedStep:
            step = runner.start(batch)
            seen.append((step.ahead, any(row.follows for row in batch.rows)))
            return step

    stepper.runner = Watching()  # type: ignore[assignment]
    try:
        assert replies(stepper, asked) == alone
        assert all(ahead for ahead, _ in seen) and sum(follows for _, follows in seen) >= 5
        seen.clear()
        replies(stepper, {"penalty": replace(asked["biased"], presence_penalty=0.1)})
        assert seen and not any(ahead or follows for ahead, follows in seen)
    finally:
        stepper.runner = runner
    long = [one.token_id for one in alone["long"]]
    assert len(long) >= 4 and all(token is not None and token >= 200 for token in long[:4])
    assert all(one.token_id in ALLOWED for one in alone["few"])


def replies(
    stepper: Stepper,
    asked: dict[str, SamplingParams],
    heard: Callable[[list[tuple[str, TokenOutput]]], None] = lambda delivered: None,
) -> dict[str, list[TokenOutput]]:
    """Of prompts that an engine works off together, with what each token was told; `heard` is told of all as well."""
    blocks, slots = KVBlocks(32, BLOCK_SIZE), SlotTable(8)
    scheduler = Scheduler(STEPS, blocks, slots, FakeHost())
    engine = Engine(scheduler, stepper.runner, Inbox(8), FakeMetrics())
    outputs: dict[str, list[TokenOutput]] = {name: [] for name in asked}
    for name, params in asked.items():
        grammar = params.grammar
        if isinstance(grammar, FakeGrammar) and not isinstance(grammar, LateGrammar):  # one of its own each time
            grammar = FakeGrammar(VOCABULARY, GRAMMAR, ends_with=[300])
        engine.submit(Sequence(name, [7, len(name), 9], replace(params, grammar=grammar)))

    def deliver(delivered: list[tuple[str, TokenOutput]]) -> None:
        for name, output in delivered:
            outputs[name].append(output)
        heard(delivered)

    engine.work_off(deliver)
    return {
        name: [replace(one, first_token_seconds=None, queue_seconds=None) for one in found]
        for name, found in outputs.items()
    }


GRAMMAR = {None: range(0, 300, 2), **{token: (*range(1, 300, 5), 300) for token in range(VOCABULARY)}}


def test_whole_replies_are_the_same_beside_those_whose_logits_are_changed(stepper: Stepper) -> None:
    """The first two go on after the others have ended, so that steps are started ahead, and one by one, and ahead."""
    asked = {
        "plain": SamplingParams(temperature=0.0, logprobs=1, max_tokens=9),
        "drawn": SamplingParams(temperature=0.9, seed=3, max_tokens=8),
        "repeated": SamplingParams(temperature=0.0, max_tokens=4, repetition_penalty=9.0, presence_penalty=2.0),
        "in grammar": SamplingParams(
            temperature=0.8, seed=4, max_tokens=3, top_k=50, logprobs=2, grammar=FakeGrammar(1, {})
        ),
    }
    together = replies(stepper, asked)
    assert {name: replies(stepper, {name: params})[name] for name, params in asked.items()} == together
    tokens = {name: [one.token_id for one in found] for name, found in together.items()}
    assert len(set(tokens["repeated"])) == 4 and not {7, 8, 9} & set(tokens["repeated"])
    first, *others = tokens["in grammar"]
    assert first in GRAMMAR[None] and all(token in GRAMMAR[0] for token in others)
    assert all(found[-1].finish_reason in (FinishReason.LENGTH, FinishReason.STOP) for found in together.values())


@pytest.mark.parametrize(("ranks", "adapters"), [(16, 8), (32, 8), (512, 1)])
def test_the_start_checks_no_more_adapters_together_than_a_request_may_name(
    files: Path, ranks: int, adapters: int
) -> None:
    config = replace(STEPS, max_ranks=ranks, max_adapters=adapters)
    stepper = stepper_of(files, 64, config)
    model, device = stepper.runner._model, stepper.device
    checker = Checker(
        stepper.runner, stepper.slots, model, vocabulary=VOCABULARY, num_blocks=32, config=config, device=device
    )
    assert checker.run().batch_invariant


@pytest.mark.parametrize("in_use", [True, False])
def test_a_step_under_way_keeps_its_adapter_while_the_next_step_loads_one(files: Path, in_use: bool) -> None:
    """Into the same slot, when the copies are made as early as they may be; or beside it, before the step is done."""
    stepper = stepper_of(files, 16, STEPS)
    sizes = {path: (layer.arena.a.shape[1], layer.arena.bt.shape[1]) for path, layer in stepper.slots.layers.items()}
    for version, factor in (("old", 0.02), ("new", -0.02)):
        modules = {
            path: (torch.full((8, a), factor).bfloat16(), torch.arange(bt).expand(8, bt).bfloat16() / bt)
            for path, (a, bt) in sizes.items()
        }
        stepper.host[version] = HostAdapter(
            version, 8, 0, {path: (a, bt.contiguous()) for path, (a, bt) in modules.items()}
        )
    slot, free = Slot(0, 8), Slot(8, 8)

    def start(version: str, slot: Slot, in_use: bool = True) -> StartedStep:
        sequence = stepper.sequence(version, range(9, 9 + TOKENS), slot, ASKED[0])
        row = ScheduledSequence(sequence, TOKENS, samples=True)
        started = stepper.runner.start(Batch([row], [SlotLoad(slot, version, in_use)]))
        stepper.release(sequence)
        return started

    expected = {version: start(version, slot).results() for version in ("new", "old")}
    assert expected["new"] != expected["old"]
    first, second = start("old", slot), start("new", slot if in_use else free, in_use)
    copies = stepper.slots._copy
    assert isinstance(copies, StagedCopySlot) and isinstance(stepper.device, EmulatedDevice)
    done = stepper.device.current.done
    copies._stream.synchronize()
    assert (stepper.device.current.done > done) == in_use, "it waits for the step where it must"
    assert [first.results(), second.results()] == [expected["old"], expected["new"]]
