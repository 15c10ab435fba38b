"""The output head at the shapes of an 8B model: 128,256 outputs of 4,096 inputs."""

from __future__ import annotations

from loramux_server.kernels.gpu import dense, split_sums
from support.compiled_kernels import AMPERE_ON, SMS, Compiled

_SIGNATURE = {
    **{"y": "*fp32", "x": "*act", "weight": "*act"},
    **{name: "i32" for name in ("rows", "inputs", "outputs", "x_stride", "y_stride")},
}

COMPILED = [
    Compiled(
        f"head, {rows} rows",
        dense._product,
        _SIGNATURE,
        {"ROWS": rows, "OUTPUTS": split_sums.OUTPUTS_TOGETHER, "INPUTS": dense._INPUTS, "PARTS": 1},
        dense._OPTIONS,
        ("inputs", "outputs", "x_stride", "y_stride"),
        SMS if rows in split_sums.row_tiles_of((7, 5)) else AMPERE_ON,
    )
    for rows in split_sums.ROW_TILES
]
