"""The C ABI of the compiled kernels (csrc/kernels.h), declared for ctypes and compared with the library's own.

The library describes its structures and functions in words that it takes from its C++ types (csrc/abi.cpp). It is used
only if every line of them is what is declared here, so a library that was built from other sources is never called.

It is no Python extension: a compiler for C++ is all that building it takes, one file serves every version of Python,
and it can be compiled for another processor and driven without Python. A call through ctypes takes some 0.7 us, through
an extension 0.1; a compiled step is one call, and a step module by module some 500.
"""

from __future__ import annotations

import ctypes
from enum import IntEnum
from typing import Any

VERSION = 1  # kAbiVersion in csrc/kernels.h; goes up where a meaning changes and no form does

POINTER, SIZE, INT, FLOAT, DOUBLE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float, ctypes.c_double
_KINDS = {None: "v", POINTER: "p", SIZE: "l", INT: "i", FLOAT: "f", DOUBLE: "d"}


class Isa(IntEnum):
    """An instruction set that kernels have a path for (csrc/cpu.h)."""

    PORTABLE = 0
    AVX512_BF16 = 1

    @property
    def label(self) -> str:
        """As reports and the numerics id name it."""
        return {Isa.PORTABLE: "portable", Isa.AVX512_BF16: "AVX512-BF16"}[self]


class VectorIsa(IntEnum):
    """An instruction set that the kernels of exact integers are compiled for (csrc/exact/exact.h)."""

    PORTABLE = 0
    AVX2 = 1
    AVX_VNNI = 2
    AVX512 = 3
    AVX512_VNNI = 4
    NEON = 5


class LoraArena(ctypes.Structure):
    _fields_ = [("a", POINTER), ("bt", POINTER), ("targeted", POINTER), ("inputs", SIZE), ("outputs", SIZE)]


class LoraEntries(ctypes.Structure):
    _fields_ = [("first", POINTER), ("offset", POINTER), ("rank", POINTER), ("scale", POINTER), ("count", SIZE)]


class SlotWeights(ctypes.Structure):
    _fields_ = [("a", POINTER), ("bt", POINTER), ("rank", SIZE)]


class FilePair(ctypes.Structure):
    _fields_ = [
        *((name, SIZE) for name in ("a_offset", "a_kind", "b_offset", "b_kind")),
        *((name, SIZE) for name in ("rank", "inputs", "outputs")),
    ]


class DecoderLinear(ctypes.Structure):
    _fields_ = [
        *((name, POINTER) for name in ("codes", "scales", "levels", "bias")),
        ("arena", LoraArena),
        *((name, SIZE) for name in ("inputs", "outputs")),
    ]


class DecoderNorm(ctypes.Structure):
    _fields_ = [("weight", POINTER), ("eps", DOUBLE)]


