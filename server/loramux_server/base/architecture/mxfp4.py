"""Numbers of 4 bits with a power of two for each 32 (MXFP4), in which gpt-oss' experts are published.

Semantics: number[i] = VALUES[code[i]] * 2 ** (scale[i // 32] - 127), two codes in a byte, the first in its low half.
Source: OCP Microscaling Formats (MX) Specification 1.0, E2M1 and E8M0.
"""

from __future__ import annotations

import torch

BLOCKS, SCALES = "_blocks", "_scales"  # what a checkpoint adds to a weight's name
_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = torch.tensor([*_POSITIVE, *(-value for value in _POSITIVE)])
_BIAS = 127


def dequantized_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """blocks [rows, groups, 16] uint8 and scales [rows, groups] uint8 -> [rows, 32 * groups] bf16, exactly."""
    codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2)  # [rows, groups, 32]
    numbers = torch.ldexp(_VALUES[codes.int()], scales.int()[..., None] - _BIAS)
    return numbers.to(torch.bfloat16).flatten(1)
