"""Sums over inputs that are cut into a fixed number of parts, so that a product with few outputs still fills a device.

Semantics: part z of a product adds up its own inputs; then y = parts[0] + parts[1] + ... (+ bias), in this order, in
fp32. The cut depends on the weight's shape alone, never on the number of rows nor on the device, so a row has the same
bits whatever it is computed with.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from loramux_server.kernels.gpu.cuts import OUTPUTS_TOGETHER as OUTPUTS_TOGETHER
from loramux_server.kernels.gpu.cuts import parts_of as parts_of
from loramux_server.kernels.gpu.cuts import scratch_numbers as scratch_numbers
from loramux_server.kernels.gpu.launch import Launch

ROW_TILES = (8, 16, 32, 64)  # of one program; the start check may leave the later ones out
_COLUMNS = 1024  # of one program that adds parts up


def has_tensor_cores(capability: tuple[int, int]) -> bool:
    """Whether Triton's products run on tensor cores: from Ampere on. (0, 0), its interpreter, does as if."""
    return capability == (0, 0) or capability >= (8, 0)


def row_tiles_of(capability: tuple[int, int]) -> tuple[int, ...]:
    """`ROW_TILES` for a card: without tensor cores, more rows find no registers."""
    return ROW_TILES if has_tensor_cores(capability) else ROW_TILES[:1]


def row_tile(rows: int, tiles: tuple[int, ...]) -> int:
    """The smallest of the ascending `tiles` that holds `rows`, or the largest: several programs then share the rows."""
    return next((tile for tile in tiles if tile >= rows), tiles[-1])


def add_parts(
    launch: Launch, y: torch.Tensor, scratch: torch.Tensor, parts: int, *, bias: torch.Tensor | None = None
) -> None:
    """y [rows, out] = sum over parts of scratch [parts, rows, out] fp32, + bias [out]."""
    rows, outputs = y.shape
    launch(
        _add_parts,
        (triton.cdiv(outputs, _COLUMNS), rows),
        *(y, scratch, y if bias is None else bias, rows, outputs, y.stride(0)),
        PARTS=parts,
        BIAS=bias is not None,
        COLUMNS=_COLUMNS,
        num_warps=4,
    )


def check_product(y: torch.Tensor, x: torch.Tensor, inputs: int, outputs: int, scratch: torch.Tensor) -> None:
    """Our own invariants: shapes, rows that lie in one piece, and scratch that is large enough."""
    rows = x.shape[0]
    assert x.shape == (rows, inputs) and y.shape == (rows, outputs), (x.shape, y.shape, inputs, outputs)
    assert x.stride(1) == 1 and y.stride(1) == 1, (x.stride(), y.stride())
    needed = scratch_numbers(rows, inputs, outputs)
    assert scratch.dtype == torch.float32 and scratch.is_contiguous() and scratch.numel() >= needed, needed


@triton.jit(do_not_specialize=["rows"])
def _add_parts(
    y,
    scratch,
    bias,
    rows,
    outputs,
    y_stride,
    PARTS: tl.constexpr,
    BIAS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1).to(tl.int64)
    there = n < outputs
    total = tl.load(scratch + row * outputs + n, mask=there, other=0)
    for part in tl.static_range(1, PARTS):
        total += tl.load(scratch + (row + part * rows.to(tl.int64)) * outputs + n, mask=there, other=0)
    if BIAS:
        total += tl.load(bias + n, mask=there, other=0).to(tl.float32)
    tl.store(y + row * y_stride + n, total.to(y.dtype.element_ty), mask=there)
