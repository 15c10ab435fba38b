"""Finds the compiled CPU kernels (csrc/), where they were built. None is needed: each has a tensor twin."""

from __future__ import annotations

import ctypes
import logging
import os
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from loramux_server.kernels.compiled.abi import FUNCTIONS, VectorIsa, difference

logger = logging.getLogger(__name__)

LIBRARY = Path(__file__).parent / "_kernels.so"
_HEADER_BYTES = 64  # of an ELF file of 64 bits


class LibraryUnusable(Exception):
    """The compiled kernels cannot be used here; the text says why."""


class NativeLibrary:
    """The library, loaded, and found to be what abi.py declares. Every call of it gives up the interpreter lock.

    Attributes:
        isas: the instruction sets that both it and this processor have, the fastest last.
    """

    def __init__(self, path: Path) -> None:
        """Raises LibraryUnusable: there is none, it does not load here, or it was built from other sources."""
        if os.name != "posix" or not path.exists():
            raise LibraryUnusable("they were not built at installation (is there a C++ compiler?)")
        try:
            if (missing := missing_bytes(path.read_bytes())) > 0:  # loading it would end the process without a word
                raise LibraryUnusable(f"{path.name} was cut short by {missing} bytes or more: install it anew")
            self._library = ctypes.CDLL(str(path))
            describe = self._library.loramux_abi
        except (OSError, AttributeError) as error:
            raise LibraryUnusable(f"{path.name} does not load: {error}") from error
        describe.restype = ctypes.c_char_p
        if (found := difference(describe().decode())) is not None:
            raise LibraryUnusable(f"they were built from other sources than this code ({found}): install it anew")
        self._functions: dict[str, Callable[..., Any]] = {}
        found = self.function("loramux_exact_isas")()
        self.isas = tuple(isa for isa in VectorIsa if found & 1 << isa)

    def function(self, name: str) -> Callable[..., Any]:
        """One of abi.FUNCTIONS. Pointers are passed as integers; None is null."""
        function = self._functions.get(name)
        if function is None:
            found = getattr(self._library, name)
            found.restype, found.argtypes = FUNCTIONS[name]
            function = self._functions[name] = found
        return function

    @property
    def best(self) -> Compiled:
        """The library on the fastest instruction set."""
        return Compiled(self, self.isas[-1])


class Compiled:
    """The library on one instruction set: what modules that run on it hold. A copy of such a module holds the same one.

    Attributes:
        isa: which.
    """

    def __init__(self, library: NativeLibrary, isa: VectorIsa) -> None:
        self.library = library
        self.isa = isa

    def function(self, name: str) -> Callable[..., Any]:
        return self.library.function(name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Compiled:
        return self


def missing_bytes(library: bytes) -> int:
    """How much longer it must be, by its own tables; 0 for a whole one, and for what is no ELF file of 64 bits.

    The tables: of segments (what is mapped) and of sections, which linkers write last.
    """
    magic = b"\x7fELF\2"
    if not library or library[: len(magic)] != magic[: len(library)]:
        return 0
    end = _HEADER_BYTES
    if len(library) >= end:
        order = "<" if library[5] == 1 else ">"
        segments, sections = struct.unpack_from(order + "QQ", library, 32)
        segment_size, num_segments, section_size, num_sections = struct.unpack_from(order + "4H", library, 54)
        end = max(end, segments + num_segments * segment_size, sections + num_sections * section_size)
        if len(library) >= end:
            for segment in range(num_segments):
                at = segments + segment * segment_size
                (offset,), (size,) = (struct.unpack_from(order + "Q", library, at + field) for field in (8, 32))
                end = max(end, offset + size)
    return max(0, end - len(library))


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
