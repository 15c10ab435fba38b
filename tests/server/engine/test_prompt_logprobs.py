"""Log probabilities of given text: of prompts and of continuations, the same bits alone and in company."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from loramux_adapters.device.cpu import CpuDevice
from loramux_adapters.lora.slots import Slot
from loramux_adapters.lora.weights import load_host_adapter
from loramux_server.base.loader import BaseModel, load_base_model
from loramux_server.engine.build import DeviceSide
from loramux_server.engine.inbox import Inbox
from loramux_server.engine.local_engine import LoadedAdapters
from loramux_server.engine.scheduling.admission import SchedulerConfig
from loramux_server.engine.scheduling.sequence import (
    NOT_FINITE,
    AdapterUse,
    FinishReason,
    SamplingParams,
    Sequence,
    TokenOutput,
    composed,
)
from loramux_server.engine.step_metrics import NoMetrics
from loramux_server.kernels.attention.kv_cache import BLOCK_SIZE
from loramux_server.kernels.attention.paged_attention import probe_kv_shape
from support.adapter_files import write_adapter
from support.stepping import Stepper, told
from support.tiny_models import save_tiny_model

CPU = CpuDevice()
RANKS = {"small": 8, "large": 16}
# what a step of a busy server looks like: little room, so that prompts and continuations are read in pieces
BUSY = SchedulerConfig(max_num_seqs=8, max_batch_tokens=24, max_scored_tokens=5, max_background_tokens=4)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("prompt_logprobs")
    save_tiny_model(root / "base")
    linears = dict(load(root).linears)
    for seed, (version, rank) in enumerate(RANKS.items()):
        write_adapter(root / version, linears, rank=rank, seed=seed, std_b=0.2)
    write_adapter(root / "broken", linears, std_b=1e37)
    return root


def load(root: Path) -> BaseModel:
    return load_base_model(str(root / "base"), device=CPU, cache_dir=root / "cache", report=lambda line: None)


class Engines:
    """An engine of a configuration on a base of its own; everything that was submitted is run together."""

    def __init__(self, root: Path, config: SchedulerConfig = BUSY, *, kept: int = 64) -> None:
        base, host = load(root), LoadedAdapters()
        for version in (*RANKS, "broken"):
            host.add(replace(load_host_adapter(root / version), version=version))
        device = DeviceSide.build(
            base,
            probe_kv_shape(base.model, CPU, whole_numbers=base.kernels.whole_numbers),
            host.get,
            arena_rows=32,
            config=config,
            num_blocks=128,
        )
        self._engine = device.engine(host, Inbox(100), NoMetrics(), kept_blocks=kept)

    def run(self, sequences: Iterable[Sequence]) -> dict[str, list[TokenOutput]]:
        outputs: dict[str, list[TokenOutput]] = {}
        for sequence in sequences:
            outputs[sequence.id] = []
            self._engine.submit(sequence)

        def deliver(delivered: list[tuple[str, TokenOutput]]) -> None:
            for name, output in delivered:
                outputs[name].append(output)

        self._engine.work_off(deliver)
        return outputs


def said(outputs: list[TokenOutput]) -> list[TokenOutput]:
    """Without what may differ: times, and how much was found in the cache."""
    return [replace(one, queue_seconds=None, first_token_seconds=None, cached_tokens=0) for one in outputs]


def tokens(count: int, seed: int) -> list[int]:
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def uses(*adapters: tuple[str, float]) -> tuple[AdapterUse, ...]:
    return composed(AdapterUse(version, RANKS.get(version, 8), 0, scale) for version, scale in adapters)


def scored(prompt: list[int], adapters: tuple[AdapterUse, ...] = (), name: str = "one", **params: object) -> Sequence:
    return Sequence(name, prompt, SamplingParams(temperature=0.0, **params), adapters)  # type: ignore[arg-type]


def test_each_prompt_token_has_the_bits_of_a_token_at_a_time(root: Path) -> None:
    prompt, slot = tokens(70, 1), Slot(0, 8)
    stepper = Stepper(load(root).model)
    stepper.load(slot, load_host_adapter(root / "small"))
    fed, expected = stepper.sequence("solo", prompt, slot), []
    for token in prompt[1:]:
        logits = stepper.logits([(fed, 1)])[0]
        expected.append(told(logits, token, top=2))
        assert expected[-1].logprob == pytest.approx(float(logits.double().log_softmax(-1)[token]), abs=1e-6)
        assert [index for index, _ in expected[-1].top] == logits.topk(2).indices.tolist()

    one = scored(prompt, uses(("small", 1.0)), max_tokens=3, logprobs=0, prompt_logprobs=2)
    plain = scored(prompt, uses(("small", 1.0)), "plain", max_tokens=3, logprobs=0)
    outputs = Engines(root).run([one, plain])

    assert list(outputs["one"][0].prompt_logprobs) == expected
    assert [output.prompt_logprobs for output in outputs["one"][1:]] == [(), ()]
    assert said([replace(output, prompt_logprobs=()) for output in outputs["one"]]) == said(outputs["plain"])


def test_scores_are_the_same_alone_and_in_any_mixed_batch(root: Path) -> None:
    """Chunks, prefix cache, background, base, adapters and sums of them: nothing shows in any bit."""
    beginning = tokens(40, 2)
    kinds = [(), uses(("small", 1.0)), uses(("large", 1.0)), uses(("small", 0.5), ("large", -0.7))]
    answers = ((5, 6, 7, 8), (5,), (5, 6, 9, 9, 9, 9, 9, 9, 9), (11, 12))

    def sequences() -> list[Sequence]:
        made = []
        for index in range(16):
            prompt = (beginning if index % 2 else []) + tokens(7 + 5 * index % 31, 100 + index)
            asked = index % 4
            made.append(
                Sequence(
                    str(index),
                    prompt,
                    SamplingParams(
                        temperature=0.0,
                        max_tokens=index % 3 if asked else 4,
                        logprobs=1,
                        prompt_logprobs=index % 2 if asked != 2 else None,
                        prompt_logprobs_from=1 + 9 * (index % 5),
                        continuations=answers if asked in (2, 3) else (),
                    ),
                    kinds[index // 2 % 4],
                    background=index % 5 == 0,
                )
            )
        return made

    alone: dict[str, list[TokenOutput]] = {}
    for sequence in sequences():
        alone |= Engines(root, SchedulerConfig(), kept=0).run([sequence])
    together = Engines(root)
    first, again = together.run(sequences()), together.run(reversed(sequences()))

    assert any(one.cached_tokens for outputs in again.values() for one in outputs)
    for name, outputs in alone.items():
        assert said(first[name]) == said(outputs), name
        assert said(again[name]) == said(outputs), name
    assert len({outputs[-1].continuations for outputs in alone.values()}) > 6
    assert all(outputs[-1].finish_reason is FinishReason.LENGTH for outputs in alone.values())


def test_positions_that_are_scored_are_computed_though_the_cache_holds_them(root: Path) -> None:
    engine, prompt = Engines(root), tokens(100, 3)
    (before,) = engine.run([scored(prompt, max_tokens=1, prompt_logprobs=0)])["one"]
    cached = {}
    for start in (1, 50, 97, 200):
        (after,) = engine.run([scored(prompt, max_tokens=1, prompt_logprobs=0, prompt_logprobs_from=start)])["one"]
        cached[start] = after.cached_tokens
        assert after.prompt_logprobs == before.prompt_logprobs[start - 1 :]

    assert before.cached_tokens == 0 and len(before.prompt_logprobs) == 99
    assert cached == {1: 0, 50: 3 * BLOCK_SIZE, 97: 6 * BLOCK_SIZE, 200: 6 * BLOCK_SIZE}


def test_continuations_leave_nothing_in_the_prefix_cache(root: Path) -> None:
    engine, prompt = Engines(root), tokens(30, 4)
    answers = (tuple(tokens(40, 5)), tuple(tokens(40, 6)))
    engine.run([scored(prompt, max_tokens=2, continuations=answers)])

    longer = [*prompt, *answers[0]]
    (found,) = engine.run([scored(longer, max_tokens=1, prompt_logprobs=0, prompt_logprobs_from=69)])["one"]
    (fresh,) = Engines(root).run([scored(longer, max_tokens=1, prompt_logprobs=0, prompt_logprobs_from=69)])["one"]

    assert found.cached_tokens == BLOCK_SIZE  # of 30 tokens
    assert said([found]) == said([fresh])


def test_what_is_not_finite_at_any_scored_position_fails_that_sequence_alone(root: Path) -> None:
    broken = uses(("broken", 1.0))
    sequences = [
        scored(tokens(60, 7), broken, "prompt", max_tokens=1, prompt_logprobs=0),
        scored(tokens(60, 7), broken, "continuation", max_tokens=0, continuations=((1, 2),)),
        scored(tokens(60, 7), (), "sound", max_tokens=1, prompt_logprobs=0),
    ]
    outputs = Engines(root).run(sequences)

    assert [output.error for name in ("prompt", "continuation") for output in outputs[name]] == [NOT_FINITE] * 2
    assert outputs["sound"][-1].error is None and len(outputs["sound"][-1].prompt_logprobs) == 59
