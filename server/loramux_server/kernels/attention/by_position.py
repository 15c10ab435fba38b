"""What a layer's attention does with a token's position besides turning keys and queries: Llama 4's two ways.

Chunks: a token sees the tokens of its own chunk of the text, from that chunk's first on. Temperature: in layers that do
not turn by position, queries at position p are multiplied by

    1 + scale * log(1 + floor((p + 1) / floor))

transformers' code takes the place of a row in the batch for its position, which is right for one text alone. So its own
temperature is switched off while a model runs on our attention.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from loramux_server.errors import BaseModelError

CHUNKED = "chunked_attention"  # a kind of layer, as configs name it
_TUNED = "attn_temperature_tuning"  # whether a module of transformers' does it
_TEMPERATURE = "loramux_temperature"  # attribute of a module whose temperature is ours


@dataclass(frozen=True, slots=True)
class Temperature:
    """Of one layer. `floor`: tokens between two steps of the factor."""

    scale: float
    floor: int

    def factors(self, positions: torch.Tensor) -> torch.Tensor:
        """fp32 [rows] for int32 [rows], each computed in double precision and rounded once."""
        steps = ((positions.cpu().long() + 1) // self.floor).tolist()
        table = {step: 1.0 + self.scale * math.log1p(step) for step in set(steps)}
        return torch.tensor([table[step] for step in steps], dtype=torch.float32).to(positions.device)


def chunk_of(module: Any) -> int:
    """Tokens in a chunk of what an attention module sees; 0: it sees no chunks.

    Raises:
        BaseModelError: its layer is of this kind, and the config names no size.
    """
    config: Any = getattr(module, "config", None)
    kinds = getattr(config, "layer_types", None)
    if not kinds or kinds[module.layer_idx] != CHUNKED:
        return 0
    size = getattr(config, "attention_chunk_size", None)
    if not isinstance(size, int) or size < 1:
        raise BaseModelError(f"layer {module.layer_idx} sees chunks of a text, and attention_chunk_size is {size}")
    return size


def temperature_of(module: Any) -> Temperature | None:
    """Of an attention module on our attention; None where it has none."""
    found: Temperature | None = module.__dict__.get(_TEMPERATURE)
    return found


def use_our_temperature(model: Any) -> None:
    """Switches transformers' own off in every module that has it, and notes there what it was."""
    for module in model.modules():
        if getattr(module, _TUNED, False) is True and not getattr(module, "use_rope", True):
            module.__dict__[_TEMPERATURE] = Temperature(float(module.attn_scale), int(module.floor_scale))
            setattr(module, _TUNED, False)


def use_own_temperature(model: Any) -> None:
    """Switches transformers' own on again where `use_our_temperature` switched it off."""
    for module in model.modules():
        if module.__dict__.pop(_TEMPERATURE, None) is not None:
            setattr(module, _TUNED, True)
