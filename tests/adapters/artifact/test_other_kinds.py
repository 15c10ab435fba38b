"""Kinds of adapters that peft makes beside LoRA: converted, they compute what peft's own forward computes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from loramux_adapters.artifact.format import CONFIG_FILE, WEIGHTS_FILE
from loramux_adapters.artifact.other_kinds import convert_kind
from loramux_adapters.base_info import BaseInfo
from loramux_adapters.errors import AdapterRejected
from loramux_adapters.lora.host_cache import HostAdapter
from loramux_adapters.lora.verify import check_adapter
from loramux_server.kernels.layers.served_weights import ServedWeights
from support.adapter_files import write_adapter
from support.tiny_models import tiny_config

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
TOKENS = torch.tensor([[7, 3, 9, 40, 41, 6]])


def model_of(architecture: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(architecture), dtype=torch.float32).eval()


def base_of(model: nn.Module) -> BaseInfo:
    linears = {p: (m.in_features, m.out_features) for p, m in model.named_modules() if isinstance(m, nn.Linear)}
    return BaseInfo("aa" * 32, linears, weights=ServedWeights(model))


def randomized(model: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("lora_E", "lora_A", "lora_B", "vera_lambda", "ia3_l")):
                noise = torch.randn(parameter.shape, generator=generator) * 0.3
                parameter.copy_(1 + noise if "ia3" in name else noise)
    return model.eval()


@torch.no_grad()
def use(model: Any, adapter: HostAdapter) -> None:
    """Puts what is served into the model's own weights."""
    for path, layer in model.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        delta = torch.zeros_like(layer.weight)
        if path in adapter.modules:
            a, bt = adapter.modules[path]
            delta += bt.float().t() @ a.float()
        if path in adapter.affine:
            gain, shift = adapter.affine[path]
            delta += gain[:, None] * layer.weight
            assert layer.bias is not None or not shift.any()
            if layer.bias is not None:
                layer.bias += gain * layer.bias + shift
        layer.weight += delta


TARGETS = ["q_proj", "v_proj", "down_proj"]
KINDS: dict[str, Callable[[], Any]] = {
    "adalora": lambda: AdaLoraConfig(
        task_type="CAUSAL_LM", init_r=6, target_r=4, lora_alpha=12, total_step=10, target_modules=TARGETS
    ),
    "vera": lambda: VeraConfig(task_type="CAUSAL_LM", r=24, target_modules=["q_proj", "o_proj"]),
    "ia3": lambda: IA3Config(task_type="CAUSAL_LM", target_modules=TARGETS, feedforward_modules=["down_proj"]),
}


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_converted_computes_what_peft_computes(tmp_path: Path, kind: str, architecture: str) -> None:
    tuned = randomized(get_peft_model(model_of(architecture), KINDS[kind]()))
    with torch.no_grad():
        expected = tuned(TOKENS).logits
    tuned.save_pretrained(tmp_path)
    ours = model_of(architecture)
    base = base_of(ours)
    convert_kind(tmp_path, base.linears, 64)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    convert_kind(tmp_path, base.linears, 64)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    checked = check_adapter(tmp_path, base, 64)
    assert any("converted from" in note and kind in note.lower() for note in checked.notes)
    assert checked.rank == {"adalora": 6, "vera": 24, "ia3": 1}[kind]
    with torch.no_grad():
        bare = ours(TOKENS).logits
        use(ours, checked.adapter)
        got = ours(TOKENS).logits
    change = (expected - bare).abs().mean()
    assert change > 1e-3
    assert (got - expected).abs().mean() < 0.01 * change


