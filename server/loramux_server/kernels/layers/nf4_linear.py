"""NF4 layers on the compiled CPU kernels (csrc/exact/): bitsandbytes' weights, laid out for products of exact integers.

Quantization is bitsandbytes', value for value; double quantization of the scales is undone.

Semantics: y = x @ w.T + bias in fp32; of a row and of the levels each block of 64 is rounded to whole numbers
(csrc/exact/product.h).
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from loramux_adapters import nf4
from loramux_adapters.device.device import in_host_memory
from loramux_server.kernels.compiled.library import Compiled

BLOCK = nf4.BLOCK  # inputs that share a scale
_OUTPUTS, _INPUTS = 16, 4  # of one tile of codes
_OUTPUTS_TOGETHER = 32  # the kernel's tiles are two side by side


class NF4Linear(nn.Linear):
    """A frozen layer whose weight lies as the compiled kernels read it.

    Attributes:
        weight: [out / 16, in / 4, 32] uint8, the codes of 16 outputs by 4 inputs in 32 bytes; no gradient.
        scales: [in / 64, out] fp32, a buffer.
        bias: [out] bf16, no gradient; or None.
    """

    scales: torch.Tensor

    def __init__(
        self, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, compiled: Compiled
    ) -> None:
        """The tensors are held as they are, not copied."""
        nn.Module.__init__(self)  # nn.Linear's own would make a weight
        self.in_features, self.out_features = codes.shape[1] * _INPUTS, codes.shape[0] * _OUTPUTS
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("scales", scales)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        self.compiled = compiled

    @classmethod
    def of(cls, layer: Any, compiled: Compiled) -> NF4Linear:
        """From a Linear4bit of bitsandbytes that `fits`."""
        state = layer.weight.quant_state
        codes = tiles(unpacked(layer.weight.data, *state.shape))
        scales = scales_of(state).t().contiguous()
        bias = None if layer.bias is None else layer.bias.detach().to(torch.bfloat16)
        return cls(codes, scales, bias, compiled)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] of any float dtype -> [..., out] of the same. Without gradients."""
        y = self.product(x.reshape(-1, self.in_features).float())
        if self.bias is not None:
            y += self.bias
        return y.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def product(self, x: torch.Tensor, *, threads: int | None = None) -> torch.Tensor:
        """x [rows, in] fp32 -> x @ w.T [rows, out] fp32, without the bias. `threads`: PyTorch's own number if None."""
        x = x.detach().contiguous()
        y = torch.empty(x.shape[0], self.out_features)
        self.compiled.function("loramux_exact_product")(
            *(tensor.data_ptr() for tensor in (y, x, self.weight, self.scales)),
            *(x.shape[0], self.in_features, self.out_features),
            *(self.compiled.isa, threads or torch.get_num_threads()),
        )
        return y

    def product_transposed(self, dy: torch.Tensor) -> torch.Tensor:
        """dy [rows, out] fp32 -> dy @ w [rows, in] fp32, the gradient of `product`; csrc/exact/backward.h."""
        dy = dy.detach().contiguous()
        dx = torch.empty(dy.shape[0], self.in_features)
        self.compiled.function("loramux_exact_product_transposed")(
            *(tensor.data_ptr() for tensor in (dx, dy, self.weight, self.scales)),
            *(dy.shape[0], self.in_features, self.out_features),
            *(self.compiled.isa, torch.get_num_threads()),
        )
        return dx

    def squares(self) -> torch.Tensor:
        """[out] fp64: the sum of squares of each output's weights; on one thread, the same bits on every processor."""
        sums = torch.empty(self.out_features, dtype=torch.float64)
        self.compiled.function("loramux_nf4_squares")(
            *(tensor.data_ptr() for tensor in (sums, self.weight, self.scales)),
            *(self.out_features, self.in_features, 1),
        )
        return sums

    def dequantized(self) -> torch.Tensor:
        """[out, in] fp32, with NF4's own levels: a copy."""
        return nf4.dequantize(codes_of(self.weight.detach()), self.scales.t().contiguous())


