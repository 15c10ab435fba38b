"""Finds the compiled CPU kernels (csrc/), where they were built. None is needed: each has a tensor twin."""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from loramux_server.kernels.abi import FUNCTIONS, Isa, difference

logger = logging.getLogger(__name__)

LIBRARY = Path(__file__).parent / "_kernels.so"


class LibraryUnusable(Exception):
    """The compiled kernels cannot be used here; the text says why."""


class NativeLibrary:
    """The library, loaded, and found to be what abi.py declares. Every call of it gives up the interpreter lock.

    Attributes:
        best_isa: the highest instruction set that both it and this processor have.
    """

    def __init__(self, path: Path) -> None:
        """Raises LibraryUnusable: there is none, it does not load here, or it was built from other sources."""
        if os.name != "posix" or not path.exists():
            raise LibraryUnusable("they were not built at installation (is there a C++ compiler?)")
        try:
            self._library = ctypes.CDLL(str(path))
            describe = self._library.loramux_abi
        except (OSError, AttributeError) as error:
            raise LibraryUnusable(f"{path.name} does not load: {error}") from error
        describe.restype = ctypes.c_char_p
        if (found := difference(describe().decode())) is not None:
            raise LibraryUnusable(f"they were built from other sources than this code ({found}): install it anew")
        self.best_isa = Isa(self.function("loramux_best_isa")())

    def function(self, name: str) -> Callable[..., Any]:
        """One of abi.FUNCTIONS. Pointers are passed as integers; None is null."""
        function = getattr(self._library, name)
        function.restype, function.argtypes = FUNCTIONS[name]
        bound: Callable[..., Any] = function
        return bound


@cache
def _found() -> NativeLibrary | str:
    """The library, or why there is none."""
    try:
        return NativeLibrary(LIBRARY)
    except LibraryUnusable as error:
        if LIBRARY.exists():
            logger.warning("the compiled kernels are not used: %s", error)
        return str(error)


def native_library() -> NativeLibrary | None:
    """None without a compiler at installation, or on a machine they were not built for."""
    found = _found()
    return None if isinstance(found, str) else found


def why_unusable() -> str:
    """Why `native_library` gives none; empty if it gives one."""
    found = _found()
    return found if isinstance(found, str) else ""
