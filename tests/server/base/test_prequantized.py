"""A checkpoint that bitsandbytes quantized before is served on its own numbers, and refused where they lie."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from loramux_adapters import nf4
from loramux_adapters.device.cpu import CpuDevice
from loramux_adapters.device.device import Device
from loramux_server.base.identity import compute_base_id
from loramux_server.base.loader import BaseModel, load_base_model, quantization_recipe
from loramux_server.base.originals import original_weights
from loramux_server.base.quantized import state_digest
from loramux_server.base.source import check_base
from loramux_server.engine.local_engine import LocalEngine
from loramux_server.errors import BaseModelError
from loramux_server.kernels.choice import choose_kernels
from loramux_server.kernels.compiled.library import native_library
from loramux_server.kernels.layers.fp32 import DequantizedNF4
from loramux_server.kernels.layers.nf4_linear import NF4Linear
from support import triton_interpreter
from support.emulated import EmulatedDevice
from support.tiny_models import save_quantized_model, save_tiny_model

CPU = CpuDevice()
COMPILED = native_library() is not None
PACKED = ["native", *(["triton"] if triton_interpreter.INSTALLED else [])] if COMPILED else []
SETS = [*PACKED, "tensor"]
LAYER = "model.layers.1.mlp.down_proj"
STATE = f"{LAYER}.weight.quant_state.bitsandbytes__nf4"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny", "qwen2")  # with biases


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    return save_quantized_model(tmp_path_factory.mktemp("models") / "nf4", checkpoint)


def device_of(kernels: str) -> Device:
    return EmulatedDevice(kernels="triton") if kernels == "triton" else CPU


def load(directory: Path, cache: Path, kernels: str = SETS[0], **options: Any) -> tuple[BaseModel, list[str]]:
    said: list[str] = []
    device = device_of(kernels)
    given = choose_kernels(device, kernels)
    base = load_base_model(str(directory), device=device, cache_dir=cache, report=said.append, kernels=given, **options)
    return base, said


def numbers_of(layer: Any) -> torch.Tensor:
    """[out, in] fp32: what a layer multiplies with, on any kernels."""
    if isinstance(layer, NF4Linear):
        return layer.dequantized()
    if isinstance(layer, DequantizedNF4):
        return layer.weight.detach()
    if hasattr(layer, "nf4"):
        return nf4.dequantize(*layer.nf4.unpacked())
    return its_numbers(layer)


def its_numbers(layer: Any) -> torch.Tensor:
    """[out, in] fp32, as bitsandbytes says."""
    layer.weight.quant_state.dtype = torch.float32
    found: torch.Tensor = bnb.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return found


def its_own(directory: Path, **options: Any) -> Any:
    model: Any = AutoModelForCausalLM
    return model.from_pretrained(directory, device_map={"": "cpu"}, **options)


def linears(model: Any) -> dict[str, Any]:
    return {path: each for path, each in model.named_modules() if path.endswith("_proj")}


def copied(directory: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(directory, tmp_path / "copy"))


def changed(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def configured(directory: Path, **quantization: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] |= quantization
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kernels", SETS)
@torch.inference_mode()
def test_every_layer_keeps_the_numbers_of_bitsandbytes_to_the_last_bit(
    kernels: str, double: bool, dtype: torch.dtype, checkpoint: Path, tmp_path: Path
) -> None:
    directory = save_quantized_model(tmp_path / "nf4", checkpoint, double=double, dtype=dtype)
    expected = its_own(directory)
    base, said = load(directory, tmp_path / "cache", kernels, training=True)
    assert "which was quantized before" in said[-2 if kernels != "tensor" else -1]
    ours, its = linears(base.model), linears(expected)
    assert ours.keys() == its.keys() and len(ours) == 14
    for path, layer in ours.items():
        assert torch.equal(numbers_of(layer), its_numbers(its[path])), path
        if its[path].bias is not None:
            assert torch.equal(layer.bias.float(), its[path].bias.bfloat16().float()), path
    for name in ("model.norm.weight", "model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"):
        assert torch.equal(base.floats[name].float(), expected.get_parameter(name).bfloat16().float())


@pytest.mark.parametrize("kernels", PACKED)
def test_a_later_start_reads_what_was_kept_and_has_the_same_bits(kernels: str, quantized: Path, tmp_path: Path) -> None:
    (first, _), (again, said) = (load(quantized, tmp_path, kernels) for _ in range(2))
    assert len(said) == 1 and said[0].startswith("reading the base as it was packed before")
    assert state_digest(first.model) == state_digest(again.model) and first.base_id == again.base_id
    assert first.linears == again.linears and first.bytes_16bit == again.bytes_16bit


def test_one_id_whatever_runs_on_it_and_whatever_it_would_compute_in(quantized: Path, tmp_path: Path) -> None:
    ids = {load(quantized, tmp_path / "cache", "tensor")[0].base_id}
    copy = copied(quantized, tmp_path)
    configured(copy, bnb_4bit_compute_dtype="float16")
    base = load(copy, tmp_path / "cache", "tensor")[0]
    assert ids == {base.base_id}
    changed(copy, lambda tensors: tensors[f"{LAYER}.weight.nested_absmax"].mul_(2))
    assert compute_base_id(copy, quantization_recipe(base.config)) != base.base_id


def test_the_16_bit_checkpoint_is_another_base(checkpoint: Path, quantized: Path, tmp_path: Path) -> None:
    assert len({load(each, tmp_path, "tensor")[0].base_id for each in (checkpoint, quantized)}) == 2


@pytest.mark.parametrize("kernels", [each for each in SETS if each != "triton"])
def test_an_adapter_that_peft_trained_on_it_gives_the_logprobs_of_peft(
    kernels: str, quantized: Path, tmp_path: Path
) -> None:
    """Both in fp32 but for the kernels' own rounding. What the numbers are on Triton is compared above, to the bit."""
    torch.manual_seed(0)
    model = its_own(quantized)
    for each in model.parameters():
        if each.is_floating_point():
            each.data = each.data.float()
    for layer in linears(model).values():
        layer.compute_dtype, layer.compute_type_is_set = torch.float32, True
        layer.weight.quant_state.dtype = torch.float32
        layer.support_avx512bf16_for_cpu = False
    lora = peft.LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False
    )
    with warnings.catch_warnings(action="ignore"):  # of what peft asks transformers for
        tuned: Any = peft.get_peft_model(model, lora)
    for name, each in tuned.named_parameters():
        if "lora_" in name:
            each.data = each.data.bfloat16().float()  # as adapters are kept here
    tuned.eval().save_pretrained(tmp_path / "adapter")
    tokens = list(range(3, 40))
    with torch.inference_mode():
        logits = tuned(input_ids=torch.tensor([tokens])).logits[0].float().log_softmax(-1)
    expected = [float(logits[place, tokens[place + 1]]) for place in range(20, len(tokens) - 1)]
    base, _ = load(quantized, tmp_path / "cache", kernels)
    engine = LocalEngine.open(base, rows=4, tokens=512, max_rank=8)
    adapter = engine.load(tmp_path / "adapter")
    found = engine.score([(tokens[:21], tokens[21:])], adapter)[0]
    assert found == pytest.approx(expected, abs=0.02)


