"""A 16-bit base becomes NF4 on the device one layer at a time, with the CPU's numbers and little memory beside them."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loramux_adapters import nf4
from loramux_adapters.device.cpu import CpuDevice
from loramux_adapters.device.device import Device
from loramux_server.base import packed_file
from loramux_server.base.loader import BaseModel, load_base_model, resident_bytes
from loramux_server.base.quantized import state_digest
from loramux_server.errors import BaseModelError
from loramux_server.kernels.compiled.library import native_library
from support import triton_interpreter
from support.emulated import EmulatedDevice
from support.tiny_models import save_tiny_model

pytestmark = pytest.mark.skipif(
    not triton_interpreter.INSTALLED or native_library() is None, reason="needs Triton and compiled kernels"
)
SHAPE = {"num_hidden_layers": 1, "intermediate_size": 192}  # more would take Triton's interpreter minutes
LARGEST = 2 * 64 * 192  # bytes of a layer in 16 bits
CPU = CpuDevice()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "wide", "qwen2", **SHAPE)


def card(**options: Any) -> EmulatedDevice:
    return EmulatedDevice(kernels="triton", **options)


def load(directory: Path, cache: Path, device: Device) -> tuple[BaseModel, list[str]]:
    said: list[str] = []
    base = load_base_model(str(directory), device=device, cache_dir=cache, report=said.append, training=True)
    return base, said


def layers_of(base: BaseModel) -> dict[str, Any]:
    return {path: each for path, each in base.model.named_modules() if path.endswith("_proj")}


@pytest.mark.parametrize("early", [0.0, 0.3])
def test_it_has_the_numbers_of_the_compiled_quantizer_and_the_same_id(
    early: float, checkpoint: Path, tmp_path: Path
) -> None:
    ours, its = (load(checkpoint, tmp_path, device)[0] for device in (card(early=early), CPU))
    assert (ours.kernels.name, ours.base_id, ours.bytes_16bit) == ("triton", its.base_id, its.bytes_16bit)
    for path, layer in layers_of(its).items():
        found = nf4.dequantize(*layers_of(ours)[path].nf4.unpacked())
        assert torch.equal(found, layer.dequantized()), path
        assert layer.bias is None or torch.equal(layer.bias, layers_of(ours)[path].bias)
    assert torch.equal(ours.floats["model.norm.weight"], its.floats["model.norm.weight"])
    expected = load_file(checkpoint / "model.safetensors")["lm_head.weight"]
    assert torch.equal(ours.floats["lm_head.weight"], expected)


@pytest.mark.parametrize("window", [1 << 14, 1 << 13])
def test_beside_the_base_the_device_holds_less_than_a_layer_in_16_bits(
    window: int, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_file, "_WINDOW", window)
    monkeypatch.setattr(packed_file, "_PART", 1 << 12)
    monkeypatch.setattr(packed_file.DeviceTensors, "window", window)
    first, again = card(), card()
    base, _ = load(checkpoint, tmp_path, first)
    gc.collect()  # Triton's interpreter holds what it was given last
    held = first.memory().held
    assert 0 <= held - resident_bytes(base.model) < 2**10
    assert first.memory().peak - held == window < LARGEST
    assert base.bytes_16bit - 2 * 2 * 320 * 64 > 4 * LARGEST
    read, said = load(checkpoint, tmp_path, again)
    assert len(said) == 1 and said[0].startswith("reading the base as it was packed before")
    assert again.memory().peak == again.memory().held == held
    assert state_digest(base.model) == state_digest(read.model)


def test_layers_that_a_step_reads_as_one_lie_side_by_side(checkpoint: Path, tmp_path: Path) -> None:
    from loramux_server.kernels.gpu.nf4 import Nf4Weights

    device = card()
    layers = layers_of(load(checkpoint, tmp_path, device)[0])
    held = device.memory().held
    for names in (["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]):
        room = "mlp" if "up_proj" in names else "self_attn"
        together = [layers[f"model.layers.0.{room}.{name}"] for name in names]
        stacked = Nf4Weights.stack([each.nf4 for each in together])
        assert stacked.outputs == sum(each.out_features for each in together)
        assert stacked.codes.data_ptr() == together[0].nf4.codes.data_ptr()
    assert device.memory().held == held


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_floats_are_rounded_to_bf16_one_at_a_time(dtype: torch.dtype, checkpoint: Path, tmp_path: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    for name, each in weights.items():
        weights[name] = each.to(dtype) * 1.001
    copy = save_tiny_model(tmp_path / "base", "qwen2", **SHAPE)
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    ours, its = (load(copy, tmp_path / "cache", device)[0] for device in (card(), CPU))
    for path, layer in layers_of(ours).items():
        expected = nf4.dequantize(*nf4.quantize(weights[f"{path}.weight"].bfloat16()))
        assert torch.equal(nf4.dequantize(*layer.nf4.unpacked()), expected)
        assert torch.equal(layers_of(its)[path].dequantized(), expected)
    assert torch.equal(ours.floats["lm_head.weight"], weights["lm_head.weight"].bfloat16())


def test_a_device_that_is_too_small_is_named_and_nothing_is_kept(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="does not fit into memory .*use a smaller base"):
        load(checkpoint, tmp_path, card(total=50_000))
    assert not (tmp_path / "packed-triton").exists()


def test_what_was_kept_and_damaged_is_made_again(checkpoint: Path, tmp_path: Path) -> None:
    first, _ = load(checkpoint, tmp_path, card())
    (file,) = (tmp_path / "packed-triton").iterdir()
    whole = bytearray(file.read_bytes())
    file.write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    again, said = load(checkpoint, tmp_path, card())
    assert "bytes are not those that were packed" in said[1] and "packed again" in said[1]
    assert state_digest(first.model) == state_digest(again.model) and file.read_bytes() == bytes(whole)


def test_a_weight_that_is_missing_is_named(checkpoint: Path, tmp_path: Path) -> None:
    copy = save_tiny_model(tmp_path / "base", "qwen2", **SHAPE)
    weights = load_file(copy / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    for device in (card(), CPU):
        with pytest.raises(BaseModelError, match=r"holds no model\.layers\.0\.mlp\.up_proj\.weight"):
            load(copy, tmp_path / "cache", device)


def test_a_checkpoint_of_the_model_without_a_head_is_read_by_its_names(checkpoint: Path, tmp_path: Path) -> None:
    copy = save_tiny_model(tmp_path / "base", "qwen2", tie_word_embeddings=True, **SHAPE)
    weights = load_file(copy / "model.safetensors")
    expected, _ = load(copy, tmp_path / "cache", CPU)
    bare = {name.removeprefix("model."): each for name, each in weights.items()}
    save_file(bare, copy / "model.safetensors", metadata={"format": "pt"})
    found, _ = load(copy, tmp_path / "cache", CPU)
    assert state_digest(found.model) == state_digest(expected.model) and found.base_id != expected.base_id
