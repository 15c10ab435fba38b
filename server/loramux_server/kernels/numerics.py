"""The numerics id: whoever has the same one computes the same bits."""

from __future__ import annotations

from importlib import metadata

import torch
from torch import nn

from loramux_server.kernels.choice import Kernels
from loramux_server.kernels.compiled_ops import compiled_ops
from loramux_server.kernels.nf4_linear import products_of

_LIBRARIES = ("torch", "bitsandbytes", "transformers")
_KERNELS = 2  # goes up whenever one of our own kernels gives other bits than before
_CPU_FEATURES = ("avx2", "avx512_f", "avx512_bf16", "amx_bf16")  # what kernels choose their path by


def kernel_paths(model: nn.Module, device: torch.device) -> str:
    """How the layers of this model are computed on this machine, for the start-up report and the numerics id."""
    return f"{products_of(model, device)}; compiled {compiled_ops(model)}"


def numerics_id(model: nn.Module, device: torch.device, kernels: Kernels) -> str:
    """What decides the bits of a reply besides base and adapter: versions, kernel paths, and the kind of device.

    Args:
        model: the base, as it was laid out for these kernels.
    """
    versions = " ".join([*(f"{name} {metadata.version(name)}" for name in _LIBRARIES), f"kernels {_KERNELS}"])
    if device.type == "cpu":
        found = torch.cpu.get_capabilities()
        kind = "cpu " + "+".join([str(found.get("architecture", "")), *(f for f in _CPU_FEATURES if found.get(f))])
    else:
        kind = torch.cuda.get_device_name(device)
    paths = f"{kernel_paths(model, device)}; attention {kernels.attention}; LoRA {kernels.lora}"
    return f"{versions}; {paths}; {kind}"