def set_state(**changes: Any) -> Callable[[dict[str, torch.Tensor]], object]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        state = json.loads(bytes(tensors[STATE].tolist())) | changes
        tensors[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return change


def renamed(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.__setitem__(f"{LAYER}.{new}", tensors.pop(f"{LAYER}.{old}"))


def less(name: str, count: int = 1) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.__setitem__(f"{LAYER}.{name}", tensors[f"{LAYER}.{name}"][:-count].clone())


WRONG: list[tuple[Callable[[dict[str, torch.Tensor]], object], str]] = [
    (lambda tensors: tensors.pop(f"{LAYER}.weight.absmax"), "absmax is missing beside it"),
    (lambda tensors: tensors.pop(STATE), "bitsandbytes__nf4 is missing beside it"),
    (lambda tensors: tensors.pop(f"{LAYER}.weight.nested_absmax"), "absmax is uint8, and not float32"),
    (lambda tensors: tensors.pop(f"{LAYER}.weight.nested_quant_map"), "nested_quant_map is missing"),
    (lambda tensors: tensors.pop(f"{LAYER}.weight"), f"holds no {LAYER}.weight"),
    (less("weight.absmax"), "it has 127 scales, and 64 x 128 numbers need 128"),
    (less("weight"), "it has 4095 bytes, and 64 x 128 codes take 4096"),
    (less("weight.nested_quant_map"), "nested_quant_map has 255 levels"),
    (less("weight.nested_absmax"), "in blocks of 256 have 0 scales of their own"),
    (lambda tensors: tensors[f"{LAYER}.weight.quant_map"].mul_(2), "levels .* are not those of NF4"),
    (lambda tensors: tensors[f"{LAYER}.weight.nested_absmax"].fill_(torch.inf), "scales are not finite"),
    (set_state(shape=[128, 64]), "is 128 x 64 numbers, and its config asks for 64 x 128"),
    (set_state(shape=[64, 120]), "blocks of 64 would reach"),
    (set_state(shape="64 x 128"), "gives the shape '64 x 128'"),
    (set_state(blocksize=128), "in blocks of 128, and only 64 are: quantize the 16-bit checkpoint"),
    (set_state(blocksize=None), "gives blocksize as None"),
    (set_state(nested_blocksize=64), "128 scales in blocks of 64 have 1 scales of their own"),
    (set_state(nested_offset="nan"), "nested_offset is 'nan'"),
    (set_state(quant_type="fp4"), "calls it 'fp4', and only 'nf4' is served"),
    (renamed("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4"), "it is fp4"),
    (lambda tensors: tensors.__setitem__(STATE, torch.zeros(5, dtype=torch.uint8)), "quant_state is no JSON object"),
    (
        lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith(f"{LAYER}.weight.")],
        "in torch.uint8",
    ),
]


@pytest.mark.parametrize("kernels", PACKED[:1])
@pytest.mark.parametrize(("change", "says"), WRONG, ids=[says for _, says in WRONG])
def test_parts_that_are_missing_or_lie_are_named_and_nothing_is_kept(
    change: Callable[[dict[str, torch.Tensor]], object], says: str, kernels: str, quantized: Path, tmp_path: Path
) -> None:
    copy = copied(quantized, tmp_path)
    changed(copy, change)
    with pytest.raises(BaseModelError, match=says) as raised:
        load(copy, tmp_path / "cache", kernels)
    assert LAYER in str(raised.value)
    kept = [each for folder in ("packed", "packed-triton") for each in (tmp_path / "cache").glob(f"{folder}/*")]
    assert kept == []


@pytest.mark.parametrize(("change", "says"), WRONG[:3], ids=[says for _, says in WRONG[:3]])
@pytest.mark.parametrize("kernels", ["tensor", *PACKED[1:]])
def test_they_are_named_on_other_kernels_too(
    change: Callable[[dict[str, torch.Tensor]], object], says: str, kernels: str, quantized: Path, tmp_path: Path
) -> None:
    copy = copied(quantized, tmp_path)
    changed(copy, change)
    with pytest.raises(BaseModelError, match=says):
        load(copy, tmp_path / "cache", kernels)


def test_a_file_that_is_cut_short_is_named(quantized: Path, tmp_path: Path) -> None:
    copy = copied(quantized, tmp_path)
    whole = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(BaseModelError, match=r"model\.safetensors.*cut short"):
        load(copy, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("quantization", "says"),
    [
        ({"quant_method": "gptq"}, r"quantized already \(gptq\); give the 16-bit checkpoint, or one that bitsandbytes"),
        ({"quant_method": "awq"}, r"quantized already \(awq\)"),
        ({"quant_method": "fp8"}, r"quantized already \(fp8\)"),
        ({"load_in_8bit": True, "load_in_4bit": False}, "by bitsandbytes to 8 bits"),
        ({"bnb_4bit_quant_type": "fp4"}, "by bitsandbytes to fp4; give the 16-bit checkpoint"),
    ],
)
def test_other_ways_of_quantizing_are_refused_by_name(
    quantization: dict[str, Any], says: str, quantized: Path, tmp_path: Path
) -> None:
    copy = copied(quantized, tmp_path)
    check_base(str(copy))
    configured(copy, **quantization)
    with pytest.raises(BaseModelError, match=says):
        check_base(str(copy))


def test_bytes_that_are_stored_as_other_numbers_are_the_same(quantized: Path, tmp_path: Path) -> None:
    """bnb_4bit_quant_storage, which FSDP's users set."""
    copy = copied(quantized, tmp_path)
    name = f"{LAYER}.weight"
    changed(copy, lambda tensors: tensors.update({name: tensors[name].view(1, -1).view(torch.bfloat16)}))
    ours, its = (load(each, tmp_path / "cache")[0].model.get_submodule(LAYER) for each in (copy, quantized))
    assert torch.equal(numbers_of(ours), numbers_of(its))


@pytest.mark.parametrize("kernels", SETS)
def test_layers_that_were_left_out_stay_in_16_bits(kernels: str, checkpoint: Path, tmp_path: Path) -> None:
    left = "model.layers.0.self_attn.k_proj"
    directory = save_quantized_model(tmp_path / "nf4", checkpoint, llm_int8_skip_modules=["lm_head", left])
    whole = load_file(checkpoint / "model.safetensors")[f"{left}.weight"]
    for said in (
        "1 of its layers were left in 16 bits",
        "packed before" if kernels != "tensor" else "quantized before",
    ):
        base, lines = load(directory, tmp_path / "cache", kernels)
        assert kernels == "tensor" or any(said in line for line in lines)
        kept: Any = base.model.get_submodule(left)
        assert torch.equal(kept.weight.float(), whole.float())
    if kernels == "triton":  # an engine in Triton's interpreter takes minutes
        return
    engine = LocalEngine.open(base, rows=4, tokens=512, max_rank=8)
    tokens = list(range(3, 40))
    with torch.inference_mode():
        logits = its_own(directory)(input_ids=torch.tensor([tokens])).logits[0].float().log_softmax(-1)
    expected = [float(logits[place, tokens[place + 1]]) for place in range(20, len(tokens) - 1)]
    assert engine.score([(tokens[:21], tokens[21:])], None)[0] == pytest.approx(expected, abs=0.2)  # its is bf16


@pytest.mark.parametrize("kernels", PACKED)
def test_a_head_that_was_quantized_is_multiplied_out(kernels: str, checkpoint: Path, tmp_path: Path) -> None:
    directory = save_quantized_model(tmp_path / "nf4", checkpoint, llm_int8_skip_modules=["model.nothing"])
    head = its_numbers(its_own(directory).lm_head)
    base, _ = load(directory, tmp_path / "cache", kernels, training=True)
    untyped: Any = base.model
    ours = untyped.get_output_embeddings()
    if kernels == "native":
        assert torch.allclose(ours.product(torch.eye(64))[:, :320].T, head, atol=float(head.abs().max()) / 200)
    else:
        assert torch.equal(ours.weight, head.bfloat16())


def test_it_has_no_16_bit_weights(quantized: Path, tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="no 16-bit weights: name the checkpoint that it was made of"):
        load(quantized, tmp_path, "tensor", quantize="none")
    with pytest.raises(BaseModelError, match=f"{LAYER}.weight was quantized before"):
        original_weights(quantized, lambda name: [name])(LAYER)


def test_the_exact_model_has_its_numbers(quantized: Path, tmp_path: Path) -> None:
    base = load_base_model(str(quantized), device=CPU, cache_dir=tmp_path, report=lambda line: None, exact=True)
    its = linears(its_own(quantized))
    for path, layer in linears(base.model).items():
        assert torch.equal(numbers_of(layer), its_numbers(its[path])), path
