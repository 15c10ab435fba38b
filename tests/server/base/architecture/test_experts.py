"""Mixtures of experts: transformers' own answers, 4 bits a weight, and the same bits alone and in company."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from loramux_adapters.device.cpu import CpuDevice
from loramux_adapters.errors import AdapterRejected
from loramux_adapters.lora.slots import Slot
from loramux_adapters.lora.verify import check_adapter
from loramux_adapters.lora.weights import load_host_adapter
from loramux_server.base.architecture.mxfp4 import dequantized_mxfp4
from loramux_server.base.architecture.transformers_model import read_model
from loramux_server.base.loader import BaseModel, load_base_model, resident_bytes
from loramux_server.base.source import check_base
from loramux_server.base.support import unsupported_config
from loramux_server.errors import BaseModelError
from loramux_server.kernels.choice import choose_kernels
from loramux_server.kernels.layers.experts import Experts
from loramux_server.kernels.layers.nf4_linear import NF4Linear
from support.adapter_files import write_adapter
from support.stepping import Stepper, relative_difference
from support.tiny_models import MIXTURES, save_tiny_model, tiny_config

CPU = CpuDevice()
PROMPT = torch.randint(0, 256, (45,), generator=torch.Generator().manual_seed(1)).tolist()
OTHER = PROMPT[::-1]
SEEDS = {"exaone_moe": 1}  # of models in which no choice of experts is too close for 12 bits of a router's weights


def load(directory: Path, **options: Any) -> BaseModel:
    cache = directory.parent / "cache"
    return load_base_model(str(directory), device=CPU, cache_dir=cache, report=lambda line: None, **options)


def theirs(directory: Path, tokens: list[int]) -> torch.Tensor:
    """Transformers' own model with its own attention and experts, in fp32, on the NF4 weights."""
    model: Any = load(directory, exact=True).model
    assert not any(isinstance(module, (Experts, NF4Linear)) for module in model.modules())
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    return logits


@pytest.mark.parametrize("architecture", MIXTURES)
def test_a_mixture_answers_as_transformers_does_in_chunks_and_token_by_token(architecture: str, tmp_path: Path) -> None:
    directory = save_tiny_model(tmp_path / "base", architecture, seed=SEEDS.get(architecture, 0))
    stepper = Stepper(load(directory).model)
    sequence = stepper.sequence("s", PROMPT)
    steps = stepper.greedy(sequence, 6, chunk=13)
    expected = theirs(directory, PROMPT + sequence.output)
    for index, ours in enumerate(steps):
        assert relative_difference(ours, expected[len(PROMPT) - 1 + index]) < 0.01


@pytest.mark.parametrize("architecture", MIXTURES)
def test_its_experts_take_four_bits_a_weight_and_a_second_start_reads_them(architecture: str, tmp_path: Path) -> None:
    directory = save_tiny_model(tmp_path / "base", architecture)
    base = load(directory)
    experts = [module for module in base.model.modules() if isinstance(module, Experts)]
    count = 8 if "n_group" in MIXTURES[architecture] else 4
    assert experts
    assert all(len(each) == count for each in experts)
    layers = [layer for each in experts for layer in each.modules() if isinstance(layer, NF4Linear)]
    assert len(layers) == len(experts) * count * 3
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    assert sum(layer.weight.nbytes for layer in layers) == weights // 2
    assert resident_bytes(base.model) < 0.45 * base.bytes_16bit
    told: list[str] = []
    again = load_base_model(str(directory), device=CPU, cache_dir=directory.parent / "cache", report=told.append)
    assert any("packed before" in line for line in told)
    logits = []
    for each in (base, again):
        stepper = Stepper(each.model)
        logits.append(stepper.prefill(stepper.sequence("s", PROMPT), chunk=45))
    assert torch.equal(*logits)


@pytest.mark.parametrize("architecture", MIXTURES)
def test_a_row_has_its_bits_alone_and_in_company_whatever_the_chunks(architecture: str, tmp_path: Path) -> None:
    stepper = Stepper(load(save_tiny_model(tmp_path / "base", architecture)).model)
    alone = stepper.prefill(stepper.sequence("alone", PROMPT), chunk=45)
    chunks = stepper.prefill(stepper.sequence("chunks", PROMPT), chunk=7)
    first, second = stepper.sequence("first", PROMPT), stepper.sequence("second", OTHER)
    together = stepper.logits([(second, len(OTHER)), (first, len(PROMPT))])
    assert torch.equal(alone, chunks)
    assert torch.equal(alone, together[1])


