"""A library is called only if it is what this code declares: structures, signatures and version."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from loramux_server.kernels.compiled import abi
from loramux_server.kernels.compiled import library as native
from loramux_server.kernels.compiled.abi import declared, difference
from loramux_server.kernels.compiled.library import LIBRARY, LibraryUnusable, NativeLibrary

needs_library = pytest.mark.skipif(native.native_library() is None, reason="no compiler was there at installation")
DESCRIBED = "\n".join(declared()) + "\n"


@needs_library
def test_the_library_that_was_built_is_what_is_declared() -> None:
    library = NativeLibrary(LIBRARY)
    assert library.isas[0] is abi.VectorIsa.PORTABLE and library.best.isa is library.isas[-1]


@pytest.mark.parametrize(
    ("line", "other", "named"),
    [
        (f"version {abi.VERSION}", f"version {abi.VERSION + 1}", "version"),
        ("struct LoraArena 48 a:0:8", "struct LoraArena 56 a:0:8", "struct LoraArena"),  # it grew
        ("a:0:8 bt:8:8 ", "bt:0:8 a:8:8 ", "struct LoraArena, struct SlotWeights"),  # fields changed places
        ("function loramux_exact_step vppi", "function loramux_exact_step vppp", "function loramux_exact_step"),
        ("function loramux_copy_slot vpplll\n", "", "function loramux_copy_slot"),  # older
        (
            "function loramux_copy_slot vpplll\n",
            "function a v\nfunction loramux_copy_slot vpplll\n",
            "function a",
        ),  # newer
    ],
)
def test_whatever_differs_is_named(line: str, other: str, named: str) -> None:
    assert difference(DESCRIBED) is None
    assert line in DESCRIBED
    assert difference(DESCRIBED.replace(line, other)) == named


@needs_library
def test_a_library_of_other_structures_is_refused_and_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class LoraEntries(ctypes.Structure):
        _fields_ = [*abi.LoraEntries._fields_, ("more", abi.SIZE)]

    structures = tuple(LoraEntries if each is abi.LoraEntries else each for each in abi.STRUCTURES)
    monkeypatch.setattr(abi, "STRUCTURES", structures)
    with pytest.raises(LibraryUnusable, match=r"other sources than this code \(struct LoraEntries\): install it anew"):
        NativeLibrary(LIBRARY)
    native._found.cache_clear()
    try:
        assert native.native_library() is None
        assert "struct LoraEntries" in native.why_unusable() and "struct LoraEntries" in caplog.text
    finally:
        native._found.cache_clear()


@needs_library
def test_a_library_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(abi, "VERSION", abi.VERSION + 1)
    with pytest.raises(LibraryUnusable, match="version"):
        NativeLibrary(LIBRARY)


def test_a_file_that_is_no_such_library_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LibraryUnusable, match="not built at installation"):
        NativeLibrary(tmp_path / "none.so")
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"#!/bin/sh\n")
    with pytest.raises(LibraryUnusable, match="does not load"):
        NativeLibrary(broken)
    foreign = tmp_path / "foreign.so"  # loads, and is not ours
    import _ctypes

    shutil.copy(_ctypes.__file__, foreign)
    with pytest.raises(LibraryUnusable, match="does not load"):
        NativeLibrary(foreign)


LOADER = """
import sys
from pathlib import Path
from loramux_server.kernels.compiled.library import LibraryUnusable, NativeLibrary

whole, path = Path(sys.argv[1]).read_bytes(), Path(sys.argv[2])
for end in map(int, sys.argv[3:]):
    print(end, flush=True)  # the last line says where the process ended, should it end here
    path.unlink(missing_ok=True)
    path.write_bytes(whole[:end])
    try:
        NativeLibrary(path)
    except LibraryUnusable as error:
        assert ("cut short" in str(error)) == (end > 0), error
    else:
        raise AssertionError("it was loaded")
print("all refused")
"""


@needs_library
def test_a_library_that_was_cut_short_is_refused_wherever_the_cut_is(tmp_path: Path) -> None:
    """Of many of these the system's loader would end the process with a signal."""
    size = LIBRARY.stat().st_size
    ends = sorted({0, 1, 4, 5, 16, 63, 64, 120, 624, size - 4096, size - 64, size - 1, *range(4096, size, size // 97)})
    words = [sys.executable, "-c", LOADER, str(LIBRARY), str(tmp_path / "cut.so"), *map(str, ends)]
    ran = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, (ran.returncode, ran.stdout[-20:], ran.stderr)
    assert ran.stdout.endswith("all refused\n")
