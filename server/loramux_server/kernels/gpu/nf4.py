"""Products with NF4 weights, read once as codes of 4 bits whatever the number of rows.

Semantics, with x [rows, in], level [16] rounded to the activations' dtype, scale [in / 64, out] fp32:

    y[r, o] = sum over parts, in order, of sum over the part's blocks b, in order, of
              scale[b, o] * (sum over the block's 64 inputs i of x[r, i] * level[code[o, i]]) (+ bias[o])

Products and sums are fp32. The weight is the first operand of the tensor-core instruction, the rows the second, so
levels go from the registers in which they are looked up (nf4_levels.py) straight into the product. A program has 64
outputs and 8 to 64 rows in two warps; with so few warps, Hopper takes the instruction that others take too (mma.sync),
in the same order for any number of rows. Rows beyond 64 are further programs, which read the codes again. From some
hundred rows `nf4_dequantize` and a library's product may be faster, with other bits; no card has been asked, so steps
take this product for any number of rows, and only training takes the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from loramux_adapters import nf4
from loramux_server.kernels.gpu.launch import Launch
from loramux_server.kernels.gpu.nf4_levels import LEVELS, ORDER, look_up_bf16, look_up_fp16
from loramux_server.kernels.gpu.split_sums import (
    OUTPUTS_TOGETHER,
    ROW_TILES,
    add_parts,
    check_product,
    parts_of,
    row_tile,
)
from loramux_server.kernels.layers.nf4_linear import scales_of, unpacked

BLOCK = nf4.BLOCK  # inputs that share a scale
HALF = BLOCK // 2
# Without a word about registers, ptxas stops at 96 for 16 rows and may spill.
_OPTIONS = {"num_warps": 2, "num_stages": 4, "maxnreg": 255}


@dataclass(frozen=True)
class Nf4Weights:
    """A linear layer's weight, or several side by side, as the kernels read it.

    Attributes:
        codes: [in / 64, out, 32] uint8; of byte j the low half is the code of the block's input j, the high half that
            of input j + 32. Codes count the levels in `nf4_levels.ORDER`.
        scales: [in / 64, out] fp32, double quantization undone.

    Both may be some outputs of a wider weight, where they lie.
    """

    codes: torch.Tensor
    scales: torch.Tensor

    @property
    def apart(self) -> int:
        """Outputs from one block of inputs to the next, in memory."""
        return self.scales.stride(0)

    @property
    def inputs(self) -> int:
        return self.codes.shape[0] * BLOCK

    @property
    def outputs(self) -> int:
        return self.codes.shape[1]

    @classmethod
    def of(cls, linear: Any) -> Nf4Weights:
        """From a Linear4bit of bitsandbytes, wherever it lies; ValueError where `why_not` says something."""
        if reason := why_not(linear):
            raise ValueError(f"this layer cannot be read by the NF4 kernels: {reason}")
        state = linear.weight.quant_state
        outputs, inputs = state.shape
        return cls.packed(unpacked(linear.weight.data, outputs, inputs), scales_of(state))

    @classmethod
    def packed(cls, codes: torch.Tensor, scales: torch.Tensor) -> Nf4Weights:
        """From what `nf4.quantize` gives: codes [out, in] uint8 in NF4's own order, scales [out, in / 64] fp32."""
        outputs, inputs = codes.shape
        order = torch.tensor(ORDER, device=codes.device).argsort().to(torch.uint8)
        low, high = order[codes.int()].view(outputs, inputs // BLOCK, 2, HALF).unbind(2)
        return cls((low | high << 4).permute(1, 0, 2).contiguous(), scales.t().contiguous())

    @classmethod
    def stack(cls, weights: list[Nf4Weights]) -> Nf4Weights:
        """The outputs of one after those of another; the inputs are the same. No copy where they lie so already."""
        return _side_by_side(weights) or cls(
            torch.cat([w.codes for w in weights], 1), torch.cat([w.scales for w in weights], 1)
        )

    def part(self, begin: int, end: int) -> Nf4Weights:
        """The outputs from `begin` to `end`, where they lie."""
        return Nf4Weights(self.codes[:, begin:end], self.scales[:, begin:end])

    def unpacked(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`packed` the other way: codes [out, in] uint8 in NF4's own order, scales [out, in / 64] fp32; copies."""
        halves = torch.cat([self.codes & 15, self.codes >> 4], 2).permute(1, 0, 2).reshape(self.outputs, self.inputs)
        order = torch.tensor(ORDER, dtype=torch.uint8, device=self.codes.device)
        return order[halves.int()], self.scales.t().contiguous()

    def as_multiplied(self, act: torch.dtype) -> torch.Tensor:
        """[out, in] fp32: each weight as a product with rows of `act` counts it, its level rounded to `act`; a copy."""
        codes, scales = self.unpacked()
        levels = nf4.levels().to(act).float().to(codes.device)
        return levels[codes.int()] * scales.repeat_interleave(BLOCK, dim=1)


def _side_by_side(weights: list[Nf4Weights]) -> Nf4Weights | None:
    """The part of a wider weight that these are, one after another; None if they are not."""
    first, column = weights[0], 0
    for each in weights:
        if (each.inputs, each.apart) != (first.inputs, first.apart):
            return None
        for its, begins, numbers in ((each.codes, first.codes, HALF), (each.scales, first.scales, 1)):
            if its.untyped_storage().data_ptr() != begins.untyped_storage().data_ptr():
                return None
            if its.storage_offset() != begins.storage_offset() + column * numbers:
                return None
        column += each.outputs
    if column > first.apart:
        return None
    blocks = first.codes.shape[0]
    return Nf4Weights(
        first.codes.as_strided((blocks, column, HALF), first.codes.stride()),
        first.scales.as_strided((blocks, column), first.scales.stride()),
    )


def why_not(linear: Any) -> str:
    """What of a Linear4bit the kernels cannot read; empty where they can."""
    state = linear.weight.quant_state
    if state is None:
        return "it is not quantized yet: bitsandbytes does that when it is moved to a device"
    if state.quant_type != "nf4" or state.blocksize != BLOCK:
        return f"it is {state.quant_type} in blocks of {state.blocksize}, and they read nf4 in blocks of {BLOCK}"
    if state.shape[1] % BLOCK:
        return f"it takes {state.shape[1]} numbers, and they take a multiple of {BLOCK}"
    return ""


def nf4_product(
    launch: Launch,
    y: torch.Tensor,
    x: torch.Tensor,
    w: Nf4Weights,
    scratch: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    row_tiles: tuple[int, ...] = ROW_TILES,
) -> None:
    """y [rows, out] of any float dtype = x [rows, in] bf16 or fp16 @ w.T + bias [out] of any float dtype.

    scratch: fp32, at least `split_sums.scratch_numbers` of them; written. x and y may be columns of wider tensors.
    row_tiles: ascending, `split_sums.row_tiles_of` the card or the first of them.
    """
    check_product(y, x, w.inputs, w.outputs, scratch)
    rows = x.shape[0]
    if rows == 0:
        return
    parts, tile = parts_of(w.inputs, w.outputs), row_tile(rows, row_tiles)
    to, stride = (y, y.stride(0)) if parts == 1 else (scratch, w.outputs)
    launch(
        _product,
        (triton.cdiv(rows, tile), triton.cdiv(w.outputs, OUTPUTS_TOGETHER), parts),
        *(to, x, w.codes, w.scales, to if bias is None else bias),
        *(rows, w.inputs // BLOCK, w.outputs, w.apart, x.stride(0), stride),
        ROWS=tile,
        OUTPUTS=OUTPUTS_TOGETHER,
        PARTS=parts,
        BIAS=bias is not None and parts == 1,
        IN_REGISTERS=not triton.knobs.runtime.interpret,
        **_OPTIONS,
    )
    if parts > 1:
        add_parts(launch, y, scratch, parts, bias=bias)


def nf4_product_reference(y: torch.Tensor, x: torch.Tensor, w: Nf4Weights, *, bias: torch.Tensor | None = None) -> None:
    """`nf4_product` in PyTorch, block by block."""
    codes, scales = w.unpacked()
    levels = nf4.levels().to(x.device).to(x.dtype).float()[codes.int()]
    total = torch.zeros(y.shape, device=y.device)
    for block in range(w.inputs // BLOCK):
        at = slice(block * BLOCK, (block + 1) * BLOCK)
        total += x[:, at].float() @ levels[:, at].t() * scales[:, block]
    y.copy_(total if bias is None else total + bias.float())


def nf4_dequantize(launch: Launch, to: torch.Tensor, w: Nf4Weights) -> None:
    """to [out, in] of any float dtype = level * scale in fp32, rounded once: bitsandbytes' values."""
    assert to.shape == (w.outputs, w.inputs) and to.is_contiguous(), to.shape
    launch(
        _dequantize,
        (triton.cdiv(w.outputs, OUTPUTS_TOGETHER), w.inputs // BLOCK),
        *(to, w.codes, w.scales, w.outputs, w.inputs, w.apart),
        OUTPUTS=OUTPUTS_TOGETHER,
        num_warps=4,
    )


def nf4_dequantize_reference(to: torch.Tensor, w: Nf4Weights) -> None:
    """`nf4_dequantize` in PyTorch."""
    codes, scales = w.unpacked()
    to.copy_(nf4.levels().to(codes.device)[codes.int()] * scales.repeat_interleave(BLOCK, dim=1))


_LEVELS = tl.constexpr(LEVELS)
_LOOK_UP_BF16 = tl.constexpr(look_up_bf16())
_LOOK_UP_FP16 = tl.constexpr(look_up_fp16())
_OPERANDS = tl.constexpr("=&r,=&r,=&r,=&r,r")


@triton.jit
def _level(code):
    """Codes 0 to 15 -> their levels in fp32, by four rounds of selection: in each, a bit halves what is left."""
    return _of_16(code, 0, 8)


@triton.jit
def _of_16(code, FIRST: tl.constexpr, STEP: tl.constexpr):
    """The level of FIRST + the code's bits below 2 * STEP."""
    if STEP == 1:
        low = tl.full(code.shape, _LEVELS[FIRST], tl.float32)
        high = tl.full(code.shape, _LEVELS[FIRST + 1], tl.float32)
    else:
        low = _of_16(code, FIRST, STEP // 2)
        high = _of_16(code, FIRST + STEP, STEP // 2)
    return tl.where((code & STEP) != 0, high, low)


@triton.jit
def _look_up(codes, table, dtype: tl.constexpr, IN_REGISTERS: tl.constexpr):
    """Bytes -> the levels of their low halves and of their high halves, in bf16 or fp16; `table` [16] holds them."""
    if IN_REGISTERS:
        if dtype == tl.bfloat16:
            low, high = tl.inline_asm_elementwise(
                _LOOK_UP_BF16, _OPERANDS, [codes], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
            )
        else:
            low, high = tl.inline_asm_elementwise(
                _LOOK_UP_FP16, _OPERANDS, [codes], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
            )
    else:
        low = _gathered(table, codes & 15)
        high = _gathered(table, codes >> 4)
    return low, high


@triton.jit
def _gathered(table, codes):
    flat = tl.reshape(codes.to(tl.int32), (codes.shape[0] * codes.shape[1],))
    return tl.reshape(tl.gather(table, flat, 0), codes.shape)


@triton.jit(do_not_specialize=["rows", "blocks"])
def _product(
    y,
    x,
    codes,
    scales,
    bias,
    rows,
    blocks,
    outputs,
    apart,
    x_stride,
    y_stride,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    PARTS: tl.constexpr,
    BIAS: tl.constexpr,
    IN_REGISTERS: tl.constexpr,
):
    """y [PARTS, rows, out]. Programs that read the same codes follow one another: the cache holds them by then."""
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    part = tl.program_id(2)
    j = tl.arange(0, 32)
    row_there, output_there = m < rows, n < outputs
    wide = apart.to(tl.int64)
    table = _level(tl.arange(0, 16)).to(x.dtype.element_ty)
    each = (blocks + PARTS - 1) // PARTS
    first = part * each
    end = tl.minimum(first + each, blocks)
    codes_at = codes + n[:, None] * 32 + j[None, :]
    scales_at = scales + n
    x_at = x + m[:, None].to(tl.int64) * x_stride + j[None, :]
    total = tl.zeros((OUTPUTS, ROWS), tl.float32)
    # A scale is loaded one turn ahead: it is no operand of a product, so the compiler does not do it.
    scale = tl.load(scales_at + first * wide, mask=output_there & (first < end), other=0)
    for block in range(first, end):
        byte = tl.load(codes_at + block * wide * 32, mask=output_there[:, None], other=0)
        next_there = output_there & (block + 1 < end)
        next_scale = tl.load(scales_at + (block + 1) * wide, mask=next_there, other=0)
        x_low = tl.load(x_at + block * 64, mask=row_there[:, None], other=0)
        x_high = tl.load(x_at + block * 64 + 32, mask=row_there[:, None], other=0)
        low, high = _look_up(byte, table, x.dtype.element_ty, IN_REGISTERS)
        summed = tl.dot(low, tl.trans(x_low))
        summed = tl.dot(high, tl.trans(x_high), summed)
        total += summed * scale[:, None]
        scale = next_scale
    if BIAS:
        total += tl.load(bias + n, mask=output_there, other=0).to(tl.float32)[:, None]
    y_at = y + (part.to(tl.int64) * rows + m[None, :]) * y_stride + n[:, None]
    tl.store(y_at, total.to(y.dtype.element_ty), mask=output_there[:, None] & row_there[None, :])


@triton.jit
def _dequantize(to, codes, scales, outputs, inputs, apart, OUTPUTS: tl.constexpr):
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    block = tl.program_id(1)
    j = tl.arange(0, 32)
    there = n < outputs
    wide = block.to(tl.int64) * apart
    byte = tl.load(codes + (wide + n[:, None]) * 32 + j[None, :], mask=there[:, None], other=0)
    scale = tl.load(scales + wide + n, mask=there, other=0)
    to_at = to + n[:, None].to(tl.int64) * inputs + block * 64 + j[None, :]
    tl.store(to_at, (_level(byte & 15) * scale[:, None]).to(to.dtype.element_ty), mask=there[:, None])
    tl.store(to_at + 32, (_level(byte >> 4) * scale[:, None]).to(to.dtype.element_ty), mask=there[:, None])
