"""A and B that start at what quantization lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loramux_adapters.device.cpu import CpuDevice
from loramux_adapters.errors import RecipeError
from loramux_adapters.training.model.fused_linear import FrozenWeight
from loramux_adapters.training.model.loftq import closest_pair
from loramux_adapters.training.model.model import LoraModel
from loramux_adapters.training.recipe import Recipe
from loramux_server.base.loader import load_base_model
from support.tiny_models import save_tiny_model

CPU = CpuDevice()


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (24, 24)])
@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_no_pair_of_that_rank_is_closer(shape: tuple[int, int], scale: float) -> None:
    torch.manual_seed(1)
    residual = torch.randn(shape)
    a, b = closest_pair(residual, 5, scale)
    assert (a.shape, b.shape) == ((5, shape[1]), (shape[0], 5))
    left = (residual - scale * b @ a).norm()
    assert left == pytest.approx(float(torch.linalg.svdvals(residual)[5:].norm()), rel=1e-4)
    assert a.norm() == pytest.approx(float(b.norm()), rel=1e-4)


def test_a_rank_above_the_smaller_side_reaches_the_residual_itself() -> None:
    residual = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))
    a, b = closest_pair(residual, 6, 1.0)
    assert (a.shape, b.shape) == ((6, 8), (3, 6))
    assert torch.allclose(b @ a, residual, atol=1e-5)


def test_nothing_lost_means_zeros() -> None:
    a, b = closest_pair(torch.zeros(8, 4), 2, 1.0)
    assert not a.any() and not b.any()


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
