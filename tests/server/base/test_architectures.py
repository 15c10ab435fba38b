"""Every architecture that is promised gives transformers' own answers through our attention, cache and LoRA layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loramux_adapters.device.cpu import CpuDevice
from loramux_server.base.loader import load_base_model
from loramux_server.base.support import unsupported_config
from loramux_server.errors import BaseModelError
from loramux_server.kernels.attention.paged_attention import ATTENTION_NAME, probe_kv_shape
from support.stepping import Stepper, relative_difference
from support.tiny_models import ARCHITECTURES, NEIGHBOURS, save_tiny_model, tiny_config

CPU = CpuDevice()


def eager_logits(model: Any, tokens: list[int]) -> torch.Tensor:
    """Transformers' own attention over the whole text at once: [tokens, vocabulary]."""
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    model.set_attn_implementation(ATTENTION_NAME)
    return logits


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *NEIGHBOURS])
def test_a_tiny_model_answers_as_transformers_does_in_chunks_and_token_by_token(
    architecture: str, tmp_path: Path
) -> None:
    directory = save_tiny_model(tmp_path / "base", architecture)
    base = load_base_model(str(directory), device=CPU, cache_dir=tmp_path / "cache", report=lambda line: None)
    stepper = Stepper(base.model)
    prompt = torch.randint(0, 256, (45,), generator=torch.Generator().manual_seed(1)).tolist()
    sequence = stepper.sequence("s", prompt)
    steps = stepper.greedy(sequence, 6, chunk=13)
    theirs = eager_logits(base.model, prompt + sequence.output)
    for index, ours in enumerate(steps):
        assert relative_difference(ours, theirs[len(prompt) - 1 + index]) < 0.05


@pytest.mark.parametrize("architecture", ["mistral", "gemma2", "gemma3_text", "starcoder2"])
def test_the_sliding_window_is_felt_so_the_test_above_would_notice_its_absence(
    architecture: str, tmp_path: Path
) -> None:
    prompt = torch.randint(0, 256, (45,), generator=torch.Generator().manual_seed(1)).tolist()
    logits = []
    for name, window in (("narrow", 8), ("wide", 400)):
        directory = save_tiny_model(tmp_path / name, architecture, sliding_window=window)
        base = load_base_model(str(directory), device=CPU, cache_dir=tmp_path / "cache", report=lambda line: None)
        logits.append(eager_logits(base.model, prompt)[-1])
    assert relative_difference(logits[0], logits[1]) > 0.1


@pytest.mark.parametrize(
    ("architecture", "changes", "reason"),
    [
        ("phimoe", {"num_local_experts": 4}, "mixture of experts"),
        ("bloom", {}, "ALiBi"),
        ("rwkv", {}, "keeps a state of its own"),
        ("falcon_mamba", {}, "linear_attention"),
        (
            "llama4_text",
            {"layer_types": ["chunked_attention", "full_attention", "linear_attention"]},
            "linear_attention",
        ),
        ("t5", {}, "encoder-decoder"),
        ("glm_moe_dsa", {}, "latent attention"),
    ],
)
def test_what_cannot_be_served_correctly_is_named_from_its_config(
    architecture: str, changes: dict[str, Any], reason: str
) -> None:
    assert any(reason in text for text in unsupported_config(tiny_config(architecture, **changes)))


@pytest.mark.parametrize(
    ("architecture", "changes", "reason"),
    [
        ("gpt2", {"n_embd": 64, "n_head": 4, "n_layer": 1, "n_inner": 128}, "Conv1D"),
        ("phimoe", {"num_local_experts": 2, "num_experts_per_tok": 1}, "mixture of experts"),
    ],
)
def test_such_a_base_is_refused_at_start_with_the_reason(
    architecture: str, changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    directory = save_tiny_model(tmp_path / "base", architecture, **changes)
    with pytest.raises(BaseModelError, match=reason):
        load_base_model(str(directory), device=CPU, cache_dir=tmp_path / "cache", report=lambda line: None)


@pytest.mark.parametrize(
    ("architecture", "changes"), [("bert", {}), ("gemma3_text", {"use_bidirectional_attention": True})]
)
def test_a_model_whose_tokens_see_those_behind_them_is_refused_at_start(
    architecture: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    directory = save_tiny_model(tmp_path / "base", architecture, **changes)
    base = load_base_model(str(directory), device=CPU, cache_dir=tmp_path / "cache", report=lambda line: None)
    with pytest.raises(BaseModelError, match="see those behind them"):
        probe_kv_shape(base.model, CPU, whole_numbers=True)


def test_odd_shapes_run_on_the_unpacked_kernel(tmp_path: Path) -> None:
    directory = save_tiny_model(tmp_path / "base", "llama", hidden_size=48, intermediate_size=72, head_dim=16)
    base = load_base_model(str(directory), device=CPU, cache_dir=tmp_path / "cache", report=lambda line: None)
    stepper = Stepper(base.model)
    prompt = list(range(40))
    ours = stepper.prefill(stepper.sequence("s", prompt), chunk=40)
    assert relative_difference(ours, eager_logits(base.model, prompt)[-1]) < 0.05