@pytest.mark.parametrize("architecture", ["gpt_oss", "qwen2_moe", "glm4_moe", "ernie4_5_moe"])
def test_a_row_has_the_same_bits_on_every_instruction_set(architecture: str, tmp_path: Path) -> None:
    directory = save_tiny_model(tmp_path / "base", architecture)
    found = []
    for kernels in ("native-portable", "native"):
        stepper = Stepper(load(directory, kernels=choose_kernels(CPU, kernels)).model, kernels=kernels)
        found.append(stepper.prefill(stepper.sequence("s", PROMPT), chunk=45))
    assert torch.equal(*found)


def test_of_experts_with_the_same_score_the_first_are_taken(tmp_path: Path) -> None:
    directory = save_tiny_model(tmp_path / "base", "qwen3_moe")
    file = directory / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name.endswith("mlp.gate.weight"):
            tensor[:] = tensor[:1]
    save_file(tensors, file, metadata={"format": "pt"})
    base = load(directory)
    gate = base.model.get_submodule("model.layers.0.mlp.gate")
    _, weights, experts = gate(torch.randn(5, 64))
    assert experts.tolist() == [[0, 1]] * 5
    assert torch.equal(weights, torch.full((5, 2), 0.5))


def adapter_for(directory: Path, base: BaseModel, part: str = "", rank: int = 4) -> Path:
    """Weights for all layers below "self_attn", those of experts that all rows go through, and those of experts whose
    path holds `part`."""
    linears = {
        path: shape
        for path, shape in base.linears.items()
        if "self_attn" in path or ".shared_" in path or (".experts." in path and part and part in path)
    }
    return write_adapter(directory, linears, rank=rank, std_b=0.2, seed=len(part))


@pytest.mark.parametrize("architecture", MIXTURES)
def test_adapters_of_attention_and_of_experts_share_a_batch(architecture: str, tmp_path: Path) -> None:
    directory = save_tiny_model(tmp_path / "base", architecture, seed=SEEDS.get(architecture, 0))
    base = load(directory)
    stepper = Stepper(base.model)
    slots = [Slot(0, 8), Slot(8, 8)]
    adapters = [adapter_for(tmp_path / name, base, name) for name in (".1.", "experts")]
    for slot, adapter in zip(slots, adapters, strict=True):
        checked = check_adapter(adapter, base.info(), 8)
        stepper.load(slot, load_host_adapter(adapter))
        assert any("experts.1.down_proj" in path for path in checked.adapter.modules)
    alone = [
        stepper.prefill(stepper.sequence(f"alone{index}", PROMPT, slot), chunk=45)
        for index, slot in enumerate((None, *slots))
    ]
    sequences = [stepper.sequence(f"s{index}", PROMPT, slot) for index, slot in enumerate((None, *slots))]
    together = stepper.logits([(sequence, len(PROMPT)) for sequence in sequences])
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one, other)
    for slot_logits, adapter in zip(alone[1:], adapters, strict=True):
        assert relative_difference(slot_logits, alone[0]) > 0.05
        assert relative_difference(slot_logits, merged_logits(directory, adapter)) < 0.02


def merged_logits(directory: Path, adapter: Path) -> torch.Tensor:
    """Transformers' own model with the adapter's deltas added to its weights."""
    model: Any = load(directory, exact=True).model
    for path, (a, bt) in load_host_adapter(adapter).modules.items():
        delta = bt.float().T @ a.float()
        if ".experts." not in path:
            model.get_submodule(path).weight.data += delta
            continue
        before, _, rest = path.partition(".experts.")
        number, layer = rest.split(".")
        experts = model.get_submodule(f"{before}.experts")
        down = layer == "down_proj"
        whole = (experts.down_proj if down else experts.gate_up_proj).data[int(number)]
        whole = whole.T if getattr(experts, "is_transposed", True) else whole
        if not down:
            up = layer == "up_proj"
            whole = whole.chunk(2)[up] if getattr(experts, "is_concatenated", True) else whole[int(up) :: 2]
        whole += delta
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=torch.tensor([PROMPT]), use_cache=False).logits[0, -1]
    return logits


