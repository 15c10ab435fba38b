"""Linear layers of a base that read the same rows, as one product and one LoRA call take them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loramux_server.kernels.decoder.description import Linear
from loramux_server.kernels.gpu.lora import LoraTarget
from loramux_server.kernels.gpu.nf4 import Nf4Weights


@dataclass(frozen=True, slots=True)
class Stack:
    """Layers side by side along their outputs.

    Attributes:
        weights: in NF4, or [out, in] in 16 bits.
        bias: [out]; zeros for layers without one, None where no layer has one.
        targets: the adapters' memory of those layers that adapters can target.
    """

    inputs: int
    outputs: int
    weights: Nf4Weights | torch.Tensor
    bias: torch.Tensor | None
    targets: tuple[LoraTarget, ...]


def stack_of(layers: list[Linear | None]) -> Stack:
    """Of those that are there: one that is missing lies in the first, fused with it."""
    there = [layer for layer in layers if layer is not None]
    weights = there[0].layer.nf4 if len(there) == 1 else Nf4Weights.stack([one.layer.nf4 for one in there])
    if len(there) > 1:
        column = 0
        for one in there:  # the layer reads its own part of the stack, so that no weight lies there twice
            one.layer.nf4 = weights.part(column, column + one.outputs)
            column += one.outputs
    return Stack(
        weights.inputs,
        weights.outputs,
        weights,
        _bias(there),
        _targets(there),
    )


def head_stack(head: Linear) -> Stack:
    """The output head, which is kept in 16 bits."""
    weight: torch.Tensor = head.layer.weight.detach()
    return Stack(head.inputs, head.outputs, weight, None, _targets([head]))


def _bias(layers: list[Linear]) -> torch.Tensor | None:
    if all(one.layer.bias is None for one in layers):
        return None
    some = next(one.layer.bias for one in layers if one.layer.bias is not None)
    parts = [some.new_zeros(one.outputs) if one.layer.bias is None else one.layer.bias.detach() for one in layers]
    return torch.cat(parts)


def _targets(layers: list[Linear]) -> tuple[LoraTarget, ...]:
    found, column = [], 0
    for one in layers:
        if one.arena is not None:
            found.append(LoraTarget(one.arena, column))
        column += one.outputs
    return tuple(found)
