"""What of a base no compiled kernel computes, on the CPU: PyTorch's operations, in fp32.

Half precision is emulated on processors that have none, some ten times slower than fp32, and it loses what the kernels
of exact integers keep.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional
from transformers.models.llama4.modeling_llama4 import Llama4Router

from loramux_adapters.device.process_memory import available_bytes
from loramux_server.kernels.layers.nf4_linear import NF4Linear, four_bit_layers
from loramux_server.kernels.layers.packed_head import PackedHead

_TOGETHER = 4
_SHARE = 2  # of the memory that is free, half may go to a layer's weight in fp32


class DequantizedNF4(nn.Linear):
    """An NF4 layer whose weight lies in fp32, each number as its code and scale say. Frozen.

    Semantics: y = x @ w.T + bias in fp32, the bits of an NF4 layer that is dequantized for each product.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """weight [out, in] fp32, bias [out] of any float dtype; both are held, the bias in fp32."""
        nn.Module.__init__(self)  # nn.Linear's own would make a weight
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.float(), requires_grad=False))


@torch.no_grad()
def dequantized(layer: NF4Linear) -> nn.Module:
    """What a layer of the compiled kernels stands for, computed in fp32 by PyTorch: `layer` itself, changed, where
    memory has no room for its weight, which is then dequantized for each product."""
    bias = None if layer.bias is None else layer.bias.float()
    if 4 * layer.in_features * layer.out_features <= available_bytes() // _SHARE:
        return DequantizedNF4(layer.dequantized(), bias)
    layer.__dict__["forward"] = lambda x: functional.linear(x, layer.dequantized(), bias)
    return layer


@torch.no_grad()
def run_in_fp32(model: nn.Module, *, keep: nn.Parameter | None = None) -> None:
    """Has dense layers compute in fp32, and NF4 layers that no kernel takes dequantized to it, in place.

    Args:
        keep: a weight that stays as it is, unless a dense layer multiplies with it.
    """
    kept: set[int] = set()
    multiplied: set[int] = set()
    for module in model.modules():
        own = {id(parameter) for parameter in module.parameters(recurse=False)}
        if isinstance(module, (NF4Linear, PackedHead)):
            kept |= own
        elif isinstance(module, nn.Linear):
            multiplied |= own
    if keep is not None:
        kept.add(id(keep))
    for parameter in model.parameters():
        if parameter.is_floating_point() and id(parameter) not in kept - multiplied:
            parameter.data = parameter.data.float()
    keep_unpacked(model)
    for module in model.modules():
        if isinstance(module, nn.Linear) and not isinstance(module, (NF4Linear, PackedHead, Llama4Router)):
            module.__dict__["forward"] = in_fours(module.forward)
    for _, layer in four_bit_layers(model):
        layer.compute_dtype, layer.compute_type_is_set = torch.float32, True
        layer.weight.quant_state.dtype = torch.float32


def in_fours(forward: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """A product whose rows are filled up with zeros to a multiple of four.

    PyTorch's library takes other code for one to three rows, with other last bits; so a row has the same bits alone as
    in company (the check at start tells whether it has on a processor).
    """

    def filled(x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = forward(functional.pad(rows, (0, 0, 0, -len(rows) % _TOGETHER)))[: len(rows)]
        return y.view(*x.shape[:-1], y.shape[-1])

    return filled


def keep_unpacked(model: nn.Module) -> None:
    """Has NF4 layers of bitsandbytes on the CPU dequantized for each product.

    The first forward in eval mode on a CPU with AVX512-BF16 would repack them for bitsandbytes' kernel, which has no
    backward: gradients would be silently wrong from then on.
    """
    for _, layer in four_bit_layers(model):
        layer.support_avx512bf16_for_cpu = False
