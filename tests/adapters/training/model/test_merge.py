"""Merging against the sum that it stands for, peft's own merge, and the base as it is served."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from loramux_adapters.artifact.generation_defaults import GenerationDefaults
from loramux_adapters.device.cpu import CpuDevice
from loramux_adapters.errors import CheckpointError, TrainingError
from loramux_adapters.lora.host_cache import HostAdapter
from loramux_adapters.lora.weights import load_host_adapter
from loramux_adapters.training.model.merge import (
    add_generation_defaults,
    merge_into,
    through_nf4,
    weight_merged_onto,
    write_checkpoint,
)
from loramux_adapters.training.model.whole_directory import whole_directory
from loramux_server.base.loader import load_base_model
from loramux_server.kernels.layers.nf4_linear import NF4Linear
from loramux_server.kernels.layers.served_weights import ServedWeights
from support.adapter_files import write_adapter
from support.tiny_models import save_tiny_model, tiny_tokenizer

CPU = CpuDevice()


def load(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)


def linears_of(model: Any) -> dict[str, tuple[int, int]]:
    return {p: (m.in_features, m.out_features) for p, m in model.named_modules() if isinstance(m, nn.Linear)}


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters(remove_duplicate=False)}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks by an old name
def test_onto_16_bit_is_the_merge_that_peft_makes(tmp_path: Path) -> None:
    directory = save_tiny_model(tmp_path / "base")
    model = load(directory)
    adapter = write_adapter(tmp_path / "adapter", linears_of(model), targets=["q_proj", "down_proj"], std_b=0.2)
    oracle: Any = PeftModel.from_pretrained(load(directory).float(), str(adapter))
    expected = weights_of(oracle.merge_and_unload())
    before = weights_of(model)

    merged = merge_into(model, load_host_adapter(adapter), onto="16bit")

    after = weights_of(model)
    assert merged.layers == 4 and merged.rounded == 0 and not merged.head_untied
    for name, weight in after.items():
        assert weight.dtype == torch.bfloat16
        # the adapter is served in bf16, so it is merged as bf16: a part in 256 of the change, and one of the sum
        assert torch.allclose(weight.float(), expected[name], rtol=2**-7, atol=2**-7), name
        assert torch.equal(weight, before[name]) != name.endswith(("q_proj.weight", "down_proj.weight")), name


def test_onto_nf4_starts_from_the_bits_that_the_server_holds(tmp_path: Path) -> None:
    directory = save_tiny_model(tmp_path / "base")
    model = load(directory)
    adapter = write_adapter(tmp_path / "adapter", linears_of(model), targets=["q_proj"], std_b=0.0)

    merged = merge_into(model, load_host_adapter(adapter), onto="nf4")

    served = load_base_model(str(directory), device=CPU, cache_dir=tmp_path, report=lambda line: None, training=True)
    after = weights_of(model)
    quantized = {p: m for p, m in served.model.named_modules() if isinstance(m, (Linear4bit, NF4Linear))}
    assert merged.rounded == len(quantized) == 14 and merged.delta == 0
    for path, module in quantized.items():
        if isinstance(module, NF4Linear):
            expected = module.dequantized().bfloat16()
        else:  # without compiled kernels
            expected = bnb.dequantize_4bit(module.weight.data, module.weight.quant_state)
        assert torch.equal(after[f"{path}.weight"], expected), path
    for name, tensor in served.floats.items():
        assert torch.equal(after[name], tensor), name


def test_a_changed_head_is_parted_from_the_embeddings_it_was_tied_to(tmp_path: Path) -> None:
    directory = save_tiny_model(tmp_path / "base", tie_word_embeddings=True)
    model = load(directory)
    embeddings = model.get_input_embeddings().weight.detach().clone()
    adapter = write_adapter(tmp_path / "adapter", linears_of(model), targets=["lm_head"], std_b=0.2)

    merged = merge_into(model, load_host_adapter(adapter), onto="nf4")
    write_checkpoint(model, tiny_tokenizer(), tmp_path / "out")

    assert merged.head_untied
    again = load(tmp_path / "out")
    assert torch.equal(again.get_input_embeddings().weight, embeddings)
    assert torch.equal(again.get_output_embeddings().weight, model.get_output_embeddings().weight)
    assert not torch.equal(again.get_output_embeddings().weight, embeddings)


def test_an_unchanged_head_stays_tied(tmp_path: Path) -> None:
    model = load(save_tiny_model(tmp_path / "base", tie_word_embeddings=True))
    adapter = write_adapter(tmp_path / "adapter", linears_of(model), targets=["q_proj"])

    assert not merge_into(model, load_host_adapter(adapter), onto="16bit").head_untied
    write_checkpoint(model, tiny_tokenizer(), tmp_path / "out")

    again = load(tmp_path / "out")
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight


@pytest.mark.parametrize(("temperature", "samples"), [(0.5, True), (0.0, False)])
def test_a_checkpoint_says_of_generation_what_its_adapter_said(
    tmp_path: Path, temperature: float, samples: bool
) -> None:
    model = load(save_tiny_model(tmp_path / "base"))
    write_checkpoint(model, tiny_tokenizer(), tmp_path / "out")
    said = GenerationDefaults(temperature=temperature, top_k=7, stop=("END",), max_tokens=9)
    add_generation_defaults(said, tmp_path / "out")
    config = load(tmp_path / "out").generation_config
    assert (config.do_sample, config.top_k, config.stop_strings, config.max_new_tokens) == (samples, 7, ["END"], 9)
    assert config.temperature == (temperature or None)
    assert config.eos_token_id == model.generation_config.eos_token_id


def test_what_was_written_is_what_transformers_and_the_server_load(tmp_path: Path) -> None:
    model = load(save_tiny_model(tmp_path / "base"))
    adapter = write_adapter(tmp_path / "adapter", linears_of(model), std_b=0.2)
    merge_into(model, load_host_adapter(adapter), onto="nf4")
    write_checkpoint(model, tiny_tokenizer(), tmp_path / "out")

    again, served = (
        load(tmp_path / "out"),
        load_base_model(
            str(tmp_path / "out"),
            device=CPU,
            cache_dir=tmp_path,
            report=lambda line: None,
            quantize="none",
        ).model,
    )

    ids = torch.arange(20)[None]
    with torch.inference_mode():
        expected = model(ids).logits
        assert torch.equal(again(ids).logits, expected)
        exact = again.float()(ids).logits  # served in fp32, with a head of whole numbers
        assert (served(ids).logits - exact).abs().max() < 2e-3 * exact.std()


def test_a_quantized_model_is_not_merged_into(tmp_path: Path) -> None:
    directory = save_tiny_model(tmp_path / "base")
    base = load_base_model(str(directory), device=CPU, cache_dir=tmp_path, report=lambda line: None, training=True)
    adapter = write_adapter(tmp_path / "adapter", base.linears)

    with pytest.raises(TrainingError, match="bfloat16"):
        merge_into(base.model, load_host_adapter(adapter), onto="16bit")


def test_a_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with pytest.raises(RuntimeError), whole_directory(out) as partial:
        (partial / "half").write_text("half")
        raise RuntimeError
    assert list(out.parent.iterdir()) == []

    out.mkdir()
    with whole_directory(out) as partial:
        (partial / "file").write_text("whole")
        assert list(out.iterdir()) == []
    assert [path.name for path in out.parent.iterdir()] == ["out"] and (out / "file").read_text() == "whole"


def test_what_is_there_is_never_written_over(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")

    with pytest.raises(CheckpointError, match="not empty"), whole_directory(tmp_path):
        pass
    with pytest.raises(CheckpointError, match="not empty"), whole_directory(tmp_path / "precious"):
        pass
    with pytest.raises(CheckpointError, match="cannot be written"), whole_directory(tmp_path / "precious" / "below"):
        pass
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks by an old name
@pytest.mark.parametrize("onto", ["16bit", "nf4"])
def test_dora_and_trained_biases_are_merged_as_peft_does(tmp_path: Path, onto: str) -> None:
    directory = save_tiny_model(tmp_path / "base", "qwen2", tie_word_embeddings=False)
    model, other = load(directory), load(directory).float()
    if onto == "nf4":
        for path, module in other.named_modules():
            if isinstance(module, nn.Linear) and path != "lm_head":
                module.weight.data = through_nf4(module.weight.data.bfloat16()).float()
    config = LoraConfig(
        task_type="CAUSAL_LM", r=8, use_dora=True, bias="all", target_modules=["q_proj", "down_proj"], lora_alpha=16
    )
    oracle: Any = get_peft_model(other, config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():
            if "lora_B" in name or name.endswith("bias"):
                parameter += 0.1 * torch.randn_like(parameter)
            if "magnitude" in name:
                parameter *= 1.3
    oracle.save_pretrained(tmp_path / "adapter")
    expected = weights_of(oracle.merge_and_unload())
    weights = ServedWeights(model, partial(weight_merged_onto, model=model, onto=onto))
    adapter = load_host_adapter(tmp_path / "adapter", None, weights)

    merge_into(model, adapter, onto=onto)

    for name, weight in weights_of(model).items():
        if name.endswith(("proj.weight", "proj.bias")):
            assert torch.allclose(weight.float(), expected[name], rtol=2**-6, atol=2**-8), name


def test_a_bias_where_the_base_has_none_cannot_be_merged(tmp_path: Path) -> None:
    model = load(save_tiny_model(tmp_path / "base"))
    path = "model.layers.0.self_attn.q_proj"
    outputs = model.get_submodule(path).out_features
    adapter = HostAdapter("", 8, 0, {}, {path: torch.ones(2, outputs)})
    with pytest.raises(TrainingError, match="adds a bias to layer model.layers.0.self_attn.q_proj"):
        merge_into(model, adapter, onto="16bit")
