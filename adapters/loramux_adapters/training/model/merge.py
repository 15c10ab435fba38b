"""A base and one adapter as one ordinary checkpoint, for places that know no adapters."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loramux_adapters import nf4
from loramux_adapters.artifact.generation_defaults import GENERATION_FILE, GenerationDefaults
from loramux_adapters.device.device import in_host_memory
from loramux_adapters.errors import TrainingError
from loramux_adapters.lora.host_cache import HostAdapter
from loramux_adapters.lora.lora_linear import output_head
from loramux_adapters.training.model.whole_directory import cannot_write

ONTO = ("nf4", "16bit")


@dataclass(frozen=True, slots=True)
class Merged:
    """What a merge did.

    Attributes:
        layers: linear layers that the adapter changed.
        rounded: linear layers whose own weights were put through NF4 and back first.
        head_untied: the output head was the embeddings' own matrix, the adapter changes it, and now it has its own.
        delta: relative size of the change: the Frobenius norm of all deltas over that of the weights they go onto.
    """

    layers: int
    rounded: int
    head_untied: bool
    delta: float


def merge_into(
    model: Any, adapter: HostAdapter, *, onto: str, progress: Callable[[int, int], None] = lambda done, total: None
) -> Merged:
    """Adds an adapter to a 16-bit model in place: W + scale * B A, summed in fp32 and rounded once. Gain and shift of
    what a layer gives go into its weight and bias.

    Args:
        model: transformers' causal language model with its 16-bit weights; nothing is quantized.
        adapter: as the check against this base gave it.
        onto: "nf4" takes for W what NF4 makes of the weights, which is what a QLoRA adapter was trained on;
            "16bit" takes the weights as they are.
        progress: is told how many layers are done, of how many; what it raises ends the merge.
    Raises:
        TrainingError: a layer is not there, is not in 16 bit, or has no bias and the adapter gives it one.
    """
    assert onto in ONTO
    if adapter.tokens is not None:
        raise TrainingError(
            "the adapter changes the embedding or the output head (modules_to_save, trainable_token_indices or LoRA on "
            "an embedding), which merging does not do yet: serve it as an adapter, or have peft merge it"
        )
    head_path, head = output_head(model)
    linears = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    changes = adapter.modules.keys() | adapter.affine.keys()
    wrong = [path for path in sorted(changes) if path not in linears or linears[path].weight.dtype != torch.bfloat16]
    if wrong:
        raise TrainingError(
            f"layer {wrong[0]} of the base is no linear layer in bfloat16, so nothing can be added to it"
        )
    for path, (_, shift) in adapter.affine.items():
        if linears[path].bias is None and shift.any():
            raise TrainingError(f"the adapter adds a bias to layer {path}, which has none in the base")
    untied = head_path in changes and _untie(model, head)
    changed = before = 0.0
    rounded = 0
    for done, (path, module) in enumerate(linears.items()):
        progress(done, len(linears))
        if onto == "nf4" and module is not head:
            module.weight.data = through_nf4(module.weight.data)
            rounded += 1
        if path in changes:
            weight = module.weight.data
            delta = _delta(adapter, path, weight)
            changed += float(delta.square().sum())
            before += float(weight.float().square().sum())
            module.weight.data = (weight.float() + delta).to(torch.bfloat16)
            if path in adapter.affine and module.bias is not None:
                bias = module.bias.data
                gain, shift = adapter.affine[path].to(bias.device)
                module.bias.data = (bias.float() + gain * bias.float() + shift).to(bias.dtype)
    progress(len(linears), len(linears))
    return Merged(len(changes), rounded, untied, (changed / before) ** 0.5 if before else 0.0)


def _delta(adapter: HostAdapter, path: str, weight: torch.Tensor) -> torch.Tensor:
    """What is added to a weight [out, in], fp32, on its device."""
    delta = torch.zeros(weight.shape, device=weight.device)
    if path in adapter.modules:
        a, bt = adapter.modules[path]
        delta += (bt.float().t() @ a.float()).to(weight.device)
    if path in adapter.affine:
        delta += adapter.affine[path][0].to(weight.device)[:, None] * weight.float()
    return delta


def weight_merged_onto(layer: nn.Linear, *, model: Any, onto: str) -> torch.Tensor:
    """What `merge_into` takes for a layer's weight."""
    weight = layer.weight.data
    return through_nf4(weight) if onto == "nf4" and layer is not output_head(model)[1] else weight


def through_nf4(weight: torch.Tensor) -> torch.Tensor:
    """What the served base holds of a 16-bit weight: quantized to NF4 with double quantization, and back.

    By bitsandbytes on CUDA, and where blocks do not end with rows.
    """
    if in_host_memory(weight) and weight.shape[1] % nf4.BLOCK == 0:
        return nf4.dequantize(*nf4.quantize(weight)).to(weight.dtype)
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    codes, state = quantize_4bit(weight.contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4")
    back: torch.Tensor = dequantize_4bit(codes, state)
    return back.to(weight.dtype).reshape(weight.shape)


def bytes_to_write(model: Any) -> int:
    """What the weights of a checkpoint take."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def write_checkpoint(model: Any, tokenizer: Any, directory: Path) -> None:
    """Writes weights (safetensors), config and tokenizer; raises CheckpointError if the disk does not take them."""
    model.config._name_or_path = ""
    try:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    except OSError as error:
        raise cannot_write(directory, error) from error


def add_generation_defaults(defaults: GenerationDefaults, directory: Path) -> None:
    """Has a written checkpoint say of generation what its adapter said; raises CheckpointError as above."""
    own = defaults.dump()
    if own is None:
        return
    path = directory / GENERATION_FILE
    said = json.loads(own)
    if "temperature" in said:
        said["do_sample"] = said["temperature"] > 0  # which is how transformers says a temperature of 0
    before = json.loads(path.read_bytes()) if path.exists() else {}
    together = {**before, **said}
    if together.get("temperature") == 0:
        del together["temperature"]
    try:
        path.write_text(json.dumps(together, indent=2, sort_keys=True) + "\n")
    except OSError as error:
        raise cannot_write(directory, error) from error


def _untie(model: Any, head: Any) -> bool:
    """Gives the output head a matrix of its own, so that a change of it does not change the embeddings."""
    if head.weight is not model.get_input_embeddings().weight:
        return False
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
    return True
