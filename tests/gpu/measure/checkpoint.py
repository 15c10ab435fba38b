"""Writes what the next part serves: a checkpoint with random weights, made on the device, and adapters."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import BitsAndBytesConfig, PreTrainedTokenizerFast

from loramux_adapters.device.device import Device
from measure.part import Part
from measure.shapes import Shape, in_nf4, weights_of
from support.tiny_models import CHAT_TEMPLATE

ADAPTERS = 16
STRENGTH = 0.02  # standard deviation of adapters' numbers: replies differ from the base's
_PATHS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def main() -> int:
    part = Part(__doc__)
    scratch: Path = part.args.scratch
    with part.device.used(), torch.inference_mode():
        written = write_base(scratch / "base", part.shape, part.device)
        part.say(f"a checkpoint of {written / 1e9:.1f} GB")
        for number in range(2 if part.dry else ADAPTERS):
            write_adapter(scratch / "adapters" / f"a{number:02d}", part.shape, part.device, number)
    part.write(bytes=written)
    return 0


def write_base(directory: Path, shape: Shape, device: Device) -> int:
    """A checkpoint in NF4 as bitsandbytes quantizes and transformers saves it, with a tokenizer; its bytes.

    A third of one in 16 bits: less time for the disk, and no time for quantizing.
    """
    directory.mkdir(parents=True)
    config = shape.config()
    config.architectures, config.dtype = ["LlamaForCausalLM"], "bfloat16"
    nf4: Any = BitsAndBytesConfig
    config.quantization_config = nf4(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    ).to_dict()
    config.save_pretrained(directory)
    tokenizer_of(shape.vocabulary).save_pretrained(directory)
    places: dict[str, str] = {}
    held: dict[str, torch.Tensor] = {}
    total = 0

    def write() -> None:
        name = f"model-{len(set(places.values())) + 1:05d}.safetensors"
        save_file(held, directory / name, metadata={"format": "pt"})
        places.update(dict.fromkeys(held, name))
        held.clear()

    for name, weight in weights_of(shape, device):
        if held and _layer(name) != _layer(next(iter(held))):
            write()  # a layer is a file
        parts = {name: weight}
        if weight.dim() == 2 and _layer(name):  # the embedding and the head stay as they are
            parts = {f"{name[: -len('weight')]}{part}": tensor for part, tensor in in_nf4(weight).state_dict().items()}
        for part, tensor in parts.items():
            held[part] = device.take(tensor).clone()
            total += held[part].numel() * held[part].element_size()
    write()
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return total


def _layer(name: str) -> str:
    """Its number; "" for what lies beside the layers."""
    return name.partition(".layers.")[2].partition(".")[0]


def tokenizer_of(vocabulary: int) -> PreTrainedTokenizerFast:
    """One id for each byte, <s> 256, </s> 257, and a word of its own for every other id that a model may choose."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, "<s>", "</s>", *(f"Ġ{number}" for number in range(len(alphabet) + 2, vocabulary))]
    backend = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def write_adapter(directory: Path, shape: Shape, device: Device, seed: int) -> None:
    """A random adapter of `shape.rank` on all layers but the head, as peft writes one, in bf16."""
    on_host = "cpu" if device.place.type == "cpu" else device.place
    random = torch.Generator(on_host).manual_seed(100 + seed)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(shape.layers):
        for path, (inputs, outputs) in zip(_PATHS, shape.linears, strict=True):
            block = "self_attn" if path[0] in "qkvo" else "mlp"
            for part, size in (("A", (shape.rank, inputs)), ("B", (outputs, shape.rank))):
                numbers = torch.empty(size, dtype=torch.bfloat16, device=device.place)
                numbers = device.put(numbers.normal_(0.0, STRENGTH, generator=random))
                name = f"base_model.model.model.layers.{layer}.{block}.{path}.lora_{part}.weight"
                tensors[name] = device.take(numbers).clone()
    directory.mkdir(parents=True)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": shape.rank,
        "lora_alpha": shape.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(_PATHS),
    }
    (directory / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
