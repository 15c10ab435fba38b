"""Adapters of many configs, made by peft, in one batch of the engine against peft's forward on the same NF4 base."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from loramux_adapters.lora.ops import LoraRows
from loramux_adapters.lora.slots import ScaledSlot, Slot, bucket_of
from loramux_adapters.lora.verify import check_adapter
from loramux_server.base.loader import BaseModel, load_base_model
from loramux_server.kernels.choice import available_kernels, choose_kernels
from support.stepping import CPU, Stepper
from support.tiny_models import save_tiny_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer:UserWarning"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'.* LoRA tensor.* have invalid shape:UserWarning"),
    pytest.mark.filterwarnings("ignore:The following .* keys did not match:RuntimeWarning"),
]
PROMPT = list(range(20, 43))
MEAN, MOST = 0.02, 0.3  # of the mean change of a log probability: A and B are bf16, rows whole numbers of 16 bits
PATTERNS: dict[str, Any] = {
    "rank_pattern": {"layers.0.self_attn.v_proj": 5, "o_proj": 3},
    "alpha_pattern": {"layers.0.self_attn.q_proj": 4, "layers.1.*": 20},
}


def configs(architecture: str) -> list[dict[str, Any]]:
    """Settings of LoraConfig, without what all have."""
    found: list[dict[str, Any]] = []
    all_linear, attention = "all-linear", ["q_proj", "k_proj", "v_proj"]
    if architecture == "llama":
        targets: list[Any] = [all_linear, attention, ["o_proj", "down_proj", "lm_head"]]
        for use_dora, use_rslora, patterns, target in product((True, False), (True, False), ({}, PATTERNS), targets):
            found.append({"use_dora": use_dora, "use_rslora": use_rslora, "target_modules": target, **patterns})
    elif architecture == "qwen2":
        for use_dora, bias, patterns in product((True, False), ("none", "all", "lora_only"), ({}, PATTERNS)):
            found.append({"use_dora": use_dora, "bias": bias, "target_modules": ["q_proj", "up_proj"], **patterns})
        for use_rslora, target in product((True, False), (all_linear, attention)):
            found.append({"lora_bias": True, "use_rslora": use_rslora, "target_modules": target, "bias": "all"})
    else:
        for use_dora, bias in product((True, False), ("none", "all", "lora_only")):
            found.append({"use_dora": use_dora, "bias": bias, "target_modules": all_linear})
    return [{"r": 4 + 3 * (index % 5), "lora_alpha": 8 + index, **each} for index, each in enumerate(found)]


@dataclass(frozen=True)
class Oracle:
    """The base in fp32, every number of its weights as it is served."""

    model: Any

    def write(self, directory: Path, settings: dict[str, Any], seed: int) -> torch.Tensor:
        """A random adapter of these settings, as peft writes it, and the logits [tokens, vocabulary] that it gives."""
        torch.manual_seed(seed)
        untouched = {name: value.clone() for name, value in self.model.named_parameters() if name.endswith("bias")}
        model = get_peft_model(
            self.model, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings)
        ).eval()
        linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
        with torch.no_grad():
            for module in linears:
                if module.bias is not None and module.bias.requires_grad:
                    module.bias += 0.3 * torch.randn_like(module.bias)
            for name, parameter in model.named_parameters():
                if "lora_magnitude_vector" in name:
                    parameter *= 1 + 0.2 * torch.randn_like(parameter)
            logits: torch.Tensor = model(torch.tensor([PROMPT])).logits[0]
        model.save_pretrained(directory, save_embedding_layers=False)
        model.unload()
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if name in untouched:
                    parameter.copy_(untouched[name])
        return logits


def load(directory: Path, cache: Path, *, exact: bool = False) -> BaseModel:
    return load_base_model(str(directory), device=CPU, cache_dir=cache, report=lambda line: None, exact=exact)


@pytest.fixture(autouse=True)
def untrained_gradients() -> Iterator[None]:
    """peft wants gradients for what it makes."""
    with torch.enable_grad():
        yield


@pytest.mark.parametrize("kernels", [None, "tensor"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "starcoder2"])
def test_adapters_of_many_configs_agree_with_peft_in_one_batch(
    architecture: str, kernels: str | None, tmp_path: Path
) -> None:
    directory = save_tiny_model(tmp_path / "base", architecture, tie_word_embeddings=False)
    oracle = Oracle(load(directory, tmp_path / "cache", exact=True).model)
    expected = [oracle.model(torch.tensor([PROMPT])).logits[0].detach()]
    settings = configs(architecture)
    for index, each in enumerate(settings):
        expected.append(oracle.write(tmp_path / str(index), each, index))

    base = load(directory, tmp_path / "cache")
    stepper = Stepper(base.model, rows=1024, kernels=kernels)
    info, slots, offset = base.info(), [], 0
    for index in range(len(settings)):
        checked = check_adapter(tmp_path / str(index), info, 64)
        rank = bucket_of(checked.rank)
        offset = -(-offset // rank) * rank
        slots.append(Slot(offset, rank))
        stepper.load(slots[-1], checked.adapter)
        assert bool(checked.adapter.affine) == needs_affine(settings[index]), settings[index]
        offset += rank
    with torch.inference_mode():
        sequences = [stepper.sequence(str(index), PROMPT, slot) for index, slot in enumerate([None, *slots])]
        ours = torch.stack([stepper.logits([(each, 1) for each in sequences]) for _ in PROMPT], 1)
        for index in (0, 1, len(slots) // 2, len(slots)):
            again = stepper.sequence("alone", PROMPT, [None, *slots][index])
            assert torch.equal(stepper.prefill(again, 7), ours[index, -1]), index
    for index, theirs in enumerate(expected):
        difference = (ours[index].float().log_softmax(-1) - theirs.log_softmax(-1)).abs()
        what = "base" if index == 0 else settings[index - 1]
        if index == 0:
            assert difference.max() <= 0.02
            continue
        change = (theirs.log_softmax(-1) - expected[0].log_softmax(-1)).abs().mean()
        assert change > 0.02, what
        assert difference.mean() <= MEAN * change and difference.max() <= MOST * change, what


def needs_affine(settings: dict[str, Any]) -> bool:
    return bool(settings.get("use_dora") or settings.get("lora_bias") or settings.get("bias", "none") != "none")


@pytest.mark.parametrize("second_dora", [True, False])
def test_a_sum_of_adapters_counts_what_each_changes_of_the_base(tmp_path: Path, second_dora: bool) -> None:
    """peft hands each adapter the sum so far, so its own sums of DoRA depend on their order; ours do not."""
    directory = save_tiny_model(tmp_path / "base", "qwen2")
    oracle = Oracle(load(directory, tmp_path / "cache", exact=True).model)
    kinds: list[dict[str, Any]] = [
        {"r": 8, "use_dora": True, "target_modules": ["v_proj"], "layers_to_transform": [1]},
        {"r": 4, "use_dora": second_dora, "target_modules": ["v_proj"], "layers_to_transform": [1]},
    ]
    for index, each in enumerate(kinds):
        oracle.write(tmp_path / str(index), each, index)
    base = load(directory, tmp_path / "cache")
    stepper = Stepper(base.model)
    slots = [Slot(0, 8), Slot(8, 8)]
    for index, slot in enumerate(slots):
        stepper.load(slot, check_adapter(tmp_path / str(index), base.info(), 64).adapter)
    layer = stepper.slots.layers["model.layers.1.self_attn.v_proj"]
    x = torch.randn(3, layer.base_layer.in_features)

    def changed(*entries: ScaledSlot) -> torch.Tensor:
        rows = LoraRows.build([(entries, 3)])
        with torch.inference_mode():
            layer.set_lora(rows)
            found: torch.Tensor = layer(x) - layer.base_layer(x)
            layer.set_lora(None)
        return found

    one, other = changed(ScaledSlot(slots[0], 0.7)), changed(ScaledSlot(slots[1], -0.5))
    both = changed(ScaledSlot(slots[0], 0.7), ScaledSlot(slots[1], -0.5))
    assert one.abs().max() > 0.01 and other.abs().max() > 0.01
    assert torch.allclose(both, one + other, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_a_mixed_batch_has_the_same_bits_alone_and_on_every_instruction_set(architecture: str, tmp_path: Path) -> None:
    """With the base, plain adapters, DoRA, biases and sums of them in it; by a whole step and module by module."""
    directory = save_tiny_model(tmp_path / "base", architecture)
    oracle = Oracle(load(directory, tmp_path / "cache", exact=True).model)
    names = (0, 3, 13, 18) if architecture == "llama" else (0, 2, 7, 12, 15)
    for index in names:
        oracle.write(tmp_path / str(index), configs(architecture)[index], index)
    found = []
    for kernels in available_kernels(CPU):
        if not kernels.startswith(("native", "modules")):
            continue
        base = load_base_model(
            str(directory),
            device=CPU,
            cache_dir=tmp_path / "cache",
            report=lambda line: None,
            kernels=choose_kernels(CPU, kernels),
        )
        stepper = Stepper(base.model, kernels=kernels)
        assert (stepper.runner.decoder is None) == kernels.startswith("modules")
        info, slots = base.info(), [Slot(32 * place, 32) for place in range(len(names))]
        for index, slot in zip(names, slots, strict=True):
            stepper.load(slot, check_adapter(tmp_path / str(index), info, 64).adapter)
        scaled = [ScaledSlot(slot, factor) for slot, factor in zip(slots, (0.7, -0.4, 1.0, 1.5, 0.2), strict=False)]
        uses: list[Any] = [None, *slots, tuple(scaled), tuple(scaled[1:]), tuple(reversed(scaled))]
        sequences = [stepper.sequence(str(place), PROMPT[place % 5 :], use) for place, use in enumerate(uses)]
        with torch.inference_mode():
            stepper.logits([(sequence, len(sequence.prompt) - 1) for sequence in sequences])
            found.append(stepper.logits([(sequence, 1) for sequence in sequences]))
            for place, use in enumerate(uses):
                again = stepper.sequence("alone", PROMPT[place % 5 :], use)
                assert torch.equal(stepper.prefill(again, 5), found[-1][place]), (kernels, place)
    assert len(found) > 2 and all(torch.equal(found[0], other) for other in found[1:])
