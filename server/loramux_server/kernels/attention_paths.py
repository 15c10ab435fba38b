"""Which way of computing attention (attention.py) is used on a device."""

from __future__ import annotations

import torch

from loramux_server.kernels.attention import Attend, NativeAttend, attend_reference
from loramux_server.kernels.kv_cache import KVShape
from loramux_server.kernels.native import native_library
from loramux_server.kernels.varlen_attention import varlen_attend


def select_attend(device: torch.device, shape: KVShape) -> tuple[Attend, bool, str]:
    """The kernel for this device, whether it reads the tiled cache, and its name for the start-up report."""
    fits = shape.dtype == torch.bfloat16 and shape.head_dim % 16 == 0
    if fits and device.type == "cpu" and (library := native_library()) is not None:
        kernel = NativeAttend(library)
        return kernel, True, kernel.name
    if fits and device.type == "cuda":
        from torch.nn.attention.varlen import varlen_attn

        if (varlen := varlen_attend(varlen_attn, device, shape)) is not None:
            return varlen, False, varlen.name
    return attend_reference, False, "tensor"
