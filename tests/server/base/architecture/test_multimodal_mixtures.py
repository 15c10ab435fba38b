"""A text on a mixture of experts that takes images too: its language part, experts as checkpoints hold them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loramux_adapters.device.cpu import CpuDevice
from loramux_adapters.lora.slots import Slot
from loramux_adapters.lora.verify import check_adapter
from loramux_server.kernels.layers.experts import Experts
from support.adapter_files import write_adapter
from support.stepping import Stepper, relative_difference
from support.tiny_models import ATTENTION_MIXTURES
from support.tiny_multimodal import MIXED, load, save_multimodal, whole_logits

CPU = CpuDevice()
PROMPT = torch.randint(0, 256, (45,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.mark.parametrize(
    ("kind", "changes"), [*((kind, {}) for kind in MIXED), ("llama4", ATTENTION_MIXTURES["llama4_text"])]
)
def test_a_text_gets_the_answers_of_the_whole_model(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    directory = save_multimodal(tmp_path / "base", kind, **changes)
    base = load(directory)
    assert any(isinstance(module, Experts) for module in base.model.modules())
    stepper = Stepper(base.model)
    sequence = stepper.sequence("s", PROMPT)
    steps = stepper.greedy(sequence, 4, chunk=13)
    theirs = whole_logits(directory, base, PROMPT + sequence.output)
    for index, ours in enumerate(steps):
        assert relative_difference(ours, theirs[len(PROMPT) - 1 + index]) < 0.01


def turn_experts(directory: Path) -> None:
    """Writes every weight of all experts of a layer the other way around."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    turned = [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    assert turned
    for name in turned:
        tensors[name] = tensors[name].transpose(1, 2).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})


def test_experts_that_lie_either_way_around_are_the_same_served_exact_and_in_16_bits(tmp_path: Path) -> None:
    directory = save_multimodal(tmp_path / "base", "qwen3_vl_moe")
    found: list[list[torch.Tensor]] = []
    for _ in range(2):
        served, exact, dense = load(directory), load(directory, exact=True), load(directory, quantize="none")
        steppers = [Stepper(served.model), Stepper(exact.model, kernels="reference")]
        found.append([stepper.prefill(stepper.sequence("s", PROMPT), chunk=45) for stepper in steppers])
        found[-1].append(dense.model.get_submodule("model.layers.0.mlp.experts").gate_up_proj)
        assert dense.model.config.model_type == "qwen3_moe"
        turn_experts(directory)
    assert relative_difference(*found[0][:2]) < 0.01
    assert all(torch.equal(before, after) for before, after in zip(*found, strict=True))


@pytest.mark.parametrize("prefix", ["model.language_model.", "model."])
def test_an_adapter_of_its_attention_fits_by_every_name(prefix: str, tmp_path: Path) -> None:
    base = load(save_multimodal(tmp_path / "base", "qwen3_vl_moe"))
    adapter = write_adapter(tmp_path / "adapter", {f"{prefix}layers.1.self_attn.o_proj": (64, 64)}, rank=4, std_b=0.2)
    checked = check_adapter(adapter, base.info(), 8)
    assert list(checked.adapter.modules) == ["model.layers.1.self_attn.o_proj"]
    stepper, slot = Stepper(base.model, module_of=base.module_of), Slot(0, 8)
    plain = stepper.prefill(stepper.sequence("plain", PROMPT), chunk=45)
    stepper.load(slot, checked.adapter)
    assert not torch.equal(stepper.prefill(stepper.sequence("s", PROMPT, slot), chunk=45), plain)
