"""Which way of adding LoRA deltas (ops.py) is used on a device."""

from __future__ import annotations

import torch

from loramux_adapters.lora.ops import AddLora, NativeAddLora, add_lora_segments, native_library
from loramux_server.kernels.grouped_lora import grouped_add_lora


def select_add_lora(device: torch.device, dtype: torch.dtype) -> tuple[AddLora, str]:
    """The path used on this device, and its name for the start-up report and the numerics id."""
    if dtype == torch.bfloat16 and device.type == "cpu" and (library := native_library()) is not None:
        kernel = NativeAddLora(library)
        return kernel, kernel.name
    if dtype == torch.bfloat16 and device.type == "cuda" and (grouped := grouped_add_lora(device)) is not None:
        return grouped, grouped.name
    return add_lora_segments, "tensor"
