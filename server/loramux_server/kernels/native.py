"""The compiled CPU kernels of this package (csrc/), where they were built."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

from loramux_adapters.lora.ops import native_library as adapter_kernels
from loramux_adapters.native import bind, load_library


@cache
def native_library() -> ctypes.CDLL | None:
    """None without a compiler at installation, or on a machine they were not built for.

    Their loops run on the threads of the adapters' kernels.
    """
    library = load_library(Path(__file__).parent.parent, "_kernels", "loramux_decoder_step")
    adapters = adapter_kernels()
    if library is None or adapters is None:
        return None
    bind(library.loramux_use_pool, "p")(ctypes.cast(adapters.loramux_run_pieces, ctypes.c_void_p))
    return library


def has_avx512bf16(library: ctypes.CDLL) -> bool:
    """Whether this machine runs the vector paths."""
    return bool(library.loramux_attention_has_avx512bf16())
