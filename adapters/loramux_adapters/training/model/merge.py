"""A base and one adapter as one ordinary checkpoint, for places that know no adapters."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import nn

from loramux_adapters.errors import CheckpointError, TrainingError
from loramux_adapters.lora.host_cache import HostAdapter

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


def merge_into(model: Any, adapter: HostAdapter, *, onto: str) -> Merged:
    """Adds an adapter to a 16-bit model in place: W + scale * B A, summed in fp32 and rounded once.

    Args:
        model: transformers' causal language model with its 16-bit weights; nothing is quantized.
        adapter: as the check against this base gave it.
        onto: "nf4" takes for W what NF4 makes of the weights, which is what a QLoRA adapter was trained on;
            "16bit" takes the weights as they are.
    Raises:
        TrainingError: a layer is not there, or is not in 16 bit.
    """
    assert onto in ONTO
    head_path, head = _head(model)
    linears = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    rounded = 0
    if onto == "nf4":
        for module in linears.values():
            if module is not head:
                module.weight.data = through_nf4(module.weight.data)
                rounded += 1
    untied = head_path in adapter.modules and _untie(model, head)
    changed = before = 0.0
    for path, (a, bt) in adapter.modules.items():
        if path not in linears or linears[path].weight.dtype != torch.bfloat16:
            raise TrainingError(
                f"layer {path} of the base is no linear layer in bfloat16, so nothing can be added to it"
            )
        weight = linears[path].weight.data
        delta = bt.float().t() @ a.float()
        changed += float(delta.square().sum())
        before += float(weight.float().square().sum())
        linears[path].weight.data = (weight.float() + delta.to(weight.device)).to(torch.bfloat16)
    return Merged(len(adapter.modules), rounded, untied, (changed / before) ** 0.5 if before else 0.0)


def through_nf4(weight: torch.Tensor) -> torch.Tensor:
    """What the served base holds of a 16-bit weight: quantized to NF4 with double quantization, and back."""
    codes, state = quantize_4bit(weight.contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4")
    back: torch.Tensor = dequantize_4bit(codes, state)
    return back.to(weight.dtype).reshape(weight.shape)


def write_checkpoint(model: Any, tokenizer: Any, directory: Path) -> None:
    """Writes weights (safetensors), config and tokenizer; raises CheckpointError if the disk does not take them."""
    model.config._name_or_path = ""
    try:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    except OSError as error:
        raise _cannot_write(directory, error) from error


@contextmanager
def whole_directory(out: Path) -> Iterator[Path]:
    """A directory to fill, which gets the name `out` at the end if nothing was raised; otherwise it is removed.

    Raises:
        CheckpointError: `out` is there and not empty, or cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} is there already and not empty; name a new directory with --out")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise _cannot_write(out, error) from error
    try:
        yield partial
        partial.chmod(0o755)  # it and some of its files were made for us alone
        for path in partial.iterdir():
            path.chmod(0o644)
        partial.rename(out)
    except OSError as error:
        raise _cannot_write(out, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _head(model: Any) -> tuple[str, nn.Module | None]:
    head = model.get_output_embeddings()
    return next((path for path, module in model.named_modules() if module is head), ""), head


def _untie(model: Any, head: Any) -> bool:
    """Gives the output head a matrix of its own, so that a change of it does not change the embeddings."""
    if head.weight is not model.get_input_embeddings().weight:
        return False
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
    return True


def _cannot_write(directory: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{directory} cannot be written ({error.strerror or error}); free some space or name another"
    )
