"""The output head on the compiled CPU kernels (csrc/exact/): whole numbers with a scale for each block.

Semantics: y = x @ w.T in fp32; each block of 64 of the weight is rounded to whole numbers up to 2047, and of a row to
ones up to 16383. A number of the weight takes 12 bits, a high byte and half a low one, which lie apart.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import nn

from loramux_adapters.device.device import in_host_memory
from loramux_server.kernels.compiled.library import Compiled
from loramux_server.kernels.layers.nf4_linear import BLOCK

_OUTPUTS = 16  # of a tile
_PART = 2048  # rows that are unpacked at a time
_TOGETHER = 32  # the vocabulary is padded to a multiple of this


class PackedHead(nn.Linear):
    """A head without bias. Frozen.

    Attributes:
        weight: bytes of whole numbers [3, padded / 32, 16, in] uint8, as csrc/exact/exact.h says of `pack_head`.
        scales: [in / 64, padded] fp32, a buffer.
        padded: the vocabulary, up to a multiple of 32.
    """

    scales: torch.Tensor

    def __init__(self, numbers: torch.Tensor, scales: torch.Tensor, vocabulary: int, compiled: Compiled) -> None:
        """The tensors are held as they are, not copied."""
        nn.Module.__init__(self)  # nn.Linear's own would make a weight
        self.out_features, self.in_features = vocabulary, numbers.shape[-1]
        self.padded = scales.shape[1]
        self.weight = nn.Parameter(numbers, requires_grad=False)
        self.register_parameter("bias", None)
        self.register_buffer("scales", scales)
        self.compiled = compiled

    @classmethod
    def of(cls, head: nn.Linear, compiled: Compiled) -> PackedHead:
        """From a head that `head_fits`."""
        numbers, scales = (
            torch.empty(shape, dtype=dtype)
            for shape, dtype in zip(head_shapes(head), (torch.uint8, torch.float32), strict=True)
        )
        cls.fill(numbers, scales, head.weight, compiled)
        return cls(numbers, scales, head.out_features, compiled)

    @staticmethod
    def fill(
        numbers: torch.Tensor,
        scales: torch.Tensor,
        weight: torch.Tensor,
        compiled: Compiled,
        threads: int | None = None,
    ) -> None:
        """Rounds a weight [vocabulary, in] bf16 into tensors of `head_shapes`. `threads`: PyTorch's number if None."""
        (vocabulary, inputs), padded = weight.shape, scales.shape[1]
        compiled.function("loramux_exact_pack_head")(
            *(tensor.data_ptr() for tensor in (numbers, scales, weight)),
            *(vocabulary, padded, inputs, compiled.isa, threads or torch.get_num_threads()),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] of any float dtype -> [..., vocabulary] fp32, a view of what is padded. Without gradients."""
        y = self.product(x.reshape(-1, self.in_features).float())
        return y.view(*x.shape[:-1], self.padded)[..., : self.out_features]

    def product(self, x: torch.Tensor, *, threads: int | None = None) -> torch.Tensor:
        """x [rows, in] fp32 -> [rows, padded] fp32; what is beyond the vocabulary is zero. `threads`: PyTorch's own
        number if None."""
        x = x.detach().contiguous()
        y = torch.empty(x.shape[0], self.padded)
        self._call("loramux_exact_dense", y, x, threads)
        return y

    def product_transposed(self, dy: torch.Tensor) -> torch.Tensor:
        """dy [rows, padded] fp32, zeros beyond the vocabulary -> dy @ w [rows, in] fp32, the gradient of `product`."""
        dy = dy.detach().contiguous()
        dx = torch.empty(dy.shape[0], self.in_features)
        self._call("loramux_exact_dense_transposed", dx, dy)
        return dx

    def squares(self) -> torch.Tensor:
        """[vocabulary] fp64: the sum of squares of each output's weights; the same bits on every processor."""
        parts = []
        for first in range(0, self.out_features, _PART):
            tokens = torch.arange(first, min(first + _PART, self.out_features))
            whole = _whole_rows(self.weight, self.padded, tokens).double()
            scales = self.scales.t()[tokens]
            blocks = whole.square().sum(2) * scales.square().double()  # whole numbers, so both are exact
            sums = torch.zeros(len(tokens), dtype=torch.float64)
            for block in blocks.unbind(1):
                sums += block
            parts.append(sums)
        return torch.cat(parts)

    def _call(self, name: str, to: torch.Tensor, rows: torch.Tensor, threads: int | None = None) -> None:
        self.compiled.function(name)(
            *(tensor.data_ptr() for tensor in (to, rows, self.weight, self.scales)),
            *(rows.shape[0], self.in_features, self.padded, self.compiled.isa, threads or torch.get_num_threads()),
        )


def rows_of(numbers: torch.Tensor, scales: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Rows of the weight that a head's numbers and scales stand for: tokens [...] -> [..., in] fp32."""
    which = tokens.reshape(-1)
    rows = _whole_rows(numbers, scales.shape[1], which) * scales.t()[which][..., None]
    return rows.view(*tokens.shape, numbers.shape[-1])


def _whole_rows(numbers: torch.Tensor, padded: int, which: torch.Tensor) -> torch.Tensor:
    """Of tokens [n]: whole numbers [n, in / 64, 64] fp32."""
    inputs = numbers.shape[-1]
    tile, lane = which // _OUTPUTS, which % _OUTPUTS
    flat = numbers.view(-1)
    high, low = flat[: padded * inputs], flat[padded * inputs :]
    highs = high.view(torch.int8).view(padded // _OUTPUTS, inputs // 4, 2, _OUTPUTS, 2)[tile, :, :, lane].float()
    lows = low.view(padded // _OUTPUTS, inputs // 4, _OUTPUTS, 2)[tile, :, lane]
    whole = highs * 16 + torch.stack([lows & 15, lows >> 4], dim=2)
    return whole.view(len(which), inputs // BLOCK, BLOCK)


def head_shapes(head: nn.Linear) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of `numbers` and `scales`."""
    return head_shapes_of(head.out_features, head.in_features)


def head_shapes_of(outputs: int, inputs: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The same of a weight [outputs, inputs]."""
    padded = -(-outputs // _TOGETHER) * _TOGETHER
    return (3, padded // _TOGETHER, _OUTPUTS, inputs), (inputs // BLOCK, padded)


def head_fits(head: object) -> TypeGuard[nn.Linear]:
    """Whether it is a dense bf16 head on the CPU that the compiled kernels can take."""
    if type(head) is not nn.Linear or head.bias is not None or head.in_features % BLOCK:
        return False
    weight = head.weight
    return weight.dtype == torch.bfloat16 and weight.is_contiguous() and in_host_memory(weight)
