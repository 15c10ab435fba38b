"""What the kernels of sampling.py are compiled with, for vocabularies of 128,256 and 262,144 tokens.

Those that sort and search take seconds to compile, so they are tried for the oldest and newest cards and for Hopper.
"""

from __future__ import annotations

from typing import Any

from loramux_server.kernels.gpu import sampling_kernels as kernels
from loramux_server.kernels.gpu.sampling import SamplingSizes, sampling_constants
from support.compiled_kernels import SMS, Compiled

_POINTERS = {
    **dict.fromkeys(("ints", "answer_ints", "sick", "states", "lists"), "*i32"),
    **dict.fromkeys(("floats", "answer_floats", "logits"), "*fp32"),
    **dict.fromkeys(("doubles", "answer_doubles"), "*fp64"),
    **dict.fromkeys(("tops", "keys", "masses", "counts"), "*i64"),
    **dict.fromkeys(("vocabulary", "stride", "tiles"), "i32"),
}


def _compiled(name: str, vocabulary: int, sms: tuple[int, ...]) -> Compiled:
    kernel: Any = getattr(kernels, name)
    constants: dict[str, Any] = dict(sampling_constants(SamplingSizes(1, vocabulary))[name])
    options = {"num_warps": constants.pop("num_warps")}
    signature = {argument: _POINTERS[argument] for argument in kernel.arg_names if argument not in constants}
    return Compiled(f"{name}, {vocabulary}", kernel, signature, constants, options, ("vocabulary", "stride"), sms)


COMPILED = [
    *(_compiled(name, 128_256, SMS) for name in ("weigh", "count")),
    *(_compiled(name, 128_256, (75, 90, 120)) for name in ("search", "finish", "settle")),
    _compiled("search", 262_144, (90,)),
]
