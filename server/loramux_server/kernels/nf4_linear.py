"""NF4 layers on the compiled CPU kernel (csrc/nf4.cpp): bitsandbytes' weights, laid out for another product.

Quantization is bitsandbytes', value for value; double quantization of the scales is undone. Its own packed kernel takes
about twice as long with 32 rows, and its dispatch around each call as long as the product with one.

Semantics: y = bf16(sum over blocks of 64 inputs of scale * (x @ level[code]^T)), products of bf16, sums in fp32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import bitsandbytes.functional as bnb
import torch
from bitsandbytes.nn.modules import Linear4bit
from torch import nn

from loramux_server.kernels.native import NativeLibrary

BLOCK = 64  # inputs that share a scale
_OUTPUTS, _INPUTS = 16, 4  # of one tile of codes


class NF4Linear(Linear4bit):
    """A layer whose weight lies as the compiled kernel reads it. Inference only; made by `pack`, never constructed."""

    _kernel: Callable[..., None]
    _codes: torch.Tensor  # [out / 16, in / 4, 32] uint8
    _scales: torch.Tensor  # [in / 64, out] fp32
    _levels: torch.Tensor  # [32] bf16
    places: tuple[int, int, int]  # of codes, scales and levels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] of any float dtype -> [..., out] of the same; the product is taken in bf16."""
        inputs, outputs = self.in_features, self.out_features
        rows = x.reshape(-1, inputs).to(torch.bfloat16).contiguous()
        y = torch.empty(rows.shape[0], outputs, dtype=torch.bfloat16)
        self._kernel(
            y.data_ptr(),
            rows.data_ptr(),
            *self.places,
            rows.shape[0],
            inputs,
            outputs,
            None,
            0,
            torch.get_num_threads(),
        )
        if self.bias is not None:
            y += self.bias
        return y.view(*x.shape[:-1], outputs).to(x.dtype)


@torch.no_grad()
def pack(model: nn.Module, library: NativeLibrary) -> None:
    """Lays every NF4 layer out anew for the compiled kernel, in place. Only where it has AVX512-BF16.

    Layers that `keep_unpacked` was told of are left alone.
    """
    kernel = library.function("loramux_nf4_linear")
    for module in model.modules():
        if type(module) is Linear4bit and module.weight.device.type == "cpu" and module.support_avx512bf16_for_cpu:
            _pack(module, kernel)


def _pack(layer: Any, kernel: Callable[..., None]) -> None:
    state = layer.weight.quant_state
    if state.quant_type != "nf4" or state.blocksize != BLOCK:
        return
    scales = state.absmax
    if state.nested:
        scales = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    outputs, inputs = state.shape
    codes = tiles(unpacked(layer.weight.data, outputs, inputs))
    layer.weight.data = codes.view(-1, 1)
    state.absmax = scales.float().view(outputs, inputs // BLOCK).t().contiguous()
    state.state2, state.offset, state.nested = None, None, False
    levels = state.code.to(torch.bfloat16).repeat(2)
    layer.__class__ = NF4Linear  # the layer keeps its identity, weight and name
    places = tuple(tensor.data_ptr() for tensor in (codes, state.absmax, levels))
    layer.__dict__.update(_kernel=kernel, _codes=codes, _scales=state.absmax, _levels=levels, places=places)


def keep_unpacked(model: nn.Module, *, all_layers: bool) -> None:
    """Has NF4 layers on the CPU dequantized for each product: all, or those of a shape that no packed kernel takes.

    The first forward in eval mode on a CPU with AVX512-BF16 would repack the others for bitsandbytes' kernel, which has
    no backward: gradients would be silently wrong from then on.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit) and (all_layers or module.out_features % 32 or module.in_features % BLOCK):
            module.support_avx512bf16_for_cpu = False


def products_of(model: nn.Module, device: torch.device) -> str:
    """How the linear layers of a base are computed, for the start-up report and the numerics id."""
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    if not layers:
        return "16 bit"
    if device.type != "cpu":
        return "NF4 bitsandbytes CUDA"
    names = Counter(
        "NF4 native AVX512-BF16"
        if isinstance(layer, NF4Linear)
        else "NF4 bitsandbytes AVX512-BF16"
        if layer.support_avx512bf16_for_cpu
        else "NF4 dequantize"
        for layer in layers
    )
    if len(names) == 1:
        return next(iter(names))
    return ", ".join(f"{name} ({count} layers)" for name, count in sorted(names.items()))


def unpacked(weight: torch.Tensor, outputs: int, inputs: int) -> torch.Tensor:
    """bitsandbytes' packed codes, two in a byte, the first in its high half -> [outputs, inputs] uint8."""
    pairs = weight.reshape(-1)
    return torch.stack([pairs >> 4, pairs & 15], dim=1).view(outputs, inputs)


def tiles(codes: torch.Tensor) -> torch.Tensor:
    """[out, in] uint8 -> [out / 16, in / 4, 32] uint8; csrc/nf4.cpp says what lies where."""
    outputs, inputs = codes.shape
    quads = codes.view(outputs // _OUTPUTS, _OUTPUTS, inputs // _INPUTS, 2, 2).permute(0, 2, 3, 1, 4)
    low, high = quads.flatten(3).unbind(2)
    return (low | high << 4).contiguous()
