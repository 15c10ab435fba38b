"""What the kernels of changes.py are compiled with, for a vocabulary of 128,256 tokens."""

from __future__ import annotations

from loramux_server.kernels.gpu import changes
from support.compiled_kernels import Compiled

_ROWS = {"changed": "*fp32", "logits": "*fp32", "rows": "*i32"}
_SHAPE = {"vocabulary": "i32", "stride": "i32"}

COMPILED = [
    Compiled(
        "rows by their bits",
        changes._allow,
        {**_ROWS, "bits": "*i32", **_SHAPE, "words": "i32"},
        {"TILE": changes.TILE},
        {},
        ("vocabulary", "stride"),
    ),
    Compiled(
        "edits",
        changes._edit,
        {**_ROWS, "ints": "*i32", "floats": "*fp32", "edits": "i32", **_SHAPE},
        {"BLOCK": changes.BLOCK},
        {},
        ("vocabulary", "stride"),
    ),
    Compiled(
        "tokens chosen from changed rows",
        changes._adopt,
        {
            **dict.fromkeys(("places", "rows", "own", "asks", "answer_ints"), "*i32"),
            **{"answer_floats": "*fp32", "answer_doubles": "*fp64", "logits": "*fp32", "stride": "i32"},
        },
        {},
        {"num_warps": 1},
        ("stride",),
    ),
]
