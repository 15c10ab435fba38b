"""bitsandbytes' packed CPU kernel for NF4, called without what bitsandbytes does around each call.

The kernel and its numbers are bitsandbytes'. Around it, bitsandbytes dispatches an operator, looks at values of a
tensor and wraps pointers: 17 of the 36 ms of a step with one sequence, and 14 of the 77 ms with 32 (SmolLM2-135M on two
Zen 4 cores, interleaved).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from bitsandbytes.backends.cpu import ops as bnb_cpu
from bitsandbytes.nn.modules import Linear4bit
from torch import nn

_SYMBOL = "gemv_4bit_inference_cpu_nf4_bf16"
_Kernel = Callable[..., None]


class PackedLinear4bit(Linear4bit):
    """A layer whose weights bitsandbytes has packed for the CPU. Inference only; made by `pack`, never constructed."""

    _kernel: _Kernel
    _codes: torch.Tensor  # [out * in / 2] uint8
    _scales: torch.Tensor  # [in / block, out] bf16
    _block: int

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] bf16 -> [..., out] bf16; any other dtype takes bitsandbytes' own way."""
        if x.dtype != torch.bfloat16:
            other: torch.Tensor = super().forward(x)
            return other
        inputs, outputs = self.in_features, self.out_features
        rows = x.reshape(-1, inputs)
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        y = torch.empty(rows.shape[0], outputs, dtype=torch.bfloat16)
        self._kernel(
            rows.shape[0],
            outputs,
            inputs,
            rows.data_ptr(),
            self._codes.data_ptr(),
            self._scales.data_ptr(),
            y.data_ptr(),
            self._block,
            rows.stride(0),
            outputs,
        )
        if self.bias is not None:
            y += self.bias
        return y.view(*x.shape[:-1], outputs)


@torch.no_grad()
def pack(model: nn.Module) -> None:
    """Lets bitsandbytes pack every layer that it would pack in its first forward, and calls the kernel directly after.

    Where its kernel cannot be reached this way, the layers stay bitsandbytes' own, with the same numbers.
    """
    kernel = _load_kernel()
    for module in model.modules():
        if (
            type(module) is not Linear4bit
            or module.weight.device.type != "cpu"
            or not module.support_avx512bf16_for_cpu
        ):
            continue
        module(torch.zeros(1, module.in_features, dtype=torch.bfloat16))
        state: Any = getattr(module.weight, "quant_state", None)
        if kernel is None or not getattr(state, "packing_format_for_cpu", False) or state.quant_type != "nf4":
            continue
        module.__class__ = PackedLinear4bit  # the layer keeps its identity, weight and name
        plain = module.__dict__  # not nn.Module's registers: these are views of what is registered already
        plain.update(_kernel=kernel, _codes=module.weight.data, _scales=state.absmax, _block=int(state.blocksize))


def _load_kernel() -> _Kernel | None:
    if getattr(bnb_cpu, "gemm_4bit_forward_kernel", None) is not None:
        return None  # bitsandbytes would use another kernel, with other numbers
    library: Any = bnb_cpu.lib
    try:
        kernel: Any = getattr(library, "_lib", library)[
            _SYMBOL
        ]  # an object of our own, so bitsandbytes' stays as it is
    except (AttributeError, TypeError):
        return None
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    kernel.argtypes = [size] * 3 + [pointer] * 4 + [size] * 3
    kernel.restype = None
    loaded: _Kernel = kernel
    return loaded
