"""Finds the compiled CPU kernels that ship beside a package; none is needed, every kernel has a tensor twin."""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def load_library(package_dir: Path, stem: str, needs: str) -> ctypes.CDLL | None:
    """The shared library `<stem>*.so` in `package_dir`, or None where none was built or it does not load here.

    `needs`: the newest of its functions; a library without it is older than this code, which is said and not loaded.
    """
    if os.name != "posix":
        return None
    for path in sorted(package_dir.glob(f"{stem}*.so")):
        try:
            library = ctypes.CDLL(str(path))
        except OSError:
            continue  # built for another machine
        if hasattr(library, needs):
            return library
        logger.warning("the compiled kernels of %s are older than its code: install it anew", package_dir.name)
    return None


_TYPES: dict[str, Any] = {"p": ctypes.c_void_p, "n": ctypes.c_int64, "f": ctypes.c_float, "i": ctypes.c_int32}


def bind(function: Any, signature: str) -> Callable[..., None]:
    """A kernel with its parameters declared: p a pointer, n a 64-bit size, f a float, i a 32-bit number."""
    function.argtypes, function.restype = [_TYPES[letter] for letter in signature], None
    bound: Callable[..., None] = function
    return bound