def fits(layer: nn.Module) -> bool:
    """Whether it is an NF4 layer of bitsandbytes on the CPU that the compiled kernels can take."""
    linear: Any = layer
    if type(layer) not in _four_bit() or not in_host_memory(linear.weight):
        return False
    state = linear.weight.quant_state
    return shape_fits(linear) and state is not None and state.quant_type == "nf4" and state.blocksize == BLOCK


def shape_fits(layer: nn.Linear) -> bool:
    """Whether the compiled kernels can take an NF4 layer of this shape."""
    return layer.out_features % _OUTPUTS_TOGETHER == 0 and layer.in_features % BLOCK == 0


def why_no_kernel(layer: nn.Linear) -> str:
    """What of its shape the compiled kernels cannot take; empty where they can."""
    if shape_fits(layer):
        return ""
    return (
        f"it takes {layer.in_features} numbers to {layer.out_features}, and they take a multiple of {BLOCK} to a "
        f"multiple of {_OUTPUTS_TOGETHER}"
    )


def codes_shape(layer: nn.Linear) -> tuple[int, ...]:
    """Of `weight`, for a layer that `shape_fits`."""
    return layer.out_features // _OUTPUTS, layer.in_features // _INPUTS, 2 * _OUTPUTS


def scales_shape(layer: nn.Linear) -> tuple[int, ...]:
    """Of `scales`, for a layer that `shape_fits`."""
    return layer.in_features // BLOCK, layer.out_features


def four_bit_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """(path, layer) of every layer of bitsandbytes. While that library is not imported there are none."""
    return [(path, module) for path, module in model.named_modules() if isinstance(module, _four_bit())]


def _four_bit() -> tuple[type, ...]:
    """bitsandbytes' class of NF4 layers, without importing it for a model that has none: it takes seconds."""
    imported: Any = sys.modules.get("bitsandbytes.nn.modules")
    return () if imported is None else (imported.Linear4bit,)


@torch.no_grad()
def pack(model: nn.Module, compiled: Compiled) -> None:
    """Puts an NF4Linear in the place of every NF4 layer that `fits`."""
    for path, layer in list(model.named_modules()):
        if fits(layer):
            model.set_submodule(path, NF4Linear.of(layer, compiled))


def unpacked(weight: torch.Tensor, outputs: int, inputs: int) -> torch.Tensor:
    """bitsandbytes' packed codes, two in a byte, the first in its high half -> [outputs, inputs] uint8."""
    pairs = weight.reshape(-1)
    return torch.stack([pairs >> 4, pairs & 15], dim=1).view(outputs, inputs)


def scales_of(state: Any) -> torch.Tensor:
    """bitsandbytes' scales, double quantization undone -> [outputs, inputs / 64] fp32, where they lie."""
    import bitsandbytes.functional as bnb

    scales: torch.Tensor = state.absmax
    if state.nested:
        scales = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    outputs, inputs = state.shape
    return scales.float().view(outputs, inputs // BLOCK)


def tiles(codes: torch.Tensor) -> torch.Tensor:
    """[out, in] uint8 -> [out / 16, in / 4, 32] uint8; csrc/exact/product.h says what lies where."""
    outputs, inputs = codes.shape
    quads = codes.view(outputs // _OUTPUTS, _OUTPUTS, inputs // _INPUTS, 2, 2).permute(0, 2, 3, 1, 4)
    low, high = quads.flatten(3).unbind(2)
    return (low | high << 4).contiguous()


def codes_of(tiled: torch.Tensor) -> torch.Tensor:
    """[out / 16, in / 4, 32] uint8 -> [out, in] uint8: `tiles` the other way."""
    low, high = (part.view(*tiled.shape[:2], _OUTPUTS, 2) for part in (tiled & 15, tiled >> 4))
    quads = torch.stack([low, high], dim=3)  # [tiles, quads, outputs, pair, 2]
    return quads.permute(0, 2, 1, 3, 4).reshape(tiled.shape[0] * _OUTPUTS, -1)
