"""NF4 layers of a base on a graphics processor's kernels: bitsandbytes' weights, laid out for them once."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from loramux_adapters.device.device import Device
from loramux_server.kernels.decoder.description import Kinds
from loramux_server.kernels.gpu.nf4 import Nf4Weights, nf4_product, why_not
from loramux_server.kernels.gpu.split_sums import row_tiles_of, scratch_numbers
from loramux_server.kernels.gpu.step.module_attention import why_not_attended
from loramux_server.kernels.layers.nf4_linear import four_bit_layers
from loramux_server.kernels.layers.packed_embedding import put


class TritonNF4Linear(nn.Linear):
    """A frozen layer whose weight lies as the kernels read it.

    Attributes:
        codes, scales: of `nf4`, as buffers.
        bias: [out], no gradient; or None.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    products = "NF4 Triton"  # in reports

    def __init__(self, nf4: Nf4Weights, bias: torch.Tensor | None, device: Device) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make a weight
        self.in_features, self.out_features = nf4.inputs, nf4.outputs
        self._device = device
        self.register_buffer("codes", nf4.codes)
        self.register_buffer("scales", nf4.scales)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    @property
    def nf4(self) -> Nf4Weights:
        """The weight; a part of several layers' where a whole step reads them as one."""
        return Nf4Weights(self.codes, self.scales)

    @nf4.setter
    def nf4(self, weights: Nf4Weights) -> None:
        self.codes, self.scales = weights.codes, weights.scales

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The codes: what asks a layer for its weight wants to know where it lies."""
        return self.nf4.codes

    def dense_rows(self, first: int, last: int) -> torch.Tensor:
        """Weights of the outputs from `first` to `last` [last - first, in] fp32, as products count them; on the device,
        for who has entered it.
        """
        return self.nf4.part(first, last).as_multiplied(self._device.activations)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out] of x's dtype. Without gradients."""
        rows = x.detach().reshape(-1, self.in_features).to(self._device.activations).contiguous()
        numbers = scratch_numbers(len(rows), self.in_features, self.out_features)
        scratch = self._device.scratch((max(numbers, 1),), torch.float32)
        y = self._device.scratch((len(rows), self.out_features), x.dtype)
        tiles = row_tiles_of(self._device.capability)
        nf4_product(self._device.launch, y, rows, self.nf4, scratch, bias=self.bias, row_tiles=tiles)
        return y.view(*x.shape[:-1], self.out_features)


@torch.no_grad()
def pack(model: nn.Module, device: Device) -> None:
    """Has a base compute in the device's activations, its layers on TritonNF4Linear where the kernels read them."""
    for _, layer in four_bit_layers(model):
        if not why_not(layer):
            weights = Nf4Weights.of(layer)
            on_device = Nf4Weights(device.put(weights.codes), device.put(weights.scales))
            put(model, layer, TritonNF4Linear(on_device, layer.bias, device))
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = device.put(tensor.data.to(device.activations) if tensor.dtype == torch.bfloat16 else tensor.data)


def kinds_of(act: torch.dtype) -> Kinds:
    """What a whole step on these kernels takes, where `act` is what lies between them."""

    def why_not_linear(layer: nn.Module) -> str:
        return "" if isinstance(layer, TritonNF4Linear) else "is not read by the NF4 kernels"

    def why_not_head(head: Any) -> str:
        if type(head) is not nn.Linear or head.bias is not None or not head.weight.is_contiguous():
            return "is no dense layer without a bias"
        if head.weight.dtype != act:
            return f"is kept in {head.weight.dtype}, and the kernels compute in {act}"
        return "" if head.in_features % 16 == 0 else f"takes {head.in_features} numbers, and not a multiple of 16"

    return Kinds(why_not_linear, why_not_head, partial(why_not_attended, act=act), act)
