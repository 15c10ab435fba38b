"""The runner on a tiny real model: mixed batches equal solo runs, slot loads, and the checks at start."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from loramux_adapters.device.cpu import CpuDevice
from loramux_adapters.lora.host_cache import HostAdapter
from loramux_adapters.lora.ops import Arena, LoraRows, add_lora_segments
from loramux_adapters.lora.slots import ScaledSlot, Slot
from loramux_adapters.lora.weights import load_host_adapter
from loramux_server.base.loader import BaseModel, load_base_model
from loramux_server.engine.scheduling.admission import SchedulerConfig
from loramux_server.engine.scheduling.sequence import Batch, SamplingParams, ScheduledSequence, SlotLoad
from loramux_server.engine.start_check import Checker, StartCheck
from loramux_server.errors import BaseModelError, SequenceFailed
from loramux_server.kernels.attention.kv_cache import KVShape
from loramux_server.kernels.attention.paged_attention import (
    AttentionParams,
    AttentionStep,
    attend_reference,
    probe_kv_shape,
)
from loramux_server.kernels.choice import available_kernels, choose_kernels
from support.adapter_files import write_adapter
from support.stepping import Stepper
from support.tiny_models import save_tiny_model

CPU = CpuDevice()
HERE = available_kernels(CPU)
SLOTS = [None, Slot(0, 8), Slot(16, 16), Slot(32, 32), Slot(8, 8)]
SUMS = [
    (ScaledSlot(Slot(16, 16), 0.7), ScaledSlot(Slot(0, 8), -0.4)),
    tuple(ScaledSlot(slot, 0.3) for slot in SLOTS if slot is not None),
]


@pytest.fixture
def base(tmp_path: Path) -> Iterator[BaseModel]:
    yield base_of(tmp_path)


def base_of(tmp_path: Path, architecture: str = "llama", kernels: str | None = None) -> BaseModel:
    directory = save_tiny_model(tmp_path / "base", architecture)
    return load_base_model(
        str(directory),
        device=CPU,
        cache_dir=tmp_path / "cache",
        report=lambda line: None,
        kernels=choose_kernels(CPU, kernels),
    )


def loaded(base: BaseModel, tmp_path: Path) -> Stepper:
    """A stepper with adapters of several ranks and targets in SLOTS."""
    stepper = Stepper(base.model, kernels=base.kernels.name)
    linears = dict(base.linears)
    kinds: list[dict[str, Any]] = [
        {"rank": 3, "targets": ["q_proj", "lm_head"]},
        {"rank": 16},
        {"rank": 30, "targets": ["down_proj", "o_proj"]},
        {"rank": 8, "targets": ["lm_head"]},
    ]
    for index, (slot, kind) in enumerate(zip(SLOTS[1:], kinds, strict=True)):
        assert slot is not None
        directory = write_adapter(tmp_path / f"adapter-{index}", linears, seed=index, std_b=0.2, **kind)
        stepper.load(slot, load_host_adapter(directory))
    return stepper


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (length,), generator=generator).tolist() for length in (40, 7, 19, 33, 1, 12, 26)]


SETS = [name for name in ("native", "native-avx2", "native-portable", "tensor", "reference") if name in HERE]
FAMILIES = ["qwen3", "gemma2", "gemma3_text", "phi3", "olmo2", "granite"]


@pytest.mark.parametrize(
    ("architecture", "kernels"),
    [*(("llama", name) for name in SETS), *((family, name) for family in FAMILIES for name in ("native", "tensor"))],
)
def test_a_mixed_batch_gives_every_row_the_logits_it_has_alone(architecture: str, kernels: str, tmp_path: Path) -> None:
    if kernels not in HERE:
        pytest.skip("no compiler was there at installation")
    stepper = loaded(base_of(tmp_path, architecture, kernels), tmp_path)
    alone = []
    for index, (prompt, slot) in enumerate(zip(prompts(), [*SLOTS, *SUMS], strict=True)):
        sequence = stepper.sequence(f"alone-{index}", prompt, slot)
        alone.append(torch.stack(stepper.greedy(sequence, 5, chunk=6)))
        stepper.release(sequence)
    assert len({tuple(logits[0].tolist()) for logits in alone}) == len(alone)

    kinds = enumerate(zip(prompts(), [*SLOTS, *SUMS], strict=True))
    sequences = [stepper.sequence(f"s-{i}", prompt, slots) for i, (prompt, slots) in kinds]
    seen: list[list[torch.Tensor]] = [[] for _ in sequences]
    for step in range(14):  # they start one after the other, in chunks that change, beside those that decode
        rows = []
        for sequence in sequences[: step + 1]:
            left = len(sequence.prompt) - sequence.num_computed
            if left > 0:
                rows.append((sequence, min(left, 5 + 4 * (step % 3))))
            elif len(sequence.output) < 5:
                rows.append((sequence, 1))
        if not rows:
            break
        logits = stepper.logits(rows)
        for (sequence, _), row in zip(rows, logits, strict=True):
            if not sequence.in_prefill:
                seen[sequences.index(sequence)].append(row)
                sequence.output.append(int(row.argmax()))
    for expected, got in zip(alone, seen, strict=True):
        assert torch.equal(torch.stack(got[:5]), expected)


def test_a_sum_of_adapters_has_the_bits_of_the_one_adapter_that_computes_it(base: BaseModel, tmp_path: Path) -> None:
    """Factors that are powers of two make the oracle exact: one adapter with the rows of both, scaled."""
    stepper = Stepper(base.model)
    linears, kinds = dict(base.linears), [(16, None, 0.5), (8, ["q_proj", "o_proj", "down_proj", "lm_head"], -2.0)]
    parts = []
    for index, (rank, targets, _) in enumerate(kinds):
        directory = write_adapter(tmp_path / str(index), linears, rank=rank, targets=targets, seed=index, std_b=0.2)
        parts.append(load_host_adapter(directory))
    rows: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for part, (_, _, scale) in zip(parts, kinds, strict=True):
        for path, (a, bt) in part.modules.items():
            rows.setdefault(path, []).append((a, bt * scale))
    modules = {
        path: (torch.cat([a for a, _ in both]), torch.cat([bt for _, bt in both])) for path, both in rows.items()
    }
    adapters = [*parts, HostAdapter("sum", 24, 0, modules)]
    for slot, adapter in zip((Slot(0, 16), Slot(16, 8), Slot(32, 32)), adapters, strict=True):
        stepper.load(slot, adapter)
    prompt = prompts()[2]
    sums = (ScaledSlot(Slot(0, 16), 0.5), ScaledSlot(Slot(16, 8), -2.0))
    composed = torch.stack(stepper.greedy(stepper.sequence("sum", prompt, sums), 6))
    expected = torch.stack(stepper.greedy(stepper.sequence("one", prompt, Slot(32, 32)), 6))
    assert torch.equal(composed, expected)
    for other in (None, Slot(0, 16), Slot(16, 8)):
        assert not torch.equal(composed[0], stepper.prefill(stepper.sequence("other", prompt, other), 99))
    single = stepper.sequence("single", prompt, (ScaledSlot(Slot(0, 16), 1.0),))
    plain = stepper.sequence("plain", prompt, Slot(0, 16))
    assert torch.equal(stepper.prefill(single, 99), stepper.prefill(plain, 99))


def test_slot_loads_of_a_batch_are_applied_before_its_forward(base: BaseModel, tmp_path: Path) -> None:
    stepper = Stepper(base.model)
    directory = write_adapter(tmp_path / "adapter", dict(base.linears), rank=8, std_b=0.5)
    stepper.host["v"] = load_host_adapter(directory)
    prompt, slot = prompts()[1], Slot(0, 8)
    plain = stepper.prefill(stepper.sequence("plain", prompt), chunk=99)
    sequence = stepper.sequence("s", prompt, slot)
    load = SlotLoad(slot, "v")
    token = stepper.runner.start(Batch([ScheduledSequence(sequence, len(prompt), samples=True)], [load])).results()[0]
    assert load.seconds > 0
    assert token.logprob is not None
    assert not torch.equal(stepper.prefill(stepper.sequence("again", prompt, slot), chunk=99), plain)
    assert stepper.prefill(stepper.sequence("again", prompt, slot), chunk=99).argmax() == token.token_id


def test_a_greedy_token_is_the_same_whether_or_not_more_is_asked_for(base: BaseModel, tmp_path: Path) -> None:
    stepper = loaded(base, tmp_path)
    replies: list[list[int]] = []
    for logprobs in (None, 0):
        params = SamplingParams(temperature=0.0, max_tokens=12, logprobs=logprobs)
        made = [stepper.sequence(str(index), [5 + index, 7], slot, params) for index, slot in enumerate(SLOTS[:3])]
        for _ in range(12):
            rows = [ScheduledSequence(one, one.num_tokens - one.num_computed, samples=True) for one in made]
            for one, found in zip(made, stepper.runner.start(Batch(rows)).results(), strict=True):
                assert found.token_id is not None
                one.num_computed = one.num_tokens
                one.output.append(found.token_id)
        replies.append([token for one in made for token in one.output])
    assert replies[0] == replies[1]


def test_a_version_that_left_host_memory_is_an_error_that_says_so(base: BaseModel) -> None:
    stepper = Stepper(base.model)
    sequence = stepper.sequence("s", [1], Slot(0, 8))
    with pytest.raises(SequenceFailed, match="left host memory"):
        stepper.runner.start(Batch([ScheduledSequence(sequence, 1, samples=True)], [SlotLoad(Slot(0, 8), "gone")]))


def test_a_chunk_that_ends_before_the_prompt_does_chooses_no_token(base: BaseModel) -> None:
    stepper = Stepper(base.model)
    sequence = stepper.sequence("s", prompts()[0])
    assert stepper.runner.start(Batch([ScheduledSequence(sequence, 9, samples=False)])).results() == []


def check(stepper: Stepper, base: BaseModel, blocks: int = 256) -> StartCheck:
    made = Checker(
        stepper.runner,
        stepper.slots,
        base.model,
        vocabulary=256,
        num_blocks=blocks,
        config=SchedulerConfig(max_num_seqs=20),
        device=CpuDevice(),
    )
    return made.run()


@pytest.mark.parametrize("kernels", SETS)
def test_the_checks_at_start_pass_on_a_sound_model(kernels: str, tmp_path: Path) -> None:
    base = base_of(tmp_path, kernels=kernels)
    stepper = Stepper(base.model, kernels=kernels)
    checked = check(stepper, base, 256)
    assert checked.difference < (0.002 if kernels.startswith("native") else 1e-5)
    assert checked.batch_invariant


def test_a_model_that_does_not_give_transformers_answers_is_refused_at_start(base: BaseModel) -> None:
    def wrong(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int, step: AttentionStep, params: AttentionParams
    ) -> torch.Tensor:
        return attend_reference(q, k, v, layer, step, AttentionParams(params.scaling * 3))

    stepper = Stepper(base.model, attend=wrong)
    with pytest.raises(BaseModelError, match="differ from transformers"):
        check(stepper, base, 256)


def test_a_kernel_that_looks_at_its_neighbours_loses_the_promise_not_the_server(base: BaseModel) -> None:
    def nosy(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int, step: AttentionStep, params: AttentionParams
    ) -> torch.Tensor:
        out = attend_reference(q, k, v, layer, step, params)
        return out + out.mean() * 0.05 * (len(step.runs) > 1)

    stepper = Stepper(base.model, attend=nosy)
    assert not check(stepper, base, 256).batch_invariant


@pytest.mark.skipif("native" not in HERE, reason="there is no compiled step here")
def test_what_kernels_and_graphs_showed_alone_is_part_of_the_promise(tmp_path: Path) -> None:
    base = base_of(tmp_path, kernels="native")
    stepper = Stepper(base.model, kernels="native")
    step = stepper.runner.decoder
    assert step is not None and check(stepper, base).batch_invariant
    step.equal_bits = False
    assert not check(stepper, base).batch_invariant


def test_adapters_are_part_of_the_check_of_the_promise(base: BaseModel) -> None:
    def nosy(y: torch.Tensor, x: torch.Tensor, arena: Arena, rows: LoraRows) -> None:
        add_lora_segments(y, x, arena, rows)
        y += x.mean() * 0.05 * (len(rows.segments) > 1)

    stepper = Stepper(base.model, add_lora=nosy)
    assert not check(stepper, base).batch_invariant
    assert not any(layer.arena.targeted.any() or layer.arena.a.any() for layer in stepper.slots.layers.values())


def test_sums_of_adapters_are_part_of_the_check_of_the_promise(base: BaseModel) -> None:
    def nosy(y: torch.Tensor, x: torch.Tensor, arena: Arena, rows: LoraRows) -> None:
        add_lora_segments(y, x, arena, rows)
        if any(len(segment.slots) > 1 for segment in rows.segments):
            y += x.mean() * 0.05 * (len(rows.segments) > 1)

    stepper = Stepper(base.model, add_lora=nosy)
    assert not check(stepper, base).batch_invariant


def test_a_layer_that_runs_on_other_rows_than_the_step_is_refused_not_misread(base: BaseModel) -> None:
    stepper = Stepper(base.model)
    stepper.runner.decoder = None  # its rows are given by the step, not by what runs on them
    stepper.slots.head = None  # as if the output head were taken for a layer like all others
    with pytest.raises(BaseModelError, match="the step has"):
        check(stepper, base)


def test_the_output_head_is_found_whatever_it_is_called(tmp_path: Path) -> None:
    directory = save_tiny_model(tmp_path / "base", "biogpt", hidden_dropout_prob=0.0)
    odd = load_base_model(str(directory), device=CPU, cache_dir=tmp_path / "cache", report=lambda line: None)
    stepper = Stepper(odd.model)
    assert stepper.slots.head == "output_projection"
    assert check(stepper, odd).batch_invariant


def test_a_cache_too_small_for_the_checks_says_which_setting_to_change(base: BaseModel) -> None:
    stepper = Stepper(base.model)
    with pytest.raises(BaseModelError, match="--device-memory-mib"):
        check(stepper, base, 3)


def test_the_shape_of_the_cache_is_seen_not_guessed_from_the_config(base: BaseModel) -> None:
    base.config.num_key_value_heads = 99
    seen = probe_kv_shape(base.model, CPU, whole_numbers=False)
    assert seen == KVShape(layers=2, kv_heads=2, head_dim=16, dtype=torch.float32)
    assert probe_kv_shape(base.model, CPU, whole_numbers=True) == KVShape(2, 2, 16, torch.int16)
