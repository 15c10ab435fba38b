"""A and B that start at what quantization lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loramux_adapters.device.cpu import CpuDevice
from loramux_adapters.errors import RecipeError
from loramux_adapters.training.model.fused_linear import FrozenWeight
from loramux_adapters.training.model.model import LoraModel
from loramux_adapters.training.recipe import Recipe
from loramux_server.base.loader import load_base_model
from support.tiny_models import save_tiny_model

CPU = CpuDevice()


def test_a_model_starts_closer_to_its_16_bit_weights_on_an_unchanged_base(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "base")
    bases = [
        load_base_model(
            str(tmp_path / "base"),
            device=CPU,
            cache_dir=tmp_path / "cache",
            report=lambda line: None,
            quantize=quantize,
            training=True,
        ).model
        for quantize in ("nf4", "nf4", "none")
    ]
    originals = {path: module.weight for path, module in bases[2].named_modules() if hasattr(module, "weight")}
    plain = LoraModel.build(bases[0], Recipe(rank=8))
    model = LoraModel.build(bases[1], Recipe(rank=8, init="loftq"), originals=originals.__getitem__)
    assert model.base_digest() == plain.base_digest()
    for path in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
        layer = bases[1].get_submodule(path)
        held = FrozenWeight(layer.get_base_layer()).unpacked(torch.float32)
        names = (f"base_model.model.{path}.lora_{half}.default.weight" for half in "AB")
        a, b = (model.trainable[name].detach() for name in names)
        lost = (originals[path].detach().float() - held).norm()
        assert (originals[path].detach().float() - held - 2.0 * b @ a).norm() < 0.9 * lost


def test_without_the_16_bit_weights_it_is_refused(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "base")
    base = load_base_model(
        str(tmp_path / "base"), device=CPU, cache_dir=tmp_path / "cache", report=lambda line: None, training=True
    ).model
    with pytest.raises(RecipeError, match="needs the base's 16-bit weights"):
        LoraModel.build(base, Recipe(init="loftq"))
    with pytest.raises(RecipeError, match="the 16-bit weight of .*q_proj is .*checkpoint that the base"):
        LoraModel.build(base, Recipe(init="loftq"), originals=lambda path: torch.zeros(2, 2))
