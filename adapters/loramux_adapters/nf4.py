"""NF4 with double quantization, in tensors: what a 16-bit weight becomes in a base on the CPU.

Semantics, of a weight [out, in] in blocks of 64 along a row: largest = max |w| of the block, code = the level nearest
to w / largest, the lower one halfway. The largest numbers of 256 blocks one after another, less the mean of all of
them, become 8-bit numbers of bitsandbytes' dynamic type, and are used as these say. So does bitsandbytes, value for
value where a processor has AVX2; but the mean and the dynamic type's levels are made here in a way that no instruction
set changes.

This is the slow reference of the compiled quantizer, and what a merge rounds weights with.
"""

from __future__ import annotations

import math
import struct
from functools import cache

import torch

BLOCK = 64  # inputs that share a scale
_SCALE_BLOCK = 256  # scales that share a scale of their own
_STEPS_FROM_MIDDLE = 32767.5  # from 0 to 1, in steps of `rounded_scales`
SMALLEST = 1e-38  # a block of zeros is divided by this

# QLoRA, arXiv 2305.14314, appendix E.
_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@cache
def levels() -> torch.Tensor:
    """[16] fp32, ascending. Not to be changed."""
    return torch.tensor(_LEVELS)


@cache
def bounds() -> torch.Tensor:
    """[15] fp32, halfway between two levels each. Not to be changed."""
    return (levels()[:-1] + levels()[1:]) / 2


@cache
def scale_levels() -> torch.Tensor:
    """[256] fp32, ascending: the signed dynamic 8-bit type (arXiv 1511.04561). Not to be changed.

    Seven decades, each with twice as many numbers as the one below it, evenly spaced.
    """
    found = [0.0, 1.0]
    for decade in range(7):
        intervals = 2**decade
        step = _fp32((1.0 - _fp32(0.1)) / intervals)
        edges = [
            _fp32(
                _fp32(0.1) + step * i if 2 * i < intervals + 1 - (intervals + 1) % 2 else 1.0 - step * (intervals - i)
            )
            for i in range(intervals + 1)
        ]
        for low, high in zip(edges[:-1], edges[1:], strict=True):
            middle = _fp32(_fp32(10.0 ** (decade - 6)) * _fp32(_fp32(low + high) / 2))
            found += [middle, -middle]
    return torch.tensor(sorted(found))


@cache
def rounded_scales() -> torch.Tensor:
    """[65536] fp32: the level of `scale_levels` nearest to -1 + 2 k / 65535. Not to be changed.

    bitsandbytes looks a number up by its nearest k, so near the middle between two levels it takes either.
    """
    steps = torch.arange(65536, dtype=torch.float64) / 65535 * 2 - 1
    known = scale_levels().double()
    return scale_levels()[torch.searchsorted((known[:-1] + known[1:]) / 2, steps)]


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [out, in], in a multiple of 64, of any float dtype -> codes [out, in] uint8, scales [out, in / 64] fp32.

    The scales are those that double quantization gives back.
    """
    blocks = weight.detach().float().reshape(-1, BLOCK)
    largest = blocks.abs().amax(dim=1)
    scaled = (blocks * (1.0 / largest.clamp_min(SMALLEST))[:, None]).clamp_(-1, 1)
    codes = torch.bucketize(scaled, bounds(), out_int32=True).to(torch.uint8)
    return codes.view(weight.shape), twice_quantized(largest.view(weight.shape[0], -1))


def twice_quantized(largest: torch.Tensor) -> torch.Tensor:
    """[out, in / 64] fp32 -> the same, rounded to the dynamic 8-bit type around their mean."""
    mean = torch.tensor(math.fsum(largest.reshape(-1).tolist()) / largest.numel())
    rest = largest.reshape(-1) - mean
    padded = torch.nn.functional.pad(rest, (0, -rest.numel() % _SCALE_BLOCK)).view(-1, _SCALE_BLOCK)
    top = padded.abs().amax(dim=1, keepdim=True)
    scaled = (padded * torch.where(top > 0, 1.0 / top, 0.0)).clamp_(-1, 1)
    step = (scaled + 1) * _STEPS_FROM_MIDDLE
    index = step.floor()
    index += step - index >= 0.5  # halfway is up
    rounded: torch.Tensor = rounded_scales()[index.int()] * top
    return (rounded.reshape(-1)[: rest.numel()] + mean).view(largest.shape)


def dequantize(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """codes [out, in] uint8, scales [out, in / 64] fp32 -> [out, in] fp32."""
    return levels()[codes.int()] * scales.repeat_interleave(BLOCK, dim=1)


def _fp32(x: float) -> float:
    """Rounded to single precision."""
    rounded: float = struct.unpack("<f", struct.pack("<f", x))[0]
    return rounded
