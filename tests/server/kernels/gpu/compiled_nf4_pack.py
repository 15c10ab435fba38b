"""What lays NF4 weights out, at the shapes of an 8B model."""

from __future__ import annotations

from loramux_server.kernels.gpu.loading import nf4_pack
from support.compiled_kernels import Compiled

_NUMBERS = {name: "i32" for name in ("outputs", "inputs", "apart")}
_DIVISIBLE = ("inputs", "apart")
_CONSTANTS = {"OUTPUTS": nf4_pack._OUTPUTS}

COMPILED = [
    Compiled(
        "quantize",
        nf4_pack._quantize,
        {"codes": "*u8", "largest": "*fp32", "weight": "*i16", **_NUMBERS},
        _CONSTANTS,
        {"num_warps": 4},
        _DIVISIBLE,
    ),
    Compiled(
        "repack",
        nf4_pack._repack,
        {"codes": "*u8", "pairs": "*u8", **_NUMBERS},
        _CONSTANTS,
        {"num_warps": 4},
        _DIVISIBLE,
    ),
]
