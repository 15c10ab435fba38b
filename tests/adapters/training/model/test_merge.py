"""Merging against the sum that it stands for, peft's own merge, and the base as it is served."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import AddedToken
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from loramux_adapters.artifact.generation_defaults import GenerationDefaults
from loramux_adapters.artifact.own_tokens import OwnToken, OwnTokens
from loramux_adapters.device.cpu import CpuDevice
from loramux_adapters.errors import CheckpointError, TrainingError
from loramux_adapters.lora.host_cache import HostAdapter
from loramux_adapters.lora.token_rows import OwnRows, TokenRows
from loramux_adapters.lora.weights import load_host_adapter
from loramux_adapters.training.model.merge import (
    add_generation_defaults,
    add_own_tokens,
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


VOCABULARY: dict[str, dict[str, Any]] = {
    "few tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [300, 3]},
    "saved both": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "LoRA on the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "LoRA on both": {"target_modules": ["embed_tokens", "lm_head"]},
}


def with_vocabulary(directory: Path, base: Path, settings: dict[str, Any], size: int) -> tuple[Any, Any]:
    """(the model that peft makes of base and a random adapter with so many tokens, in fp32; the 16-bit base)."""
    other = load(base).float()
    other.resize_token_embeddings(size, mean_resizing=False)
    torch.manual_seed(0)
    oracle: Any = get_peft_model(other, LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, **settings))
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():
            if "trainable_tokens_delta" in name or ".modules_to_save." in name:
                parameter[-40:] += 0.1 * torch.randn_like(parameter[-40:])
    oracle.save_pretrained(directory, save_embedding_layers=False)
    return oracle.merge_and_unload(), load(base)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks by an old name
@pytest.mark.parametrize(
    ("kind", "tied", "size", "apart"),
    [
        *((kind, False, 320, False) for kind in VOCABULARY),
        ("saved both", False, 325, False),
        ("few tokens", True, 320, False),
        ("saved head", True, 320, True),
        ("LoRA on the embedding", True, 320, True),
    ],
)
def test_rows_of_embedding_and_head_are_merged_as_peft_does(
    tmp_path: Path, kind: str, tied: bool, size: int, apart: bool
) -> None:
    directory = save_tiny_model(tmp_path / "base", tie_word_embeddings=tied)
    expected, model = with_vocabulary(tmp_path / "adapter", directory, VOCABULARY[kind], size)
    weights = ServedWeights(model, partial(weight_merged_onto, model=model, onto="16bit"))
    adapter = load_host_adapter(tmp_path / "adapter", None, weights)
    assert adapter.tokens is not None
    merged = merge_into(model, adapter, onto="16bit")
    write_checkpoint(model, tiny_tokenizer(), tmp_path / "out")

    assert merged.rows and merged.delta > 0 and merged.head_untied == apart
    again = load(tmp_path / "out")
    embedding, head = again.get_input_embeddings().weight, again.get_output_embeddings().weight
    assert len(embedding) == len(head) == again.config.vocab_size == size
    assert (embedding is head) == (tied and not apart)
    for name, theirs in weights_of(expected).items():
        if name == "lm_head.weight" and tied and kind == "LoRA on the embedding":
            theirs = load(directory).get_output_embeddings().weight.float()  # of which peft makes one matrix again
        ours = weights_of(again)[name].float()
        assert (ours - theirs).norm() <= 2**-8 * theirs.norm(), name


def test_an_embedding_with_more_tokens_than_the_head_cannot_be_merged(tmp_path: Path) -> None:
    model = load(save_tiny_model(tmp_path / "base", tie_word_embeddings=False))
    rows = OwnRows(np.array([320], np.int32), torch.ones(1, model.config.hidden_size, dtype=torch.bfloat16))
    own = TokenRows(rows, None, None, None, {"embedding": 321, "head": 320}, {"embedding": 320, "head": 320})
    with pytest.raises(TrainingError, match="embedding has 321 tokens and its output head 320"):
        merge_into(model, HostAdapter("", 8, 0, {}, tokens=own), onto="16bit")


def test_tokens_of_its_own_are_the_checkpoints(tmp_path: Path) -> None:
    model, tokenizer = load(save_tiny_model(tmp_path / "base")), tiny_tokenizer()
    first, ends = len(tokenizer), tokenizer.eos_token_id
    own = OwnTokens(
        (OwnToken(first, "@@call"), OwnToken(first + 1, "<|done|>", special=True)), (("eos_token", "<|done|>"),)
    )
    add_own_tokens(own, model, tokenizer)
    write_checkpoint(model, tokenizer, tmp_path / "out")
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again("x@@call<|done|>", add_special_tokens=False).input_ids[-2:] == [first, first + 1]
    assert again.eos_token == "<|done|>" and "<|done|>" in again.all_special_tokens
    said = load(tmp_path / "out").generation_config.eos_token_id
    assert first + 1 in said and (ends is None or ends in said)

    other = tiny_tokenizer()
    other.add_tokens([AddedToken("<taken>")])
    with pytest.raises(TrainingError, match="gave '@@call' another id"):
        add_own_tokens(own, model, other)
