"""Products with weights of 16 bits: the output head.

Semantics, with x [rows, in] and w [out, in] in the activations' dtype:

    y[r, o] = sum over parts, in order, of sum over the part's inputs i, in order of blocks, of x[r, i] * w[o, i]

in fp32. The weight is the first operand of the tensor-core instruction, the rows the second; a part is added up in one
accumulator. As with NF4 weights, a program has two warps, so that all cards and all numbers of rows take the same
instruction in the same order (nf4.py), and the cut into parts depends on the weight's shape alone (split_sums.py).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from loramux_server.kernels.gpu.launch import Launch
from loramux_server.kernels.gpu.split_sums import (
    OUTPUTS_TOGETHER,
    ROW_TILES,
    add_parts,
    check_product,
    parts_of,
    row_tile,
)

_INPUTS = 32  # of one turn: more find no registers on cards without tensor-core products
_OPTIONS = {"num_warps": 2, "num_stages": 6, "maxnreg": 255}


def dense_product(
    launch: Launch,
    y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    scratch: torch.Tensor,
    *,
    row_tiles: tuple[int, ...] = ROW_TILES,
) -> None:
    """y [rows, out] of any float dtype = x [rows, in] @ weight.T, weight [out, in] of x's dtype.

    scratch: fp32, at least `split_sums.scratch_numbers` of them; written. x and y may be columns of wider tensors.
    row_tiles: ascending, `split_sums.row_tiles_of` the card or the first of them.
    """
    outputs, inputs = weight.shape
    check_product(y, x, inputs, outputs, scratch)
    assert weight.dtype == x.dtype and weight.is_contiguous(), (weight.dtype, x.dtype)
    rows = x.shape[0]
    if rows == 0:
        return
    parts, tile = parts_of(inputs, outputs), row_tile(rows, row_tiles)
    to, stride = (y, y.stride(0)) if parts == 1 else (scratch, outputs)
    launch(
        _product,
        (triton.cdiv(rows, tile), triton.cdiv(outputs, OUTPUTS_TOGETHER), parts),
        *(to, x, weight, rows, inputs, outputs, x.stride(0), stride),
        ROWS=tile,
        OUTPUTS=OUTPUTS_TOGETHER,
        INPUTS=_INPUTS,
        PARTS=parts,
        **_OPTIONS,
    )
    if parts > 1:
        add_parts(launch, y, scratch, parts)


def dense_product_reference(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    """`dense_product` in PyTorch."""
    y.copy_(x.float() @ weight.float().t())


@triton.jit(do_not_specialize=["rows"])
def _product(
    y,
    x,
    weight,
    rows,
    inputs,
    outputs,
    x_stride,
    y_stride,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """y [PARTS, rows, out]. Programs that read the same weights follow one another: the cache holds them by then."""
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    part = tl.program_id(2)
    k = tl.arange(0, INPUTS)
    row_there, output_there = m < rows, n < outputs
    each = ((inputs + 63) // 64 + PARTS - 1) // PARTS * 64
    first = part * each
    end = tl.minimum(first + each, inputs)
    weight_at = weight + n[:, None].to(tl.int64) * inputs + k[None, :]
    x_at = x + m[:, None].to(tl.int64) * x_stride + k[None, :]
    total = tl.zeros((OUTPUTS, ROWS), tl.float32)
    for start in range(first, end, INPUTS):
        input_there = start + k < inputs
        w = tl.load(weight_at + start, mask=output_there[:, None] & input_there[None, :], other=0)
        row = tl.load(x_at + start, mask=row_there[:, None] & input_there[None, :], other=0)
        total = tl.dot(w, tl.trans(row), total)
    y_at = y + (part.to(tl.int64) * rows + m[None, :]) * y_stride + n[:, None]
    tl.store(y_at, total.to(y.dtype.element_ty), mask=output_there[:, None] & row_there[None, :])
