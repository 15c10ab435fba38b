"""16-bit weights -> NF4 on the CPU, by compiled code: the numbers of `loramux_adapters.nf4`, on all cores."""

from __future__ import annotations

import torch

from loramux_adapters import nf4
from loramux_server.kernels.compiled.library import Compiled, native_library


def quantize_into(codes: torch.Tensor, scales: torch.Tensor, weight: torch.Tensor, compiled: Compiled) -> None:
    """Quantizes one layer.

    Args:
        codes: [out / 16, in / 4, 32] uint8, changed in place.
        scales: [in / 64, out] fp32, changed in place; double quantization is undone.
        weight: [out, in] bf16; out is a multiple of 32, in of 64.
    """
    weight = weight.contiguous()
    (outputs, inputs), threads = weight.shape, torch.get_num_threads()
    largest = torch.empty(outputs, inputs // nf4.BLOCK)
    bounds = nf4.bounds()
    compiled.function("loramux_nf4_quantize")(
        *(tensor.data_ptr() for tensor in (codes, largest, weight, bounds)), outputs, inputs, threads
    )
    scales.copy_(_twice_quantized(largest, compiled).t())


def twice_quantized(largest: torch.Tensor) -> torch.Tensor:
    """The largest numbers of a weight's blocks [out, in / 64] fp32 -> the scales that double quantization leaves of
    them, of the same shape: by compiled code where there is some."""
    library = native_library()
    if library is None:
        return nf4.twice_quantized(largest)
    return _twice_quantized(largest.contiguous(), library.best)


def _twice_quantized(largest: torch.Tensor, compiled: Compiled) -> torch.Tensor:
    rounded, offset, table = torch.empty_like(largest), torch.empty(1), nf4.rounded_scales()
    compiled.function("loramux_nf4_scales")(
        *(tensor.data_ptr() for tensor in (rounded, offset, largest, table)),
        *(largest.numel(), torch.get_num_threads()),
    )
    return rounded + offset