def test_modules_of_several_ranks_are_filled_up(tmp_path: Path) -> None:
    tuned = randomized(get_peft_model(model_of("llama"), KINDS["adalora"]()))
    tuned.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    first, second = "base_model.model.model.layers.0.self_attn.q_proj", "base_model.model.model.layers.1.mlp.down_proj"
    for module, rank in ((first, 2), (second, 0)):
        tensors[f"{module}.lora_A"] = tensors[f"{module}.lora_A"][:rank].contiguous()
        tensors[f"{module}.lora_E"] = tensors[f"{module}.lora_E"][:rank].contiguous()
        tensors[f"{module}.lora_B"] = tensors[f"{module}.lora_B"][:, :rank].contiguous()
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    ours = model_of("llama")
    convert_kind(tmp_path, base_of(ours).linears, 64)
    adapter = check_adapter(tmp_path, base_of(ours), 64).adapter
    a, bt = adapter.modules[first.removeprefix("base_model.model.")]
    expected = tensors[f"{first}.lora_B"] @ (tensors[f"{first}.lora_A"] * tensors[f"{first}.lora_E"]) * 12 / 2
    assert a.shape[0] == 6 and torch.allclose(bt.float().t() @ a.float(), expected, atol=2e-2)
    assert second.removeprefix("base_model.model.") not in adapter.modules


def reasons_for(directory: Path, base: BaseInfo, max_rank: int = 64) -> list[str]:
    with pytest.raises(AdapterRejected) as caught:
        convert_kind(directory, base.linears, max_rank)
    return caught.value.reasons


def test_vera_without_its_projections_is_refused_with_what_to_do(tmp_path: Path) -> None:
    model = model_of("llama")
    base = base_of(model)
    with pytest.warns(UserWarning, match="save_projection"):
        config = VeraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "o_proj"], save_projection=False)
    tuned = get_peft_model(model, config)
    tuned.save_pretrained(tmp_path)
    assert "save_projection=True" in reasons_for(tmp_path, base)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other", ["a module", "a tensor", "a shape", "a bias", "a name of two"])
def test_what_does_not_fit_is_refused(tmp_path: Path, kind: str, other: str) -> None:
    model = model_of("llama")
    base = base_of(model)
    get_peft_model(model, KINDS[kind]()).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    name = next(name for name in tensors if ".q_proj." in name)
    wanted = "q_proj"
    if other == "a module":
        tensors = {each.replace("layers.0", "layers.7"): tensor for each, tensor in tensors.items()}
        wanted = "is no linear layer of the base"
    elif other == "a tensor":
        tensors["base_model.model.model.norm.weight"] = torch.ones(4)
        wanted = "model.norm"
    elif other == "a shape":
        tensors[name] = tensors[name][:-1].contiguous()
        wanted = "of shape" if kind != "adalora" else "lora_"
    elif other == "a name of two":
        tensors[name.removeprefix("base_model.model.").removesuffix(".weight")] = tensors[name].clone()
        wanted = "twice"
    else:
        config = json.loads((tmp_path / CONFIG_FILE).read_text())
        (tmp_path / CONFIG_FILE).write_text(json.dumps(config | {"bias": "all"}))
        wanted = "bias"
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    assert wanted in reasons_for(tmp_path, base)[0]


def test_a_rank_above_the_limit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = model_of("llama")
    base = base_of(model)
    get_peft_model(model, KINDS["vera"]()).save_pretrained(tmp_path)
    assert "takes at most 8" in reasons_for(tmp_path, base, 8)[0]
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["peft_type"] == "VERA"


def test_ia3_in_front_of_anything_but_a_gated_mlp_is_refused(tmp_path: Path) -> None:
    model = model_of("llama")
    base = base_of(model)
    config = IA3Config(task_type="CAUSAL_LM", target_modules=["o_proj"], feedforward_modules=["o_proj"])
    get_peft_model(model, config).save_pretrained(tmp_path)
    assert "down_proj of a gated MLP" in reasons_for(tmp_path, base)[0]


@pytest.mark.parametrize("kind", ["LORA", "lora", None, ["VERA"], {}, 1, "PROMPT_TUNING"])
def test_what_is_none_of_them_is_left_as_it_is(tmp_path: Path, kind: object) -> None:
    linears = {"model.layers.0.self_attn.q_proj": (64, 64)}
    write_adapter(tmp_path, linears, extra_config={"peft_type": kind})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    convert_kind(tmp_path, linears, 8)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