def test_an_adapter_of_experts_leaves_no_trace_in_its_slot(tmp_path: Path) -> None:
    base = load(save_tiny_model(tmp_path / "base", "qwen3_moe"))
    stepper, slot = Stepper(base.model), Slot(0, 8)
    experts, attention = adapter_for(tmp_path / "a", base, "experts"), adapter_for(tmp_path / "b", base)
    stepper.load(slot, load_host_adapter(attention))
    before = stepper.prefill(stepper.sequence("before", PROMPT, slot), chunk=45)
    stepper.load(slot, load_host_adapter(experts))
    between = stepper.prefill(stepper.sequence("between", PROMPT, slot), chunk=45)
    stepper.load(slot, load_host_adapter(attention))
    after = stepper.prefill(stepper.sequence("after", PROMPT, slot), chunk=45)
    assert torch.equal(before, after)
    assert not torch.equal(before, between)


def test_an_adapter_under_mixtrals_own_names_fits(tmp_path: Path) -> None:
    base = load(save_tiny_model(tmp_path / "base", "mixtral"))
    path = "model.layers.1.block_sparse_moe.experts.2.w2"
    checked = check_adapter(write_adapter(tmp_path / "adapter", {path: (128, 64)}, rank=4), base.info(), 8)
    assert list(checked.adapter.modules) == ["model.layers.1.mlp.experts.2.down_proj"]


def test_an_adapter_of_all_experts_in_one_tensor_is_refused_by_name(tmp_path: Path) -> None:
    base = load(save_tiny_model(tmp_path / "base", "qwen3_moe"))
    extra = {"target_parameters": ["mlp.experts.gate_up_proj"]}
    adapter = write_adapter(tmp_path / "adapter", {"model.layers.0.self_attn.q_proj": (64, 64)}, extra_config=extra)
    with pytest.raises(AdapterRejected, match="target_parameters"):
        check_adapter(adapter, base.info(), 8)


@pytest.mark.parametrize("architecture", MIXTURES)
def test_experts_one_by_one_and_in_one_tensor_are_the_same_base(architecture: str, tmp_path: Path) -> None:
    directory = save_tiny_model(tmp_path / "base", architecture)
    stepper = Stepper(load(directory).model)
    expected = stepper.prefill(stepper.sequence("s", PROMPT), chunk=45)
    model = read_model(directory, CPU, None)
    file = directory / "model.safetensors"
    tensors = {name: each.to(torch.bfloat16).clone() for name, each in model.state_dict().items()}
    before = load_file(file)
    if any(name.endswith("experts.gate_up_proj") for name in before):  # written so before: now one by one
        tensors = one_by_one(tensors, interleaved=architecture == "gpt_oss", turned=architecture != "granitemoe_swa")
    save_file(tensors, file, metadata={"format": "pt"})
    assert tensors.keys() != before.keys()
    stepper = Stepper(load(directory).model)
    assert torch.equal(stepper.prefill(stepper.sequence("s", PROMPT), chunk=45), expected)


def one_by_one(tensors: dict[str, torch.Tensor], *, interleaved: bool, turned: bool) -> dict[str, torch.Tensor]:
    """Experts, each with tensors of its own. `turned`: all of a layer's weights lie as [inputs, outputs]."""
    found = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for name, tensor in tensors.items():
        before, _, last = name.partition(".experts.")
        for number, own in enumerate(tensor if last else ()):
            what = "bias" if last.endswith("_bias") else "weight"
            whole = own.T if turned and what == "weight" else own
            for index, layer in enumerate(("gate_proj", "up_proj") if "gate" in last else ("down_proj",)):
                part = whole
                if "gate" in last:
                    part = whole[index::2] if interleaved else whole.chunk(2)[index]
                found[f"{before}.experts.{number}.{layer}.{what}"] = part.contiguous()
    return found


