"""What the kernels of rows.py are compiled with: an 8B model's shapes, and the widest rows."""

from __future__ import annotations

from loramux_server.kernels.gpu import rows
from support.compiled_kernels import Compiled

_NORM = {"n": "*act", "x": "*fp32", "part": "*fp32", "weight": "*fp32", "after": "*fp32", "hidden": "i32"}
_NUMBERS = {"eps": "fp32", "after_eps": "fp32", "factor": "fp32"}


def _norm(name: str, hidden: int, add: bool, norm: bool, after: bool) -> Compiled:
    constants = rows.add_norm_constants(hidden, add, norm, after)
    options = {"num_warps": constants.pop("num_warps")}
    signature = {**_NORM, **_NUMBERS}
    return Compiled(f"{name}, {hidden}", rows._add_norm, signature, dict(constants), options, ("hidden",))


COMPILED = [
    _norm("sum and norm", 4096, True, True, False),
    _norm("norm of the part, sum and norm", 4096, True, True, True),
    _norm("norm of the part, sum and norm", 5376, True, True, True),
    _norm("norm of the part, sum and norm", 16384, True, True, True),
    Compiled(
        "tokens of the step before",
        rows._resolve_tokens,
        {"to": "*i32", "tokens": "*i32", "chosen": "*i32", "rows": "i32", "stride": "i32"},
        {"PIECE": 128},
        {},
        (),
    ),
    Compiled(
        "embedding",
        rows._embed,
        {"x": "*fp32", "tokens": "*i32", "embedding": "*act", "hidden": "i32", "factor": "fp32"},
        {"PIECE": 1024},
        {},
        ("hidden",),
    ),
    Compiled(
        "embeddings of adapters",
        rows._own_embeddings,
        {
            **{"x": "*fp32", "at": "*i32", "known": "*i32", "more": "*fp32", "tokens": "*i32", "embedding": "*act"},
            **{"hidden": "i32", "factor": "fp32"},
        },
        {"PIECE": 1024},
        {},
        ("hidden",),
    ),
    Compiled(
        "logits of adapters",
        rows._own_logits,
        {
            **{"logits": "*fp32", "wide": "*fp32", "products": "*fp32", "tokens": "*i32", "at": "*i32"},
            **{"factors": "*fp32", "count": "i32", "vocabulary": "i32", "stride": "i32", "wide_stride": "i32"},
        },
        {"PIECE": 1024},
        {},
        (),
    ),
    Compiled(
        "sampled rows",
        rows._gather_rows,
        {"to": "*fp32", "x": "*fp32", "rows": "*i32", "width": "i32"},
        {"PIECE": 1024},
        {},
        ("width",),
    ),
    *(
        Compiled(
            f"gate, {'GELU' if gelu else 'SiLU'}",
            rows._gate,
            {"out": "*act", "gate_up": "*fp32", "inner": "i32"},
            {"GELU": gelu, "PIECE": 1024},
            {},
            ("inner",),
        )
        for gelu in (False, True)
    ),
    Compiled(
        "bias",
        rows._add_bias,
        {"y": "*fp32", "bias": "*act", "outputs": "i32"},
        {"PIECE": 1024},
        {},
        ("outputs",),
    ),
    Compiled(
        "factors of logits",
        rows._finish_logits,
        {"logits": "*fp32", "vocabulary": "i32", "stride": "i32", "divisor": "fp32", "softcap": "fp32"},
        {"CAPPED": True, "PIECE": 1024},
        {},
        ("vocabulary", "stride"),
    ),
]
