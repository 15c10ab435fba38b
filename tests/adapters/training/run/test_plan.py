"""The memory plan against what really lies in memory, on tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from loramux_adapters.device.cpu import CpuDevice
from loramux_adapters.device.device import ON_CARD, ON_HOST
from loramux_adapters.errors import RecipeError
from loramux_adapters.training.model.model import LoraModel
from loramux_adapters.training.recipe import Recipe
from loramux_adapters.training.run.optimizer import make_optimizer
from loramux_adapters.training.run.plan import MemoryPlan, base_bytes, kv_bytes, plan_memory
from loramux_server.base.loader import load_base_model, resident_bytes
from loramux_server.kernels.attention.paged_attention import probe_kv_shape
from loramux_server.kernels.choice import available_kernels
from support.measured_memory import different_rows, optimizer_bytes, saved_by_a_step
from support.shapes import LLAMA_8B
from support.tiny_models import save_tiny_model, tiny_config

CPU = CpuDevice()


def skeleton_of(directory: Path) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))


def plan(architecture: str = "llama", *, cuda: bool = False, sequence: int = 64, **recipe: Any) -> MemoryPlan:
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(tiny_config(architecture))
    return plan_memory(skeleton, Recipe(**recipe), sequence=sequence, learned=4, layout=ON_CARD if cuda else ON_HOST)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "phi3", "gemma2"])
@pytest.mark.parametrize("quantize", ["nf4", "none"])
def test_base_adapter_and_optimizer_take_what_was_planned(tmp_path: Path, architecture: str, quantize: str) -> None:
    directory = save_tiny_model(tmp_path / "base", architecture)
    recipe = Recipe(rank=4, quantize=quantize, batch_size=4)
    planned = plan_memory(skeleton_of(directory), recipe, sequence=32, learned=4, layout=ON_HOST)

    base = load_base_model(
        str(directory), device=CPU, cache_dir=tmp_path, report=lambda line: None, quantize=quantize, training=True
    )
    assert planned.base == pytest.approx(resident_bytes(base.model), rel=0.01)
    assert planned.parameters == base.bytes_16bit // 2
    model = LoraModel.build(base.model, recipe)
    optimizer = make_optimizer(model.trainable, recipe)
    model.loss(different_rows(4, 32, learned=4, vocabulary=320), grad_scale=1.0)
    optimizer.step()

    assert planned.trainable == model.counts().trainable
    assert planned.adapter == model.counts().adapter_bytes
    assert planned.gradients == sum(p.grad.nbytes for p in model.trainable.values() if p.grad is not None)
    assert planned.optimizer == optimizer_bytes(optimizer)
    assert planned.saved == planned.trainable * 2


@pytest.mark.parametrize("quantize", ["nf4", "none"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_weight_that_embedding_and_head_share_is_planned_once(tmp_path: Path, tied: bool, quantize: str) -> None:
    directory = save_tiny_model(tmp_path / "base", tie_word_embeddings=tied)
    planned = base_bytes(skeleton_of(directory), quantize, ON_HOST)
    base = load_base_model(
        str(directory), device=CPU, cache_dir=tmp_path, report=lambda line: None, quantize=quantize, training=True
    )
    held = {each.data_ptr(): each.nbytes for each in (*base.model.parameters(), *base.model.buffers())}
    if "native" in available_kernels(CPU):
        assert planned == sum(held.values())
    else:  # bitsandbytes' form, which has a few tables more
        assert planned == pytest.approx(resident_bytes(base.model), rel=0.05)


@pytest.mark.parametrize("sequence", [33, 300])
@pytest.mark.parametrize("changes", [{}, {"dropout": 0.1}], ids=["plain", "dropout"])
def test_activations_are_what_the_backward_pass_is_kept(tmp_path: Path, sequence: int, changes: dict[str, Any]) -> None:
    directory = save_tiny_model(tmp_path / "base")
    recipe = Recipe(rank=4, batch_size=4, **changes)
    planned = plan_memory(skeleton_of(directory), recipe, sequence=sequence, learned=4, layout=ON_HOST)
    base = load_base_model(str(directory), device=CPU, cache_dir=tmp_path, report=lambda line: None, training=True)

    model = LoraModel.build(base.model, recipe)
    measured = saved_by_a_step(model, base.model, different_rows(4, sequence, learned=4, vocabulary=320))

    assert planned.activations == pytest.approx(measured, rel=0.1)


def test_the_cache_is_what_the_server_would_take(tmp_path: Path) -> None:
    base = load_base_model(
        str(save_tiny_model(tmp_path / "base")), device=CPU, cache_dir=tmp_path, report=lambda line: None
    )

    shape = probe_kv_shape(base.model, CPU, whole_numbers=base.kernels.whole_numbers)
    assert kv_bytes(base.config, ON_HOST) == shape.token_bytes


def test_parts_and_recomputation_lower_the_activations_alone() -> None:
    whole, parts = plan(batch_size=8), plan(batch_size=8, accumulation=4)
    again = plan(batch_size=8, gradient_checkpointing=True)

    assert parts.activations < 0.3 * whole.activations
    assert again.activations < 0.7 * whole.activations
    assert whole.base == parts.base == again.base and whole.optimizer == parts.optimizer
    assert whole.total > parts.total > parts.base


def test_nf4_lowers_the_base_alone() -> None:
    qlora, lora = plan(quantize="nf4"), plan(quantize="none")

    assert qlora.base < lora.base
    assert (qlora.adapter, qlora.activations, qlora.full) == (lora.adapter, lora.activations, lora.full)
    assert lora.full == 16 * lora.parameters


def test_cuda_keeps_moments_in_8_bit_where_the_tensor_is_not_small() -> None:
    assert plan(cuda=True, rank=4).optimizer == 8 * plan(rank=4).trainable  # every tensor is small
    large = plan(cuda=True, rank=256)
    assert large.optimizer == pytest.approx(large.trainable * 2 * (1 + 4 / 256), rel=0.02)


def test_a_card_holds_nf4_with_scales_in_fp32_and_an_8b_shape_trains_on_24_gib() -> None:
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA_8B))
    weights = 32 * (4096 * (4096 + 1024 + 1024 + 4096) + 3 * 4096 * 14336)
    held = weights // 2 + weights // 16 + 2 * 2 * 128256 * 4096

    def planned(**changes: Any) -> MemoryPlan:
        recipe = Recipe(rank=16, batch_size=2, max_length=2048, **changes)
        return plan_memory(skeleton, recipe, sequence=2048, learned=512, layout=ON_CARD)

    again, kept = planned(gradient_checkpointing=True), planned()
    assert again.base == pytest.approx(held, rel=1e-3) and again.context > 0
    assert again.total < 12 * 2**30 < 24 * 2**30 < kept.total
    in_fp16 = plan_memory(
        skeleton, Recipe(rank=16, batch_size=2), sequence=2048, learned=512, layout=ON_CARD, fp16=True
    )
    assert in_fp16.activations > kept.activations


def test_layers_that_the_base_does_not_have_are_refused() -> None:
    with pytest.raises(RecipeError, match="nothing_proj"):
        plan(target_modules=("nothing_proj",))