def as_mxfp4(directory: Path) -> None:
    """Gives a checkpoint of gpt-oss random experts in the form in which it is published."""
    file, generator = directory / "model.safetensors", torch.Generator().manual_seed(5)
    found = {}
    for name, tensor in load_file(file).items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            found[name] = tensor
            continue
        count, inputs, outputs = tensor.shape
        shape = (count, outputs, inputs // 32)
        found[f"{name}_blocks"] = torch.randint(256, (*shape, 16), generator=generator, dtype=torch.uint8)
        found[f"{name}_scales"] = torch.randint(121, 126, shape, generator=generator, dtype=torch.uint8)
    save_file(found, file, metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens"]}
    (directory / "config.json").write_text(json.dumps(config))


def test_experts_in_mxfp4_as_gpt_oss_is_published_are_read_as_the_numbers_that_they_are(tmp_path: Path) -> None:
    directory = save_tiny_model(tmp_path / "base", "gpt_oss")
    as_mxfp4(directory)
    check_base(str(directory))
    tensors = load_file(directory / "model.safetensors")
    stem = "model.layers.0.mlp.experts.gate_up_proj"
    expected = convert_moe_packed_tensors(
        tensors[f"{stem}_blocks"], tensors[f"{stem}_scales"]
    )  # [experts, in, 2 * out]
    ours = dequantized_mxfp4(tensors[f"{stem}_blocks"][2], tensors[f"{stem}_scales"][2])
    assert torch.equal(ours, expected[2].T)
    stepper = Stepper(load(directory).model)
    sequence = stepper.sequence("s", PROMPT)
    steps = stepper.greedy(sequence, 3, chunk=13)
    logits = theirs(directory, PROMPT + sequence.output)
    for index, own in enumerate(steps):
        assert relative_difference(own, logits[len(PROMPT) - 1 + index]) < 0.01


def test_a_checkpoint_in_mxfp4_without_its_scales_is_refused(tmp_path: Path) -> None:
    directory = save_tiny_model(tmp_path / "base", "gpt_oss")
    as_mxfp4(directory)
    file = directory / "model.safetensors"
    save_file({name: each for name, each in load_file(file).items() if "down_proj_scales" not in name}, file)
    with pytest.raises(BaseModelError, match="holds no .*down_proj_scales"):
        load(directory)


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [("lfm2_moe", {}), ("phimoe", {"num_local_experts": 2}), ("cohere2_moe", {"num_experts": 4})],
)
def test_experts_of_another_kind_are_refused_by_name(architecture: str, changes: dict[str, Any]) -> None:
    reasons = unsupported_config(tiny_config(architecture, **changes))
    assert any("mixture of experts" in reason and "qwen3_moe" in reason for reason in reasons)


CORRECTIONS = {"glm4_moe": "mlp.gate.", "exaone_moe": "mlp.", "ernie4_5_moe": "mlp.moe_statics."}


@pytest.mark.parametrize("architecture", CORRECTIONS)
def test_corrections_of_routers_are_read_as_published_and_kept_in_fp32(architecture: str, tmp_path: Path) -> None:
    directory = save_tiny_model(tmp_path / "base", architecture)
    file, name = directory / "model.safetensors", f"model.layers.1.{CORRECTIONS[architecture]}e_score_correction_bias"
    tensors = load_file(file)
    corrections = torch.linspace(-1, 1, tensors[name].numel()).view(tensors[name].shape) + 1e-6
    assert not torch.equal(corrections, corrections.bfloat16().float())
    save_file(tensors | {name: corrections}, file, metadata={"format": "pt"})
    for _ in range(2):  # from the checkpoint, and as it was packed
        router: Any = load(directory).model.get_submodule("model.layers.1.mlp.gate")
        held = dict(router.named_parameters()) | dict(router.named_buffers())
        (own,) = (each for path, each in held.items() if path.endswith("e_score_correction_bias"))
        assert torch.equal(own, corrections)
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match=r"holds no model\.layers\.1\.mlp.*e_score_correction_bias"):
        load(directory)


@pytest.mark.parametrize("quantize", ["nf4", "none"])
def test_training_on_a_mixture_is_refused_with_what_to_do(quantize: str, tmp_path: Path) -> None:
    directory = save_tiny_model(tmp_path / "base", "qwen3_moe")
    with pytest.raises(BaseModelError, match=r"mixture of experts.*not trained here"):
        load(directory, training=True, quantize=quantize)


def test_a_mixture_without_kernels_of_our_own_is_refused(tmp_path: Path) -> None:
    directory = save_tiny_model(tmp_path / "base", "qwen3_moe")
    with pytest.raises(BaseModelError, match=r"mixture of experts.*kernels of our own"):
        load(directory, kernels=choose_kernels(CPU, "tensor"))


def test_widths_that_no_kernel_takes_are_refused(tmp_path: Path) -> None:
    directory = save_tiny_model(tmp_path / "base", "qwen3_moe", moe_intermediate_size=48)
    with pytest.raises(BaseModelError, match=r"multiple of 64"):
        load(directory)
