"""The weights that training must not touch: their digest and their bytes, whatever peft wrapped around them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

_QUANTIZED_PARTS = ("absmax", "code", "offset")


def base_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every frozen tensor as it lies in memory, by a name that does not depend on peft; tied weights come once.

    A quantized weight gives its raw codes, and its scales and their own scales as tensors of their own. So does a layer
    that lies as compiled kernels read it, whose scales are buffers.
    """
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            continue
        plain = _plain(name)
        yield plain, parameter.detach()
        state: Any = getattr(parameter, "quant_state", None)
        for nested, part in (("", state), ("state2.", getattr(state, "state2", None))):
            for field in _QUANTIZED_PARTS:
                tensor = getattr(part, field, None)
                if isinstance(tensor, torch.Tensor):
                    yield f"{plain}.{nested}{field}", tensor
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            for name, buffer in module.named_buffers(recurse=False):
                yield _plain(f"{path}.{name}"), buffer


def base_digest(model: nn.Module) -> str:
    """sha256 in hex over name, dtype, shape and bytes of every frozen tensor. Nothing is moved or unpacked."""
    digest = hashlib.sha256()
    for name, tensor in sorted(base_tensors(model), key=lambda item: item[0]):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


def base_elements(model: nn.Module) -> int:
    """Weights of the base, each quantized one counted as the weight that it stands for."""
    linears = (module for module in model.modules() if isinstance(module, nn.Linear))
    quantized = {
        id(layer.weight): layer.in_features * layer.out_features
        for layer in linears
        if not layer.weight.is_floating_point()
    }
    others = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if "lora_" not in name and id(parameter) not in quantized
    )
    return others + sum(quantized.values())


def base_bytes(model: nn.Module) -> int:
    """Bytes of the base as it is held, quantization constants included."""
    return sum(tensor.numel() * tensor.element_size() for _, tensor in base_tensors(model))


def _plain(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")
