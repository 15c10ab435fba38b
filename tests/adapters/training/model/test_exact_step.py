"""A training step on the compiled CPU kernels: right, and the same bits on every instruction set."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from loramux_adapters.device.cpu import CpuDevice
from loramux_adapters.training.data.batches import TokenBatch
from loramux_adapters.training.model.model import LoraModel
from loramux_adapters.training.recipe import Recipe
from loramux_server.kernels.compiled.library import Compiled, native_library
from loramux_server.kernels.layers.nf4_linear import BLOCK, NF4Linear, codes_of, pack
from loramux_server.kernels.layers.packed_embedding import pack_head
from loramux_server.kernels.layers.packed_head import PackedHead
from loramux_server.kernels.training import training_kernels
from support.decoders import weight_of
from support.tiny_models import save_tiny_model

from .test_model import gradients, load, plain_peft, randomize, rows

library = native_library()
if library is None:
    pytest.skip("the kernels are not compiled", allow_module_level=True)
CPU = CpuDevice()
COMPILED = [Compiled(library, isa) for isa in library.isas]
LEVELS = torch.tensor([-2047, -1425, -1075, -808, -582, -378, -186, 0, 163, 329, 504, 692, 902, 1152, 1480, 2047])
ARCHITECTURES = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "granite"]


def packed(directory: Path, compiled: Compiled) -> Any:
    """The base in `directory`, its layers and head on the compiled kernels."""
    base = load(directory).model
    pack(base, compiled)
    pack_head(base, compiled)
    assert isinstance(base.get_output_embeddings(), PackedHead)
    return base


def served(layer: NF4Linear) -> torch.Tensor:
    """[out, in]: the very numbers that the kernels multiply by."""
    levels = LEVELS[codes_of(layer.weight.detach()).int()] / LEVELS.max()
    return levels * layer.scales.t().repeat_interleave(BLOCK, dim=1)


def build(directory: Path, compiled: Compiled, recipe: Recipe | None = None) -> LoraModel:
    base = packed(directory, compiled)
    model = LoraModel.build(base, recipe or Recipe(), ops=training_kernels(base, CPU))
    randomize(model.trainable)
    return model


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_and_every_gradient_are_those_of_an_fp32_model_of_the_same_weights(
    architecture: str, tmp_path: Path
) -> None:
    save_tiny_model(tmp_path / "base", architecture)
    base = packed(tmp_path, COMPILED[-1])
    exact = AutoModelForCausalLM.from_config(copy.deepcopy(base.config), dtype=torch.float32)
    weights = dict(exact.named_parameters())
    for path, module in base.named_modules():
        for name, parameter in module.named_parameters(path, recurse=False):
            if name in weights:  # a tied head is no parameter of its own
                held = parameter
                if name.endswith("weight"):
                    held = served(module) if isinstance(module, NF4Linear) else weight_of(module)
                weights[name].data.copy_(held.float())
    total, theirs = plain_peft(exact, Recipe(), rows())
    model = LoraModel.build(base, Recipe(), ops=training_kernels(base, CPU))
    assert model._head is not None
    randomize(model.trainable)
    ours = gradients(model, TokenBatch.of(rows()))
    # Rows are rounded to 1/16383 of a block's largest number, the head's weights to 1/2047: 1e-4 of the usual size, in
    # some ten products one after the other, and random weights make it several times larger on the way.
    assert model.evaluate(TokenBatch.of(rows())).loss_sum == pytest.approx(total, rel=1e-3)
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).norm() < 5e-3 * gradient.norm(), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_step_has_the_same_bits_on_every_instruction_set_and_number_of_threads(
    architecture: str, tmp_path: Path
) -> None:
    save_tiny_model(tmp_path / "base", architecture)
    threads, found = torch.get_num_threads(), []
    try:
        for compiled in COMPILED:
            model = build(tmp_path, compiled, Recipe(dropout=0.1))
            for count in (1, 2):
                torch.set_num_threads(count)
                torch.manual_seed(3)
                slopes = gradients(model, TokenBatch.of(rows()))
                found.append((slopes, model.evaluate(TokenBatch.of(rows()))))
    finally:
        torch.set_num_threads(threads)
    for slopes, outcome in found[1:]:
        assert outcome == found[0][1]
        assert [name for name in slopes if not torch.equal(slopes[name], found[0][0][name])] == []


@pytest.mark.parametrize("targets", [(), ("q_proj", "v_proj")])
def test_layers_without_an_adapter_hand_gradients_on(targets: tuple[str, ...], tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "base")
    recipe = Recipe(target_modules=targets)
    plain = LoraModel.build(load(tmp_path).model, recipe)
    randomize(plain.trainable)
    theirs = gradients(plain, TokenBatch.of(rows()))
    ours = gradients(build(tmp_path, COMPILED[-1], recipe), TokenBatch.of(rows()))
    assert list(ours) == list(theirs)
    for name, gradient in theirs.items():  # theirs has NF4's levels, ours 3.5e-4 beside them
        assert (ours[name] - gradient).norm() < 4e-2 * gradient.norm(), name


def test_gradient_checkpointing_and_parts_of_the_head_change_no_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_model(tmp_path / "base")
    batch = TokenBatch.of(rows(9))
    expected = gradients(build(tmp_path, COMPILED[-1], Recipe()), batch)
    again = gradients(build(tmp_path, COMPILED[-1], Recipe(gradient_checkpointing=True)), batch)
    assert all(torch.equal(expected[name], again[name]) for name in expected)
    monkeypatch.setattr("loramux_adapters.training.model.head_loss._MOST_BYTES", 0)
    parts = gradients(build(tmp_path, COMPILED[-1], Recipe()), batch)
    assert batch.learned > 16
    assert all(torch.equal(expected[name], parts[name]) for name in expected)


def test_the_curve_is_that_of_the_same_model_by_pytorch_and_the_base_stays_as_it_is(tmp_path: Path) -> None:
    """Both learn the same batches. Their gradients differ by less than a hundredth, so do the first steps' losses."""
    save_tiny_model(tmp_path / "base")
    ours = build(tmp_path, COMPILED[-1])
    theirs = LoraModel.build(load(tmp_path).model, Recipe())
    randomize(theirs.trainable)
    digest, curves = ours.base_digest(), []
    for model in (ours, theirs):
        optimizer = torch.optim.AdamW(model.trainable.values(), lr=3e-3)
        curve = []
        for _ in range(30):
            optimizer.zero_grad()
            curve.append(model.loss(TokenBatch.of(rows(3)), grad_scale=1 / 9).loss_sum)
            optimizer.step()
        curves.append(torch.tensor(curve))
    assert curves[0][-1] < 0.2 * curves[0][0]
    assert (curves[0] - curves[1]).abs().max() < 0.02 * curves[1].max()
    assert ours.base_digest() == digest
    with_gradient = {name for name, p in ours._peft.named_parameters() if p.grad is not None}
    assert with_gradient == set(ours.trainable)


def test_what_was_patched_for_serving_is_trained_all_the_same(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "base")
    expected = gradients(build(tmp_path, COMPILED[-1]), TokenBatch.of(rows()))
    base = packed(tmp_path, COMPILED[-1])
    for module in base.modules():
        if isinstance(module, nn.Module) and type(module).__name__ == "LlamaMLP":
            module.__dict__.update(loramux_mlp=True, forward=lambda x: x)
    model = LoraModel.build(base, Recipe(), ops=training_kernels(base, CPU))
    randomize(model.trainable)
    found = gradients(model, TokenBatch.of(rows()))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
