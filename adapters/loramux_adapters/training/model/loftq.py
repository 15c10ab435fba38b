"""A and B that start at what quantization took away (LoftQ, arXiv 2310.08659), for a base that stays as it is.

Semantics, for one layer with original weight W and dequantized weight Q, both [out, in]:

    A, B = argmin |W - (Q + scale * B A)|     over all A [rank, in], B [out, rank]

With Q fixed the answer is the largest singular triples of W - Q, found at once; LoftQ's alternation would choose
another Q, but all adapters share this one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from loramux_adapters.errors import RecipeError
from loramux_adapters.lora.closest_pair import closest_pair
from loramux_adapters.training.model.fused_linear import FrozenWeight


@torch.no_grad()
def start_at_quantization_loss(base: nn.Module, originals: Callable[[str], torch.Tensor]) -> None:
    """Sets A and B of every LoRA layer of the model.

    Args:
        base: the model with peft's layers in it.
        originals: module path in the base -> its 16-bit weight [out, in].
    Raises:
        RecipeError: an original does not have the layer's shape.
    """
    for path, module in base.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        layer: Any = module
        (name,) = layer.lora_A
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        held = FrozenWeight(layer.get_base_layer()).unpacked(torch.float32)
        original = originals(path).to(device=held.device, dtype=torch.float32)
        if original.shape != held.shape:
            raise RecipeError(
                f"the 16-bit weight of {path} is {list(original.shape)}, the base's is {list(held.shape)}: "
                "init loftq needs the checkpoint that the base was quantized from"
            )
        new_a, new_b = closest_pair(original - held, a.shape[0], float(layer.scaling[name]))
        a.copy_(new_a)
        b.copy_(new_b)
