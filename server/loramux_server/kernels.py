"""The compiled CPU kernels of this package (csrc/), where they were built."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

from loramux_adapters.native import load_library


@cache
def native_library() -> ctypes.CDLL | None:
    """None without a compiler at installation, or on a machine they were not built for."""
    return load_library(Path(__file__).parent, "_kernels")


def has_avx512bf16(library: ctypes.CDLL) -> bool:
    """Whether this machine runs the vector paths."""
    return bool(library.loramux_attention_has_avx512bf16())
