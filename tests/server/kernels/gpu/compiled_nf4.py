"""NF4 products at the shapes of an 8B model, and what undoes NF4."""

from __future__ import annotations

from loramux_server.kernels.gpu import nf4, split_sums
from support.compiled_kernels import AMPERE_ON, SMS, Compiled

_POINTERS = {"y": "*fp32", "x": "*act", "codes": "*u8", "scales": "*fp32", "bias": "*act"}
_NUMBERS = {name: "i32" for name in ("rows", "blocks", "outputs", "apart", "x_stride", "y_stride")}


def _product(name: str, rows: int, parts: int, *, to: str = "*fp32", bias: bool = False) -> Compiled:
    constants = {"ROWS": rows, "OUTPUTS": split_sums.OUTPUTS_TOGETHER, "PARTS": parts, "BIAS": bias}
    return Compiled(
        name,
        nf4._product,
        {**_POINTERS, **_NUMBERS, "y": to},
        {**constants, "IN_REGISTERS": True},
        nf4._OPTIONS,
        ("outputs", "apart", "x_stride", "y_stride"),
        SMS if rows in split_sums.row_tiles_of((7, 5)) else AMPERE_ON,
    )


COMPILED = [
    *(_product(f"product in parts, {rows} rows", rows, 8) for rows in split_sums.ROW_TILES),
    *(
        _product(f"product at once with bias, {rows} rows", rows, 1, to="*act", bias=True)
        for rows in split_sums.ROW_TILES
    ),
    Compiled(
        "parts added up",
        split_sums._add_parts,
        {"y": "*act", "scratch": "*fp32", "bias": "*act", "rows": "i32", "outputs": "i32", "y_stride": "i32"},
        {"PARTS": 8, "BIAS": True, "COLUMNS": split_sums._COLUMNS},
        {"num_warps": 4},
        ("outputs", "y_stride"),
    ),
    Compiled(
        "dequantize",
        nf4._dequantize,
        {"to": "*act", "codes": "*u8", "scales": "*fp32", "outputs": "i32", "inputs": "i32", "apart": "i32"},
        {"OUTPUTS": split_sums.OUTPUTS_TOGETHER},
        {"num_warps": 4},
        ("outputs", "inputs", "apart"),
    ),
]
