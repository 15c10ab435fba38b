"""Bases whose positions turn otherwise in long texts: by a sequence's own length, whatever shares its batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loramux_adapters.device.cpu import CpuDevice
from loramux_server.base.loader import BaseModel, load_base_model
from loramux_server.base.support import trained_context, unsupported_config
from loramux_server.engine.local_engine import LocalEngine
from loramux_server.engine.scheduling.admission import SchedulerConfig
from loramux_server.engine.scheduling.kv_blocks import extend_keys
from loramux_server.engine.scheduling.sequence import SamplingParams
from loramux_server.engine.scheduling.sequence import Sequence as EngineSequence
from loramux_server.errors import BaseModelError
from loramux_server.kernels.layers.rotary import settle_angles
from support.stepping import Stepper, relative_difference
from support.tiny_models import save_tiny_model, tiny_config

CPU = CpuDevice()
ORIGINAL = 64
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
    "long_factor": [2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0],
    "original_max_position_embeddings": ORIGINAL,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
LONG = torch.randint(0, 256, (100,), generator=torch.Generator().manual_seed(1)).tolist()
SHORT = LONG[:40]


def phi3(directory: Path) -> Path:
    return save_tiny_model(
        directory, "phi3", rope_parameters=LONGROPE, original_max_position_embeddings=ORIGINAL, head_dim=16
    )


def load(directory: Path, **options: Any) -> BaseModel:
    cache = directory.parent / "cache"
    return load_base_model(str(directory), device=CPU, cache_dir=cache, report=lambda line: None, **options)


def theirs(directory: Path, tokens: list[int]) -> torch.Tensor:
    """Transformers' own model on one text, in fp32, on the NF4 weights: [tokens, vocabulary]."""
    model: Any = load(directory, exact=True).model
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    return logits


def sequence(stepper: Stepper, name: str, prompt: list[int]) -> EngineSequence:
    """As the scheduler makes it."""
    found = stepper.sequence(name, prompt, params=SamplingParams(temperature=0.0, max_tokens=8, logprobs=0))
    found.is_long = 0 < stepper.runner.long_from < found.max_total
    return found


def test_short_and_long_texts_get_transformers_answers_alone_and_in_one_batch(tmp_path: Path) -> None:
    directory = phi3(tmp_path / "base")
    stepper = Stepper(load(directory).model)
    assert stepper.runner.long_from == ORIGINAL and "rotation" in stepper.runner.why_by_modules
    alone = []
    for name, prompt in (("short", SHORT), ("long", LONG)):
        own = sequence(stepper, name, prompt)
        steps = stepper.greedy(own, 4, chunk=13)
        alone.append(steps[0])
        expected = theirs(directory, prompt + own.output)
        for index, ours in enumerate(steps):
            assert relative_difference(ours, expected[len(prompt) - 1 + index]) < 0.01
    pair = sequence(stepper, "a", LONG), sequence(stepper, "b", SHORT)
    together = stepper.logits([(each, len(each.prompt)) for each in pair])
    assert torch.equal(together[0], alone[1]) and torch.equal(together[1], alone[0])


def test_the_length_is_felt_so_the_test_above_would_notice_wrong_frequencies(tmp_path: Path) -> None:
    stepper = Stepper(load(phi3(tmp_path / "base")).model)
    logits = []
    for is_long in (False, True):
        own = sequence(stepper, f"{is_long}", SHORT)
        own.is_long = is_long
        logits.append(stepper.prefill(own, chunk=40))
    assert relative_difference(*logits) > 0.1


def test_a_server_of_short_texts_runs_a_whole_step_by_the_short_frequencies(tmp_path: Path) -> None:
    directory = phi3(tmp_path / "base")
    stepper = Stepper(load(directory).model, blocks=ORIGINAL // 16)
    assert stepper.runner.long_from == 0 and stepper.runner.why_by_modules == ""
    ours = stepper.prefill(sequence(stepper, "s", SHORT), chunk=13)
    assert relative_difference(ours, theirs(directory, SHORT)[-1]) < 0.01


def test_the_engine_tells_long_sequences_from_short_ones_and_shares_no_blocks_between_them(tmp_path: Path) -> None:
    base = load(phi3(tmp_path / "base"))
    engine = LocalEngine.open(base, tokens=512, max_rank=8)

    def replies(*prompts: list[int]) -> list[list[int]]:
        return [reply.tokens for reply in engine.generate(prompts, None, max_tokens=8, stop_ids=frozenset())]

    begins = LONG[:30]  # of the short text and of the long one
    alone = [replies(prompt)[0] for prompt in (SHORT, LONG, begins)]
    assert replies(LONG, begins, SHORT) == [alone[1], alone[2], alone[0]]
    expected = theirs(base.source.directory, LONG + alone[1])
    assert alone[1] == expected[len(LONG) - 1 : -1].argmax(-1).tolist()


def test_a_long_sequence_has_keys_of_its_own() -> None:
    keys = []
    for is_long in (False, True):
        own = EngineSequence("s", SHORT, SamplingParams(temperature=0.0, max_tokens=1))
        own.is_long = is_long
        extend_keys(own, 16, 32)
        keys.append(own.keys)
    assert not set(keys[0]) & set(keys[1])


def test_kernels_without_tables_serve_short_texts_only(tmp_path: Path) -> None:
    model = load(phi3(tmp_path / "base"), exact=True).model
    assert settle_angles(model, ORIGINAL) == 0
    with pytest.raises(BaseModelError, match=rf"--max-model-len {ORIGINAL}"):
        settle_angles(model, ORIGINAL + 1)


def test_dynamic_frequencies_are_those_of_every_text_that_a_base_is_served_with(tmp_path: Path) -> None:
    directory = save_tiny_model(tmp_path / "base", "llama", rope_parameters=DYNAMIC, max_position_embeddings=112)
    base = load(directory)
    assert base.context_length == 112
    stepper = Stepper(base.model)
    assert stepper.runner.why_by_modules == ""
    for name, prompt in (("short", SHORT), ("long", LONG)):
        own = stepper.sequence(name, prompt)
        steps = stepper.greedy(own, 4, chunk=13)
        expected = theirs(directory, prompt + own.output)
        for index, ours in enumerate(steps):
            assert relative_difference(ours, expected[len(prompt) - 1 + index]) < 0.01


def test_layers_of_which_some_have_it_are_refused() -> None:
    mixed = {"full_attention": LONGROPE, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    config = tiny_config("llama")
    config.rope_parameters = mixed
    assert any("longrope" in reason for reason in unsupported_config(config))
    config.rope_parameters = LONGROPE
    assert unsupported_config(config) == []


def test_texts_for_training_are_no_longer_than_the_short_frequencies_take() -> None:
    config = tiny_config("phi3", rope_parameters=LONGROPE, original_max_position_embeddings=ORIGINAL)
    assert trained_context(config) == ORIGINAL
    assert trained_context(tiny_config("llama")) == 512


def test_no_sequence_is_long_unless_the_base_says_so() -> None:
    assert SchedulerConfig().long_from == 0
