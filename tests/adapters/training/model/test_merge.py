"""Merging against the sum that it stands for, peft's own merge, and the base as it is served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

from loramux_adapters.device.cpu import CpuDevice
from loramux_adapters.errors import CheckpointError, TrainingError
from loramux_adapters.lora.weights import load_host_adapter
from loramux_adapters.training.model.merge import merge_into, write_checkpoint
from loramux_adapters.training.model.whole_directory import whole_directory
from loramux_server.base.loader import load_base_model
from loramux_server.kernels.layers.nf4_linear import NF4Linear
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
