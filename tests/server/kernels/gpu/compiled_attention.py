"""The attention kernels at an 8B model's shapes, and at those of other head sizes."""

from __future__ import annotations

from typing import Any

import torch

from loramux_server.kernels.attention.paged_attention import AttentionParams
from loramux_server.kernels.gpu.attention import attend_constants, attend_kernel, combine_constants, combine_kernel
from loramux_server.kernels.gpu.attention_tables import AttentionSizes
from support.compiled_kernels import SMS, Compiled

_ATTEND = {
    **{name: "*act" for name in ("out", "q", "k_cache", "v_cache")},
    **{name: "*fp32" for name in ("part_values", "part_states")},
    **{name: "*i32" for name in ("positions", "starts", "blocks", "items", "counts")},
    **{"sinks": "*fp32", "scale": "fp32", "cap": "fp32", "window": "i32"},
}
_COMBINE = {
    **{name: _ATTEND[name] for name in ("out", "part_values", "part_states", "counts", "sinks", "window")},
    "combined": "*i32",
}


_FEW = (75, 80)  # of heads of other sizes: the cards on which they need the most registers


def _compiled(
    name: str, kv_heads: int, group: int, dim: int, params: AttentionParams, sms: tuple[int, ...] = _FEW
) -> list[Compiled]:
    sinks = {} if params.sinks is None else {"sinks": "*act"}
    with_cores, without = tuple(sm for sm in sms if sm >= 80), tuple(sm for sm in sms if sm < 80)
    sizes = AttentionSizes(256, 256, 2048, group, dim)
    plain = AttentionSizes(256, 256, 2048, group, dim, tensor_cores=False)
    found = []
    for of, large, its in ((sizes, False, with_cores), (sizes, True, with_cores), (plain, False, without)):
        constants = attend_constants(of, kv_heads, params, large=large)
        label = f"attend, {name}, tiles of {constants['TILE']}"
        found.append(Compiled(label, attend_kernel, _ATTEND | sinks, *_options(constants), sms=its))
    constants = combine_constants(sizes, kv_heads * group, params)
    return [*found, Compiled(f"combine, {name}", combine_kernel, _COMBINE | sinks, *_options(constants), sms=sms)]


def _options(constants: dict[str, Any]) -> tuple[dict[str, Any], dict[str, int]]:
    """Constants and options, as `Compiled` takes them."""
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants}
    return constants, options


COMPILED = [
    *_compiled("8B", 8, 4, 128, AttentionParams(128**-0.5), SMS),
    *_compiled("heads of 64, groups of 3", 3, 3, 64, AttentionParams(64**-0.5)),
    *_compiled("heads of 96, window", 4, 8, 96, AttentionParams(96**-0.5, window=4096)),
    *_compiled("heads of 64, window and sinks", 8, 8, 64, AttentionParams(0.125, window=128, sinks=torch.ones(64))),
    *_compiled("heads of 128, chunks", 8, 4, 128, AttentionParams(128**-0.5, chunk=8192)),
    *_compiled("heads of 256, window and cap", 4, 2, 256, AttentionParams(256**-0.5, softcap=50.0, window=4096)),
]
