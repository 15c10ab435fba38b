"""What kernels/gpu/lora.py starts for a Llama of 8B: each stack of it, for few rows and for many."""

from __future__ import annotations

from typing import Any

from loramux_server.kernels.gpu import lora
from loramux_server.kernels.gpu.cuts import lora_parts_of
from support.compiled_kernels import SMS, Compiled

QKV, GATE_UP, INTO_HIDDEN, HEAD = (4096, 1024, 1024), (14336, 14336), (4096,), (128256,)  # outputs of layers
TARGETED = {f"targeted{i}": "*u8" for i in range(3)}
GAIN_AND_SHIFT, NONE = ({f"affine{i}": kind for i in range(3)} for kind in ("*fp32", "*u8"))
DIVISIBLE = ("x_row", "y_row", "units")
ALL, H100, T4 = tuple(sm for sm in SMS if sm >= 80), (90,), (75,)


def _shrink(name: str, inputs: int, layers: int, sms: tuple[int, ...], *, split: bool = True) -> Compiled:
    signature = {"h": "*fp32", "x": "*act", "x_row": "i32", **dict.fromkeys(("a0", "a1", "a2"), "*bf16"), **TARGETED}
    signature |= dict.fromkeys(("counts", "blocks", "tiles"), "*i32") | {"units": "i32"}
    length, parts = lora_parts_of(inputs)
    step = min(lora.STEP.values()) if sms == T4 else max(lora.STEP.values())
    constants = {"INPUTS": inputs, "TARGETS": layers, "PARTS": parts, "LENGTH": length, "STEP": step}
    constants["STORED"] = parts if split else 1
    return Compiled(f"shrink {name}", lora.shrink_kernel, signature, constants, lora.SHRINK_OPTIONS, DIVISIBLE, sms)


def _expand(
    name: str,
    inputs: int,
    outs: tuple[int, ...],
    sms: tuple[int, ...],
    *,
    split: bool = True,
    y: str = "*fp32",
    affine: bool = False,
) -> Compiled:
    signature = {"y": y, "y_row": "i32", "h": "*fp32", **dict.fromkeys(("bt0", "bt1", "bt2"), "*bf16"), **TARGETED}
    signature |= GAIN_AND_SHIFT if affine else NONE
    signature |= dict.fromkeys(("counts", "blocks", "entries"), "*i32") | {"units": "i32"}
    constants: dict[str, Any] = {f"OUT{i}": out for i, out in enumerate((*outs, 0, 0)[:3])}
    constants |= {f"COLUMN{i}": sum(outs[:i]) if i < len(outs) else 0 for i in range(3)}
    constants |= {"TARGETS": len(outs), "STORED": lora_parts_of(inputs)[1] if split else 1, "WIDTH": lora.WIDTH}
    constants |= {"HALVES": sms != T4, "AFFINE": affine}
    return Compiled(f"expand {name}", lora.expand_kernel, signature, constants, lora.EXPAND_OPTIONS, DIVISIBLE, sms)


COMPILED = [
    _shrink("qkv", 4096, 3, ALL),
    _shrink("qkv, many rows", 4096, 3, ALL, split=False),
    _shrink("gate, up", 4096, 2, H100),
    _shrink("down", 14336, 1, ALL),
    _shrink("o or head", 4096, 1, H100),
    _shrink("qkv in fp16", 4096, 3, T4),
    _shrink("down in fp16", 14336, 1, T4),
    _expand("qkv", 4096, QKV, ALL),
    _expand("qkv into act", 4096, QKV, H100, y="*act"),
    _expand("qkv, many rows", 4096, QKV, H100, split=False),
    _expand("gate, up", 4096, GATE_UP, ALL, y="*act"),
    _expand("o", 4096, INTO_HIDDEN, H100),
    _expand("down", 14336, INTO_HIDDEN, ALL),
    _expand("head", 4096, HEAD, ALL),
    _expand("qkv with gain and shift", 4096, QKV, ALL, affine=True),
    _expand("gate, up with gain and shift", 4096, GATE_UP, H100, y="*act", affine=True),
    _expand("head with gain and shift", 4096, HEAD, ALL, affine=True),
    _expand("qkv in fp16", 4096, QKV, T4),
    _expand("qkv in fp16 with gain and shift", 4096, QKV, T4, affine=True),
    _expand("gate, up in fp16", 4096, GATE_UP, T4, y="*act"),
    _expand("down in fp16", 14336, INTO_HIDDEN, T4),
]
