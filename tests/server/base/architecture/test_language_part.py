"""A text on a checkpoint that takes images too: its language part is an ordinary model, with adapters of the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from loramux_adapters.device.cpu import CpuDevice
from loramux_adapters.errors import AdapterRejected
from loramux_adapters.lora.slots import Slot
from loramux_adapters.lora.verify import check_adapter
from loramux_adapters.lora.weights import load_host_adapter
from loramux_server.base.support import unsupported_config
from loramux_server.errors import BaseModelError
from loramux_server.kernels.layers.nf4_linear import NF4Linear
from support.adapter_files import write_adapter
from support.stepping import Stepper, relative_difference
from support.tiny_models import tiny_config
from support.tiny_multimodal import (
    MULTIMODAL,
    as_one_config,
    load,
    multimodal_config,
    rename_tensors,
    save_multimodal,
    tensor_names,
    whole_logits,
)

CPU = CpuDevice()
PROMPT = torch.randint(0, 256, (45,), generator=torch.Generator().manual_seed(1)).tolist()
NOW, BEFORE = "model.language_model.", "language_model.model."
LAYER = "layers.1.mlp.down_proj"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", MULTIMODAL)
def test_a_text_gets_the_answers_of_the_whole_model_and_by_a_whole_step(kind: str, tied: bool, tmp_path: Path) -> None:
    directory = save_multimodal(tmp_path / "base", kind, tied=tied)
    base = load(directory)
    stepper = Stepper(base.model)
    sequence = stepper.sequence("s", PROMPT)
    steps = stepper.greedy(sequence, 4, chunk=13)
    replaced = sum(isinstance(module, NF4Linear) for module in base.model.modules())
    assert replaced == 7 * base.model.config.num_hidden_layers
    theirs = whole_logits(directory, base, PROMPT + sequence.output)
    for index, ours in enumerate(steps):
        assert relative_difference(ours, theirs[len(PROMPT) - 1 + index]) < 0.01
    assert (stepper.runner.why_by_modules == "") == (kind != "llama4"), "whose attention no whole step computes"


@pytest.mark.parametrize("kind", MULTIMODAL)
def test_nothing_of_the_other_parts_is_in_memory(kind: str, tmp_path: Path) -> None:
    base = load(save_multimodal(tmp_path / "base", kind))
    assert {path.split(".")[0] for path, _ in base.model.named_parameters()} == {"model", "lm_head"}
    assert not any("vis" in path or "project" in path for path, _ in base.model.named_modules())
    assert base.context_length == 512


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("gemma3", {BEFORE: NOW, "language_model.lm_head": "lm_head", "vision_tower": "model.vision_tower"}),
        ("qwen2_5_vl", {"model.": NOW, "visual": "model.visual"}),
        ("qwen3_vl", {NOW: "model."}),
        ("llava", {BEFORE: NOW, "language_model.lm_head": "lm_head"}),
        ("llama4", {BEFORE: "model.", "language_model.lm_head": "lm_head"}),
    ],
)
def test_the_names_of_other_versions_of_transformers_mean_the_same(
    kind: str, names: dict[str, str], tmp_path: Path
) -> None:
    directory = save_multimodal(tmp_path / "base", kind)
    base = load(directory)
    logits = Stepper(base.model)
    expected = logits.prefill(logits.sequence("s", PROMPT), chunk=45)
    before = tensor_names(directory)
    rename_tensors(directory, names)
    assert tensor_names(directory) != before
    renamed = load(directory)
    assert renamed.base_id != base.base_id
    stepper = Stepper(renamed.model)
    assert torch.equal(stepper.prefill(stepper.sequence("s", PROMPT), chunk=45), expected)


def test_a_config_that_names_no_language_part_of_its_own_is_read(tmp_path: Path) -> None:
    directory = save_multimodal(tmp_path / "base", "qwen2_vl")
    base = load(directory)
    as_one_config(directory)
    again = load(directory)
    assert again.model.config.rope_parameters["rope_theta"] == base.model.config.rope_parameters["rope_theta"] == 1e4
    sequences = [(stepper := Stepper(each.model), stepper.sequence("s", PROMPT)) for each in (base, again)]
    first, second = (stepper.prefill(sequence, chunk=45) for stepper, sequence in sequences)
    assert torch.equal(first, second)


def test_the_sections_of_positions_matter_to_the_whole_model_only_where_images_are(tmp_path: Path) -> None:
    """M-RoPE of a text is RoPE: with time, height and width apart the whole model gives something else."""
    directory = save_multimodal(tmp_path / "base", "qwen2_5_vl")
    factory: Any = AutoModelForImageTextToText
    whole = factory.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    tokens, places = torch.tensor([PROMPT]), torch.arange(len(PROMPT))
    apart = torch.stack([places, places // 2, places // 3])[:, None]
    with torch.inference_mode():
        text, together, image = (
            whole(input_ids=tokens, use_cache=False, position_ids=position).logits[0]
            for position in (None, places.expand(3, 1, -1), apart)
        )
    assert torch.equal(text, together)
    assert relative_difference(image, text) > 0.1


def adapter_on(directory: Path, path: str, extra: dict[str, torch.Tensor] | None = None) -> Path:
    """Weights for one down_proj under this name, and further tensors."""
    write_adapter(directory, {path: (128, 64)}, rank=4)
    if extra:
        file = directory / "adapter_model.safetensors"
        save_file(load_file(file) | extra, file, metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize(
    ("kind", "prefix"),
    [
        ("gemma3", "model.language_model."),
        ("gemma3", "language_model.model."),
        ("gemma3", "model."),
        ("qwen2_vl", "model.language_model."),
        ("qwen2_vl", "model."),
        ("smolvlm", "model.text_model."),
        ("llama4", "language_model.model."),
    ],
)
def test_an_adapter_fits_by_every_name_that_its_module_had(kind: str, prefix: str, tmp_path: Path) -> None:
    base = load(save_multimodal(tmp_path / "base", kind))
    layer = LAYER.replace("mlp", "feed_forward") if kind == "llama4" else LAYER
    directory = adapter_on(tmp_path / "adapter", prefix + layer)
    checked = check_adapter(directory, base.info(), 8)
    assert list(checked.adapter.modules) == [f"model.{layer}"]
    assert checked.layers == (1, base.model.config.num_hidden_layers)
    stepper = Stepper(base.model, module_of=base.module_of)
    slot = Slot(0, 8)
    plain = stepper.prefill(stepper.sequence("plain", PROMPT), chunk=45)
    logits = []
    for number, adapter in enumerate((checked.adapter, load_host_adapter(directory))):
        stepper.load(slot, adapter)
        logits.append(stepper.prefill(stepper.sequence(f"s{number}", PROMPT, slot), chunk=45))
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], plain)


VISION = "base_model.model.model.vision_tower.encoder.layers.0.mlp.fc1"


def vision_pair(fill: float) -> dict[str, torch.Tensor]:
    return {f"{VISION}.lora_A.weight": torch.ones(4, 32), f"{VISION}.lora_B.weight": torch.full((64, 4), fill)}


def test_weights_of_the_vision_part_are_refused_by_name_and_left_out_where_they_are_zero(tmp_path: Path) -> None:
    base = load(save_multimodal(tmp_path / "base", "gemma3"))
    trained = adapter_on(tmp_path / "trained", NOW + LAYER, vision_pair(0.1))
    with pytest.raises(AdapterRejected, match=r"vision_tower.encoder.layers.0.mlp.fc1.*takes images or sound"):
        check_adapter(trained, base.info(), 8)
    untrained = adapter_on(tmp_path / "untrained", NOW + LAYER, vision_pair(0.0))
    checked = check_adapter(untrained, base.info(), 8)
    assert list(checked.adapter.modules) == [f"model.{LAYER}"]
    assert any("1 modules" in note and "takes images or sound" in note for note in checked.notes)
    stepper = Stepper(base.model, module_of=base.module_of)
    stepper.load(Slot(0, 8), load_host_adapter(untrained))


def test_one_module_under_two_names_is_refused(tmp_path: Path) -> None:
    base = load(save_multimodal(tmp_path / "base", "gemma3"))
    twice = f"base_model.model.{BEFORE}{LAYER}"
    pair = {f"{twice}.lora_A.weight": torch.ones(4, 128), f"{twice}.lora_B.weight": torch.ones(64, 4)}
    directory = adapter_on(tmp_path / "adapter", NOW + LAYER, pair)
    with pytest.raises(AdapterRejected, match="are the same"):
        check_adapter(directory, base.info(), 8)


def test_it_can_be_computed_with_as_it_is_compared_with(tmp_path: Path) -> None:
    directory = save_multimodal(tmp_path / "base", "gemma3")
    served, exact, dense = load(directory), load(directory, exact=True), load(directory, quantize="none")
    steppers = [Stepper(served.model), Stepper(exact.model, kernels="reference")]
    first, second = (stepper.prefill(stepper.sequence("s", PROMPT), chunk=45) for stepper in steppers)
    assert relative_difference(first, second) < 0.01
    assert dense.model.get_submodule(f"model.{LAYER}").weight.shape == (64, 128)


@pytest.mark.parametrize("kind", ["paligemma", "gemma3n", "mllama"])
def test_one_whose_language_part_does_more_is_refused_by_name(kind: str) -> None:
    assert any(kind in reason and "images or sound" in reason for reason in unsupported_config(tiny_config(kind)))


def test_what_its_language_part_cannot_be_served_with_is_named(tmp_path: Path) -> None:
    config = multimodal_config("llava", model_type="cohere2_moe", num_experts=4)
    assert any("cohere2_moe" not in reason and "num_experts" in reason for reason in unsupported_config(config))
    raw = type("Raw", (), config.to_dict())
    assert any("num_experts" in reason for reason in unsupported_config(raw))


def test_a_checkpoint_without_the_language_part_is_refused(tmp_path: Path) -> None:
    directory = save_multimodal(tmp_path / "base", "llava")
    rename_tensors(directory, {"language_model.model.layers.1.": "elsewhere."})
    with pytest.raises(BaseModelError, match=r"holds no model.layers.1"):
        load(directory)