class DecoderLayer(ctypes.Structure):
    _fields_ = [
        *((name, DecoderNorm) for name in ("before_attention", "q_norm", "k_norm", "before_mlp")),
        *((name, DecoderLinear) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((name, DOUBLE) for name in ("scaling", "softcap")),
        ("window", SIZE),
    ]


class DecoderModel(ctypes.Structure):
    _fields_ = [
        *((name, POINTER) for name in ("layers", "embedding", "head")),
        ("head_arena", LoraArena),
        ("norm", DecoderNorm),
        *((name, SIZE) for name in ("num_layers", "hidden", "heads", "kv_heads", "head_dim", "vocabulary")),
    ]


class DecoderStep(ctypes.Structure):
    _fields_ = [
        *((name, POINTER) for name in ("tokens", "position", "sequence", "tables", "sampled", "cos", "sin")),
        *((name, POINTER) for name in ("k_cache", "v_cache", "lora", "head_lora", "scratch", "logits")),
        *((name, SIZE) for name in ("rows", "samples", "table_width", "threads")),
    ]


class ExactLinear(ctypes.Structure):
    _fields_ = [
        *((name, POINTER) for name in ("codes", "scales", "bias")),
        ("arena", LoraArena),
        *((name, SIZE) for name in ("inputs", "outputs")),
    ]


class ExactNorm(ctypes.Structure):
    _fields_ = [("weight", POINTER), ("eps", DOUBLE)]


class ExactLayer(ctypes.Structure):
    _fields_ = [
        *((name, ExactNorm) for name in ("before_attention", "q_norm", "k_norm", "after_attention")),
        *((name, ExactNorm) for name in ("before_mlp", "after_mlp")),
        *((name, ExactLinear) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((name, SIZE) for name in ("whole_norms", "rotary", "window", "gelu")),
        *((name, DOUBLE) for name in ("scaling", "softcap")),
    ]


class ExactModel(ctypes.Structure):
    _fields_ = [
        *((name, POINTER) for name in ("layers", "embedding", "head", "head_scales")),
        ("head_arena", LoraArena),
        ("norm", ExactNorm),
        *((name, SIZE) for name in ("num_layers", "hidden", "heads", "kv_heads", "head_dim", "rotary_pairs")),
        *((name, SIZE) for name in ("vocabulary", "padded_vocabulary")),
        *((name, DOUBLE) for name in ("embedding_factor", "residual_factor", "logit_factor", "logit_softcap")),
    ]


class ExactStep(ctypes.Structure):
    _fields_ = [
        *((name, POINTER) for name in ("tokens", "position", "sequence", "tables", "sampled", "cos", "sin")),
        *((name, POINTER) for name in ("k_cache", "v_cache", "kv_scales", "lora", "head_lora", "scratch", "logits")),
        *((name, SIZE) for name in ("rows", "samples", "table_width", "threads")),
    ]


STRUCTURES: tuple[type[ctypes.Structure], ...] = (
    *(LoraArena, LoraEntries, SlotWeights, FilePair),
    *(DecoderLinear, DecoderNorm, DecoderLayer, DecoderModel, DecoderStep),
    *(ExactLinear, ExactNorm, ExactLayer, ExactModel, ExactStep),
)

_TENSORS = [POINTER, *[POINTER, SIZE, SIZE] * 3]  # out; q, k, v with two strides each

# name -> (what it returns, what it takes); csrc/kernels.h names the parameters
FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "loramux_best_isa": (INT, []),
    "loramux_run_pieces": (None, [POINTER, POINTER, SIZE, INT]),
    "loramux_nf4_linear": (None, [POINTER] * 5 + [SIZE] * 3 + [POINTER, SIZE, INT]),
    "loramux_add_lora": (None, [POINTER] * 4 + [INT] * 2),
    "loramux_attention": (
        None,
        [*_TENSORS, *[POINTER] * 3, SIZE, *[POINTER] * 2, *[SIZE] * 4, FLOAT, FLOAT, SIZE, INT, INT],
    ),
    "loramux_head": (None, [POINTER] * 3 + [SIZE] * 3 + [INT]),
    "loramux_rms_norm": (None, [POINTER] * 3 + [SIZE] * 2 + [FLOAT, INT]),
    "loramux_silu_mul": (None, [POINTER] * 3 + [SIZE] * 2 + [INT]),
    "loramux_argmax": (None, [POINTER] * 3 + [SIZE] * 2 + [INT]),
    "loramux_decoder_scratch": (SIZE, [POINTER, SIZE]),
    "loramux_decoder_step": (None, [POINTER] * 2),
    "loramux_convert_pairs": (None, [POINTER] * 5 + [SIZE]),
    "loramux_copy_slot": (None, [POINTER] * 2 + [SIZE] * 3),
    "loramux_exact_isas": (INT, []),
    "loramux_exact_product": (None, [POINTER] * 4 + [SIZE] * 3 + [INT] * 2),
    "loramux_exact_pack_head": (None, [POINTER] * 3 + [SIZE] * 3 + [INT] * 2),
    "loramux_exact_scratch": (SIZE, [POINTER, SIZE]),
    "loramux_exact_step": (None, [POINTER] * 2 + [INT]),
}


def declared() -> list[str]:
    """What is declared here, in the library's words."""
    lines = [f"version {VERSION}"]
    for structure in STRUCTURES:
        members = [(name, getattr(structure, name)) for name, *_ in structure._fields_]
        fields = " ".join(f"{name}:{member.offset}:{member.size}" for name, member in members)
        lines.append(f"struct {structure.__name__} {ctypes.sizeof(structure)} {fields}")
    for name, (result, arguments) in FUNCTIONS.items():
        lines.append(f"function {name} {''.join(_KINDS[kind] for kind in (result, *arguments))}")
    return lines


def difference(described: str) -> str | None:
    """What a library that describes itself so has otherwise than declared here, in a few words; None if nothing."""
    ours, its = set(declared()), set(described.split("\n")) - {""}
    if ours == its:
        return None
    parts = sorted({" ".join(line.split(" ")[: 1 if line.startswith("version") else 2]) for line in ours ^ its})
    return ", ".join(parts)
