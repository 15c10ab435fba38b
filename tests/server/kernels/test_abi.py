"""A library is called only if it is what this code declares: structures, signatures and version."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import pytest

from loramux_server.kernels import abi, native
from loramux_server.kernels.abi import declared, difference
from loramux_server.kernels.native import LIBRARY, LibraryUnusable, NativeLibrary

needs_library = pytest.mark.skipif(native.native_library() is None, reason="no compiler was there at installation")
DESCRIBED = "\n".join(declared()) + "\n"


@needs_library
def test_the_library_that_was_built_is_what_is_declared() -> None:
    assert NativeLibrary(LIBRARY).best_isa in abi.Isa


@pytest.mark.parametrize(
    ("line", "other", "named"),
    [
        (f"version {abi.VERSION}", f"version {abi.VERSION + 1}", "version"),
        ("struct LoraArena 40 a:0:8", "struct LoraArena 48 a:0:8", "struct LoraArena"),  # it grew
        ("a:0:8 bt:8:8 ", "bt:0:8 a:8:8 ", "struct LoraArena, struct SlotWeights"),  # fields changed places
        ("function loramux_decoder_step vpp", "function loramux_decoder_step vppp", "function loramux_decoder_step"),
        ("function loramux_head vpppllli\n", "", "function loramux_head"),  # older
        ("function loramux_head vpppllli\n", "function a v\nfunction loramux_head vpppllli\n", "function a"),  # newer
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
    broken.write_bytes(b"\x7fELF")
    with pytest.raises(LibraryUnusable, match="does not load"):
        NativeLibrary(broken)
    foreign = tmp_path / "foreign.so"  # loads, and is not ours
    import _ctypes

    shutil.copy(_ctypes.__file__, foreign)
    with pytest.raises(LibraryUnusable, match="does not load"):
        NativeLibrary(foreign)
