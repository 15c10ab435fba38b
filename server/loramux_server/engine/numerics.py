"""The numerics id: whoever has the same one computes the same bits."""

from __future__ import annotations

from importlib import metadata

import torch

from loramux_server.base.loader import BaseModel, kernel_paths

_LIBRARIES = ("torch", "bitsandbytes", "transformers")
_KERNELS = 2  # goes up whenever one of our own kernels gives other bits than before
_CPU_FEATURES = ("avx2", "avx512_f", "avx512_bf16", "amx_bf16")  # what kernels choose their path by


def numerics_id(base: BaseModel, attention: str, lora: str) -> str:
    """What decides the bits of a reply besides base and adapter: versions, kernel paths, and the kind of device.

    Args:
        attention, lora: names of the kernels in use.
    """
    versions = " ".join([*(f"{name} {metadata.version(name)}" for name in _LIBRARIES), f"kernels {_KERNELS}"])
    if base.device.type == "cpu":
        found = torch.cpu.get_capabilities()
        device = "cpu " + "+".join([str(found.get("architecture", "")), *(f for f in _CPU_FEATURES if found.get(f))])
    else:
        device = torch.cuda.get_device_name(base.device)
    kernels = f"{kernel_paths(base.model, base.device)}; attention {attention}; LoRA {lora}"
    return f"{versions}; {kernels}; {device}"
