"""lora_down, lora_up and alpha -> PEFT: the same numbers under PEFT's names, or a refusal that says why."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loramux_adapters.artifact.config import scale_of
from loramux_adapters.artifact.format import read_config
from loramux_adapters.artifact.safetensors_header import read_header
from loramux_adapters.base_info import BaseInfo
from loramux_adapters.errors import AdapterRejected
from loramux_adapters.layouts.kohya_names import convert_kohya, has_kohya_names
from loramux_adapters.lora.verify import check_adapter
from support.adapter_files import TINY_LINEARS, write_adapter
from support.foreign_adapters import halves_of, write_kohya

BASE = BaseInfo("aa" * 32, TINY_LINEARS)
Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize(
    ("flat", "old"), [(None, False), (None, True), ("lora_te_", False), ("lycoris_", False), ("lora_unet_", False)]
)
def test_what_is_converted_is_what_it_was(tmp_path: Path, flat: str | None, old: bool, dtype: str) -> None:
    adapter = write_adapter(tmp_path / "peft", TINY_LINEARS, rank=4, alpha=6, dtype=dtype)
    file = write_kohya(adapter, tmp_path / "k.safetensors", flat=flat, old=old)
    assert has_kohya_names(read_header(file)) and not has_kohya_names(
        read_header(adapter / "adapter_model.safetensors")
    )
    target = tmp_path / "converted"
    target.mkdir()
    convert_kohya(file, target)
    assert check_adapter(target, BASE, 64).version == check_adapter(adapter, BASE, 64).version
    assert read_config(target).notes == (f"converted from lora_down and lora_up of {len(TINY_LINEARS)} modules",)


def test_ranks_and_alphas_of_their_own_stay_so(tmp_path: Path) -> None:
    ranks, alphas = {Q: 2}, {"model.layers.1.mlp.up_proj": 3.0}
    adapter = write_adapter(tmp_path / "peft", TINY_LINEARS, rank=4, alpha=8, rank_pattern=ranks, alpha_pattern=alphas)
    target = tmp_path / "converted"
    target.mkdir()
    convert_kohya(write_kohya(adapter, tmp_path / "k.safetensors"), target)
    before, after = read_config(adapter), read_config(target)
    for module, (a, _) in halves_of(target).items():
        assert scale_of(after, module, a.shape[0]) == scale_of(before, module, a.shape[0])
    assert check_adapter(target, BASE, 64).version == check_adapter(adapter, BASE, 64).version


def test_without_alpha_the_product_counts_once(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "peft", TINY_LINEARS, targets=["q_proj"], rank=4, alpha=64)
    target = tmp_path / "converted"
    target.mkdir()
    convert_kohya(write_kohya(adapter, tmp_path / "k.safetensors", alpha=False), target)
    assert scale_of(read_config(target), Q, 4) == 1.0


def test_layers_that_differ_are_named_one_by_one(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "peft", TINY_LINEARS, targets=["0.self_attn.q_proj", "1.mlp.up_proj"], rank=4)
    target = tmp_path / "converted"
    target.mkdir()
    convert_kohya(write_kohya(adapter, tmp_path / "k.safetensors"), target)
    config = read_config(target)
    assert config.target_modules == ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj")
    assert check_adapter(target, BASE, 64).version == check_adapter(adapter, BASE, 64).version


A, B = torch.ones(2, 64), torch.ones(64, 2)
GOOD = {f"{Q}.lora_down.weight": A, f"{Q}.lora_up.weight": B}


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": A}, "is it an image model's LoRA?"),
        ({f"{Q}.lora_down.weight": A}, "has no lora_up"),
        ({f"{Q}.lora_up.weight": B}, "has no lora_down"),
        ({f"{Q}.alpha": torch.tensor(1.0)}, "has no lora_down"),
        (GOOD | {f"{Q}.alpha": torch.tensor([1.0, 2.0])}, "an alpha that is not one finite number"),
        (GOOD | {f"{Q}.alpha": torch.tensor(float("nan"))}, "an alpha that is not one finite number"),
        (GOOD | {f"{Q}.alpha": torch.tensor(-1.0)}, "has alpha -1, which is not above 0"),
        (GOOD | {f"{Q}.dora_scale": torch.ones(64)}, "is a DoRA magnitude, which is not LoRA"),
        (GOOD | {f"{Q}.hada_w1_a": A}, "is LoHa, a product of two LoRAs"),
        (GOOD | {f"{Q}.lokr_w1": A}, "is LoKr"),
        (GOOD | {f"{Q}.diff": A}, "is a whole difference"),
        (GOOD | {"something": A}, "tensor 'something' is no lora_down, lora_up or alpha"),
        (GOOD | {f"base_model.model.{Q}.lora_A.weight": A}, "it has PEFT's name, and its adapter_config.json belongs"),
        (GOOD | {f"lora_te_{Q.replace('.', '_')}.lora_down.weight": A + 1}, "are the same weight"),
        ({f"{Q}.lora_down.weight": A, f"{Q}.lora_up.weight": torch.ones(64, 3)}, "halves of ranks 2 and 3"),
        ({f"{Q}.lora_down.weight": torch.ones(2, 64, 1, 1), f"{Q}.lora_up.weight": B}, "LoRA of a convolution"),
        ({f"{Q}.lora_down.weight": torch.ones(0, 64), f"{Q}.lora_up.weight": torch.ones(64, 0)}, "an empty matrix"),
    ],
)
def test_what_is_none_is_refused_by_name(tmp_path: Path, tensors: dict[str, torch.Tensor], says: str) -> None:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "k.safetensors")
    with pytest.raises(AdapterRejected) as caught:
        convert_kohya(tmp_path / "k.safetensors", tmp_path)
    assert says in str(caught.value)


def test_few_of_many_reasons_are_told(tmp_path: Path) -> None:
    save_file({f"strange.{index}": A + index for index in range(40)}, tmp_path / "k.safetensors")
    with pytest.raises(AdapterRejected) as caught:
        convert_kohya(tmp_path / "k.safetensors", tmp_path)
    assert len(caught.value.reasons) == 6 and caught.value.reasons[-1] == "and 35 more"


@pytest.mark.parametrize(
    ("flat", "module"),
    [
        ("lora_te_model_layers_3_mlp_gate_up_proj", "model.layers.3.mlp.gate_up_proj"),
        ("lora_te2_layers_0_self_attn_o_proj", "model.layers.0.self_attn.o_proj"),
        (
            "lycoris_model_language_model_layers_10_self_attn_qkv_proj",
            "model.language_model.layers.10.self_attn.qkv_proj",
        ),
        ("lora_language_model_model_layers_1_mlp_down_proj", "language_model.model.layers.1.mlp.down_proj"),
        ("lora_lm_head", "lm_head"),
    ],
)
def test_flat_names_are_taken_apart(tmp_path: Path, flat: str, module: str) -> None:
    save_file({f"{flat}.lora_down.weight": A, f"{flat}.lora_up.weight": B}, tmp_path / "k.safetensors")
    convert_kohya(tmp_path / "k.safetensors", tmp_path)
    assert list(halves_of(tmp_path)) == [module]
