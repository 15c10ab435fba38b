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

VERSION = 5  # kAbiVersion in csrc/kernels.h; goes up where a meaning changes and no form does

POINTER, SIZE, INT, FLOAT, DOUBLE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float, ctypes.c_double
_KINDS = {None: "v", POINTER: "p", SIZE: "l", INT: "i", FLOAT: "f", DOUBLE: "d"}


class VectorIsa(IntEnum):
    """An instruction set that the kernels of exact integers are compiled for (csrc/exact/exact.h)."""

    PORTABLE = 0
    AVX2 = 1
    AVX_VNNI = 2
    AVX512 = 3
    AVX512_VNNI = 4
    NEON = 5

    @property
    def label(self) -> str:
        """As reports, settings and the names of kernel sets have it: "avx512-vnni"."""
        return self.name.lower().replace("_", "-")


class LoraArena(ctypes.Structure):
    _fields_ = [
        *((name, POINTER) for name in ("a", "bt", "targeted", "affine")),
        *((name, SIZE) for name in ("inputs", "outputs")),
    ]


class LoraEntries(ctypes.Structure):
    _fields_ = [("first", POINTER), ("offset", POINTER), ("rank", POINTER), ("scale", POINTER), ("count", SIZE)]


class SlotWeights(ctypes.Structure):
    _fields_ = [("a", POINTER), ("bt", POINTER), ("affine", POINTER), ("rank", SIZE)]


class FilePair(ctypes.Structure):
    _fields_ = [
        *((name, SIZE) for name in ("a_offset", "a_kind", "b_offset", "b_kind")),
        *((name, SIZE) for name in ("rank", "inputs", "outputs")),
    ]


class ExactLinear(ctypes.Structure):
    _fields_ = [
        *((name, POINTER) for name in ("codes", "scales", "bias")),
        ("arena", LoraArena),
        *((name, SIZE) for name in ("inputs", "outputs")),
    ]


class TokenDraw(ctypes.Structure):
    _fields_ = [
        *((name, DOUBLE) for name in ("temperature", "top_p", "min_p", "uniform")),
        *((name, SIZE) for name in ("row", "top_k")),
    ]


class LogitEdit(ctypes.Structure):
    _fields_ = [*((name, INT) for name in ("token", "repeated")), *((name, FLOAT) for name in ("add", "less"))]


class LogitChange(ctypes.Structure):
    _fields_ = [
        *((name, POINTER) for name in ("edits", "forbidden", "allowed")),
        *((name, SIZE) for name in ("num_edits", "num_forbidden", "row")),
        ("repetition", DOUBLE),
    ]


class ExactNorm(ctypes.Structure):
    _fields_ = [("weight", POINTER), ("eps", DOUBLE)]


class ExactExperts(ctypes.Structure):
    _fields_ = [
        ("layers", POINTER),
        *((name, SIZE) for name in ("count", "outer", "inner", "chosen", "gelu")),
        *((name, DOUBLE) for name in ("alpha", "limit", "above")),
    ]


class ExactRouter(ctypes.Structure):
    _fields_ = [
        *((name, POINTER) for name in ("weight", "scales", "bias")),
        *((name, SIZE) for name in ("padded", "normalized")),
    ]


