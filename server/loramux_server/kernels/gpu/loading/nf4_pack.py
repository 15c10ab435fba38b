"""NF4 weights as the products read them (nf4.py), made on the device: from 16-bit weights, or from bitsandbytes' codes.

Semantics: `quantize` gives the codes of `loramux_adapters.nf4.quantize` and, of each block of 64 inputs, the largest
number, from which scales are made (double quantization takes the mean of all of a layer's). `repack` puts the codes
that bitsandbytes packs two in a byte, first one high, where the products read them. Both work on some outputs of a
weight at a time, so neither needs a whole weight in 16 bits on the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from loramux_adapters import nf4
from loramux_server.kernels.gpu.launch import Launch
from loramux_server.kernels.gpu.nf4 import BLOCK, HALF, Nf4Weights
from loramux_server.kernels.gpu.nf4_levels import ORDER
from loramux_server.kernels.layers.nf4_linear import unpacked

_OUTPUTS = 32  # of a program
_CODES = torch.tensor(ORDER).argsort().tolist()  # index of a level in ascending order -> its code


def quantize(launch: Launch, to: Nf4Weights, weight: torch.Tensor) -> None:
    """to.codes = the codes of weight [out, in] bf16, contiguous; to.scales = the largest number of each block."""
    assert weight.shape == (to.outputs, to.inputs) and weight.is_contiguous(), weight.shape
    assert weight.dtype == torch.bfloat16, weight.dtype
    launch(
        _quantize,
        (triton.cdiv(to.outputs, _OUTPUTS), to.inputs // BLOCK),
        *(to.codes, to.scales, weight.view(torch.int16), to.outputs, to.inputs, to.apart),
        OUTPUTS=_OUTPUTS,
        num_warps=4,
    )


def quantize_reference(to: Nf4Weights, weight: torch.Tensor) -> None:
    """`quantize` in PyTorch."""
    codes, _ = nf4.quantize(weight)
    largest = weight.float().view(to.outputs, -1, BLOCK).abs().amax(2)
    packed = Nf4Weights.packed(codes, largest)
    to.codes.copy_(packed.codes)
    to.scales.copy_(packed.scales)


def repack(launch: Launch, to: Nf4Weights, pairs: torch.Tensor) -> None:
    """to.codes = the codes in pairs [out, in / 2] uint8, contiguous."""
    assert pairs.shape == (to.outputs, to.inputs // 2) and pairs.is_contiguous(), pairs.shape
    launch(
        _repack,
        (triton.cdiv(to.outputs, _OUTPUTS), to.inputs // BLOCK),
        *(to.codes, pairs, to.outputs, to.inputs, to.apart),
        OUTPUTS=_OUTPUTS,
        num_warps=4,
    )


def repack_reference(to: Nf4Weights, pairs: torch.Tensor) -> None:
    """`repack` in PyTorch."""
    codes = unpacked(pairs, to.outputs, to.inputs)
    to.codes.copy_(Nf4Weights.packed(codes, to.scales.t()).codes)


_FIRST = tl.constexpr(_CODES[0])
_STEPS = tl.constexpr([after - before for before, after in zip(_CODES[:-1], _CODES[1:], strict=True)])
_BOUNDS = tl.constexpr(nf4.bounds().tolist())
_SMALLEST = tl.constexpr(nf4.SMALLEST)
_HALF = tl.constexpr(HALF)


@triton.jit
def _code_of(x, INTEGER: tl.constexpr):
    """The code of the level nearest to x in fp32, the lower one halfway; INTEGER: of the level of index x."""
    code = tl.full(x.shape, _FIRST, tl.int32)
    for i in tl.static_range(15):
        above = x > i if INTEGER else x > _BOUNDS[i]
        code += tl.where(above, _STEPS[i], 0)
    return code


@triton.jit
def _fp32_of(bits):
    """bf16 as 16 bits -> fp32."""
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _quantize(codes, largest, weight, outputs, inputs, apart, OUTPUTS: tl.constexpr):
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    block = tl.program_id(1)
    j = tl.arange(0, _HALF)
    there = n < outputs
    wide = block.to(tl.int64) * apart
    weight_at = weight + n[:, None].to(tl.int64) * inputs + block * 64 + j[None, :]
    low = _fp32_of(tl.load(weight_at, mask=there[:, None], other=0))
    high = _fp32_of(tl.load(weight_at + _HALF, mask=there[:, None], other=0))
    top = tl.max(tl.maximum(tl.abs(low), tl.abs(high)), 1)
    least = tl.full(top.shape, _SMALLEST, tl.float32)
    factor = tl.div_rn(tl.full(top.shape, 1.0, tl.float32), tl.maximum(top, least))
    byte = _code_of(low * factor[:, None], False) | _code_of(high * factor[:, None], False) << 4
    tl.store(codes + (wide + n[:, None]) * _HALF + j[None, :], byte.to(tl.uint8), mask=there[:, None])
    tl.store(largest + wide + n, top, mask=there)


@triton.jit
def _repack(codes, pairs, outputs, inputs, apart, OUTPUTS: tl.constexpr):
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    block = tl.program_id(1)
    j = tl.arange(0, _HALF)
    there = n < outputs
    wide = block.to(tl.int64) * apart
    # Codes j and j + 32 of the block: the high half of their byte where j is even.
    pairs_at = pairs + n[:, None].to(tl.int64) * (inputs // 2) + block * _HALF + j[None, :] // 2
    shift = (1 - j[None, :] % 2) * 4
    low = tl.load(pairs_at, mask=there[:, None], other=0).to(tl.int32) >> shift & 15
    high = tl.load(pairs_at + _HALF // 2, mask=there[:, None], other=0).to(tl.int32) >> shift & 15
    byte = _code_of(low, True) | _code_of(high, True) << 4
    tl.store(codes + (wide + n[:, None]) * _HALF + j[None, :], byte.to(tl.uint8), mask=there[:, None])
