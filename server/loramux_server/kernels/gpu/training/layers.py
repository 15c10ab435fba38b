"""Frozen layers in training on a graphics processor: the product that is served, and its gradient for the input.

Semantics, with x rounded to the device's activations (bf16, or fp16):

    product(x) = what `nf4_product` (or `dense_product`) gives for it, in fp32, without the bias
    product_transposed(dy) = dy @ W, W dequantized and rounded to the activations' dtype, as dy is

A weight in NF4 is dequantized for one product and dropped. So the backward pass of a layer needs room for one weight in
16 bits and for some rows; a kernel that reads the codes itself would read them once for every 64 rows, and training has
thousands. Weights get no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from loramux_adapters.device.device import Device
from loramux_adapters.training.model.fused_linear import FrozenWeight
from loramux_server.kernels.gpu.dense import dense_product
from loramux_server.kernels.gpu.nf4 import nf4_dequantize, nf4_product
from loramux_server.kernels.gpu.split_sums import row_tiles_of, scratch_numbers
from loramux_server.kernels.gpu.step.nf4_linear import TritonNF4Linear

MOST_BYTES = 64 * 2**20  # of what a part of the rows needs beside its result
_TOGETHER = 64  # rows; the kernels' largest tile


class TrainedNF4Linear(TritonNF4Linear):
    """See the module's Semantics. The weight is the served layer's, where it lies."""

    def __init__(self, layer: TritonNF4Linear, device: Device) -> None:
        super().__init__(layer.nf4, None if layer.bias is None else layer.bias.detach(), device)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """x [rows, in] of any float dtype -> [rows, out] fp32."""
        return _some_rows_at_a_time(self._device, nf4_product, x, self.nf4, self.out_features)

    def product_transposed(self, dy: torch.Tensor) -> torch.Tensor:
        """dy [rows, out] fp32 -> [rows, in] fp32."""
        weight = self._device.scratch((self.out_features, self.in_features), self._device.activations)
        nf4_dequantize(self._device.launch, weight, self.nf4)
        return rounded_product(dy, weight)

    def dequantized(self) -> torch.Tensor:
        """[out, in] fp32: the weight that the layer stands for."""
        weight = self._device.scratch((self.out_features, self.in_features), torch.float32)
        nf4_dequantize(self._device.launch, weight, self.nf4)
        return weight


class TrainedDense(nn.Linear):
    """A layer whose weight has 16 bits, as the output head's, or is quantized as the NF4 kernels do not read it.

    Attributes:
        weight: the layer's own, which an embedding may share.
        padded: outputs of `product`, for what takes a head.
    """

    def __init__(self, layer: nn.Linear, device: Device) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make a weight
        self.in_features, self.out_features, self.padded = layer.in_features, layer.out_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self._held, self._device = FrozenWeight(layer), device

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out] of x's dtype. Without gradients."""
        y = self.product(x.detach().reshape(-1, self.in_features))
        y = y if self.bias is None else y + self.bias.detach().float()
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """x [rows, in] of any float dtype -> [rows, out] fp32, without the bias."""
        return _some_rows_at_a_time(self._device, dense_product, x, self._rounded(), self.out_features)

    def product_transposed(self, dy: torch.Tensor) -> torch.Tensor:
        """dy [rows, out] fp32 -> [rows, in] fp32."""
        return rounded_product(dy, self._rounded())

    def dequantized(self) -> torch.Tensor:
        """[out, in] fp32: the weight that the layer stands for."""
        return self._held.unpacked(torch.float32)

    def _rounded(self) -> torch.Tensor:
        return self._device.put(self._held.unpacked(self._device.activations))


def _some_rows_at_a_time(
    device: Device, product: Callable[..., None], x: torch.Tensor, weight: Any, outputs: int
) -> torch.Tensor:
    """x [rows, in] of any float dtype -> [rows, out] fp32, by `nf4_product` or `dense_product` in bounded scratch."""
    rows, inputs = x.shape
    x, tiles = x.to(device.activations).contiguous(), row_tiles_of(device.capability)
    y = device.scratch((rows, outputs), torch.float32)
    together = rows_together(4 * scratch_numbers(_TOGETHER, inputs, outputs), rows)
    sums = device.scratch((max(1, scratch_numbers(together, inputs, outputs)),), torch.float32)
    for first in range(0, rows, together):
        some = slice(first, first + together)
        product(device.launch, y[some], x[some], weight, sums, row_tiles=tiles)
    return y


def rounded_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a [rows, depth] fp32 @ b [depth, columns] bf16 or fp16 -> fp32; a is rounded to b's dtype, some rows at a time.

    Gradients are as small as 1e-8, which fp16 does not hold: there, each row is scaled by a power of two such that its
    largest number lies between 0.5 and 1, and the result is scaled back.
    """
    out = a.new_empty(len(a), b.shape[1])
    together = rows_together(_TOGETHER * 2 * (a.shape[1] + b.shape[1]), len(a))
    for first in range(0, len(a), together):
        some = slice(first, first + together)
        if b.dtype == torch.float16:
            _, exponents = torch.frexp(a[some].abs().amax(1, keepdim=True))
            scaled = torch.ldexp(a[some], -exponents).to(b.dtype)
            out[some] = torch.ldexp((scaled @ b).float(), exponents)
        else:
            out[some] = a[some].to(b.dtype) @ b
    return out


def rows_together(bytes_of_64: int, rows: int) -> int:
    """How many rows may be worked on at once where 64 of them need so many bytes: whole tiles of 64, at least one."""
    tiles = max(1, MOST_BYTES // max(1, bytes_of_64))
    return max(1, min(rows, tiles * _TOGETHER))


def trained(layer: Any, device: Device) -> nn.Linear:
    """A linear layer of a base, with both products."""
    if isinstance(layer, TritonNF4Linear):
        return TrainedNF4Linear(layer, device)
    return TrainedDense(layer, device)