class ExactLayer(ctypes.Structure):
    _fields_ = [
        *((name, ExactNorm) for name in ("before_attention", "q_norm", "k_norm", "after_attention")),
        *((name, ExactNorm) for name in ("before_mlp", "after_mlp")),
        *((name, ExactLinear) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        ("experts", ExactExperts),
        ("router", ExactRouter),
        ("sinks", POINTER),
        *((name, SIZE) for name in ("whole_norms", "rotary", "window", "gelu")),
        *((name, DOUBLE) for name in ("scaling", "softcap", "clip")),
    ]


class ExactModel(ctypes.Structure):
    _fields_ = [
        *((name, POINTER) for name in ("layers", "embedding", "head", "head_scales")),
        ("head_arena", LoraArena),
        ("norm", ExactNorm),
        *((name, SIZE) for name in ("num_layers", "hidden", "heads", "kv_heads", "head_dim", "rotary_pairs")),
        *((name, SIZE) for name in ("vocabulary", "padded_vocabulary")),
        *((name, DOUBLE) for name in ("embedding_factor", "residual_factor", "logit_divisor", "logit_softcap")),
    ]


class TokenLogits(ctypes.Structure):
    _fields_ = [
        *((name, POINTER) for name in ("tokens", "rows", "at", "scales")),
        *((name, SIZE) for name in ("count", "uses")),
    ]


class ExactStep(ctypes.Structure):
    _fields_ = [
        *((name, POINTER) for name in ("tokens", "position", "sequence", "tables", "sampled", "cos", "sin")),
        *((name, POINTER) for name in ("k_cache", "v_cache", "kv_scales", "lora", "head_lora", "scratch", "logits")),
        *((name, POINTER) for name in ("first_tokens", "states", "own_embeddings", "own_embedding_of")),
        *((name, POINTER) for name in ("token_logits", "wide")),
        *((name, SIZE) for name in ("num_token_logits", "num_wide")),
        *((name, SIZE) for name in ("rows", "samples", "states_only", "table_width", "threads")),
    ]


class TrainingRows(ctypes.Structure):
    _fields_ = [
        *((name, POINTER) for name in ("start", "length", "first")),
        *((name, SIZE) for name in ("count", "shared")),
    ]


class TrainingHeads(ctypes.Structure):
    _fields_ = [
        *((name, SIZE) for name in ("heads", "kv_heads", "dim", "window")),
        *((name, DOUBLE) for name in ("scaling", "softcap")),
    ]


class FloatMatrix(ctypes.Structure):
    _fields_ = [("numbers", POINTER), ("row", SIZE), ("column", SIZE)]


STRUCTURES: tuple[type[ctypes.Structure], ...] = (
    *(LoraArena, LoraEntries, SlotWeights, FilePair),
    *(ExactLinear, TokenDraw, LogitEdit, LogitChange),
    *(ExactNorm, ExactExperts, ExactRouter, ExactLayer, ExactModel, TokenLogits, ExactStep),
    *(TrainingRows, TrainingHeads, FloatMatrix),
)

# name -> (what it returns, what it takes); csrc/kernels.h names the parameters
FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "loramux_run_pieces": (None, [POINTER, POINTER, SIZE, INT]),
    "loramux_convert_pairs": (None, [POINTER] * 5 + [SIZE]),
    "loramux_copy_slot": (None, [POINTER] * 2 + [SIZE] * 3),
    "loramux_nf4_quantize": (None, [POINTER] * 4 + [SIZE] * 2 + [INT]),
    "loramux_nf4_scales": (None, [POINTER] * 4 + [SIZE, INT]),
    "loramux_nf4_squares": (None, [POINTER] * 3 + [SIZE] * 2 + [INT]),
    "loramux_exact_isas": (INT, []),
    "loramux_exact_product": (None, [POINTER] * 4 + [SIZE] * 3 + [INT] * 2),
    "loramux_exact_search": (None, [POINTER] * 3 + [SIZE] * 3 + [INT] * 2),
    "loramux_exact_log_sums": (None, [POINTER] * 3 + [SIZE] * 3 + [INT] * 2),
    "loramux_exact_first_tokens": (None, [POINTER, SIZE, POINTER, POINTER] + [SIZE] * 3 + [INT] * 2),
    "loramux_exact_draw": (None, [POINTER] * 3 + [SIZE] * 3 + [INT] * 2),
    "loramux_exact_change": (None, [POINTER, SIZE, POINTER, POINTER] + [SIZE] * 3 + [INT] * 2),
    "loramux_exact_dense": (None, [POINTER] * 4 + [SIZE] * 3 + [INT] * 2),
    "loramux_exact_pack_head": (None, [POINTER] * 3 + [SIZE] * 3 + [INT] * 2),
    "loramux_exact_rms_norm": (None, [POINTER] * 3 + [SIZE] * 2 + [FLOAT] + [INT] * 2),
    "loramux_exact_gate": (None, [POINTER] * 3 + [SIZE] * 3 + [INT] * 3),
    "loramux_exact_softmax": (None, [POINTER] * 2 + [SIZE] * 2 + [INT] * 2),
    "loramux_exact_attention": (
        None,
        [
            POINTER,
            *[POINTER, SIZE] * 3,
            *[POINTER] * 4,
            SIZE,
            *[POINTER] * 2,
            *[SIZE] * 4,
            FLOAT,
            FLOAT,
            SIZE,
            POINTER,
            INT,
            INT,
        ],
    ),
    "loramux_exact_add_lora": (None, [POINTER, SIZE, *[POINTER] * 3, INT, INT]),
    "loramux_exact_experts": (None, [POINTER] * 6 + [SIZE, INT, INT]),
    "loramux_exact_token_logits": (None, [POINTER, SIZE, POINTER, SIZE, POINTER, POINTER, SIZE, SIZE, INT, INT]),
    "loramux_exact_scratch": (SIZE, [POINTER, SIZE]),
    "loramux_exact_step": (None, [POINTER] * 2 + [INT]),
    "loramux_exact_angles": (None, [POINTER] * 3 + [SIZE] * 3 + [DOUBLE]),
    "loramux_exact_product_transposed": (None, [POINTER] * 4 + [SIZE] * 3 + [INT] * 2),
    "loramux_exact_dense_transposed": (None, [POINTER] * 4 + [SIZE] * 3 + [INT] * 2),
    "loramux_exact_matmul": (None, [POINTER, SIZE, POINTER, POINTER] + [SIZE] * 3 + [INT] * 3),
    "loramux_exact_norm_gradient": (None, [POINTER] * 4 + [SIZE] * 2 + [FLOAT, INT, INT]),
    "loramux_exact_activation": (None, [POINTER] * 3 + [SIZE] + [INT] * 3),
    "loramux_exact_gate_gradient": (None, [POINTER] * 5 + [SIZE] + [INT] * 3),
    "loramux_exact_loss": (None, [POINTER] * 4 + [SIZE] * 3 + [FLOAT] * 2 + [INT] * 3),
    "loramux_exact_attend": (None, [POINTER] * 7 + [INT] * 2),
    "loramux_exact_attend_gradient": (None, [POINTER] * 12 + [INT] * 2),
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
