"""Rotation and the way into the cache at an 8B model's shapes, and with norms and heads of other sizes."""

from __future__ import annotations

from typing import Any

from loramux_server.kernels.gpu.rotary import rotary_constants, rotate_kernel
from support.compiled_kernels import SMS, Compiled


def _compiled(name: str, qkv: str, heads: int, kv_heads: int, dim: int, pairs: int, norm: str) -> Compiled:
    constants: dict[str, Any] = rotary_constants(heads, kv_heads, dim, pairs=pairs, norm=norm)
    options = {"num_warps": constants.pop("num_warps")}
    angles, weights = "*fp32" if pairs else "*i32", "*fp32" if norm else "*i32"
    signature = {
        **{name: "*act" for name in ("q_out", "k_cache", "v_cache")},
        **{"qkv": qkv, "cos": angles, "sin": angles, "q_weight": weights, "k_weight": weights},
        **{"q_eps": "fp32", "k_eps": "fp32"},
        **{name: "*i32" for name in ("positions", "starts", "blocks", "counts")},
    }
    return Compiled(name, rotate_kernel, signature, constants, options, sms=SMS if name == "8B" else (75, 80))


COMPILED = [
    _compiled("8B", "*act", 32, 8, 128, 64, ""),
    _compiled("8B, fp32, a norm for each head", "*fp32", 32, 8, 128, 64, "head"),
    _compiled("norms over all heads, heads of 96, a part rotated", "*act", 16, 16, 96, 24, "all"),
    _compiled("heads of 256", "*act", 8, 4, 256, 128, "head"),
    _compiled("no rotation, heads of 64", "*act", 9, 3, 64, 0, ""),
]
