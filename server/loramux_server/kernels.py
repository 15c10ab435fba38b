"""The compiled CPU kernels of this package (csrc/), where they were built."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from loramux_adapters.native import load_library


@cache
def native_library() -> ctypes.CDLL | None:
    """None without a compiler at installation, or on a machine they were not built for."""
    return load_library(Path(__file__).parent, "_kernels")


def has_avx512bf16(library: ctypes.CDLL) -> bool:
    """Whether this machine runs the vector paths."""
    return bool(library.loramux_attention_has_avx512bf16())


_TYPES: dict[str, Any] = {"p": ctypes.c_void_p, "n": ctypes.c_int64, "f": ctypes.c_float, "i": ctypes.c_int32}


def bind(function: Any, signature: str) -> Callable[..., None]:
    """A kernel with its parameters declared: p a pointer, n a 64-bit size, f a float, i a 32-bit number."""
    function.argtypes, function.restype = [_TYPES[letter] for letter in signature], None
    bound: Callable[..., None] = function
    return bound
