"""Calls of the compiled kernels, recorded with all the memory they read and write, for replay without Python.

A recorded call is its function's name, its arguments, the memory that it reaches through them, and what that memory
holds afterwards. tests/server/kernels/replay/replay.cpp makes the same calls on another instruction set, or on another
kind of processor, and compares every bit.

What a pointer points to, the recorder finds by itself: whoever calls a C function keeps alive what it passes, so its
owner can be reached from the locals of the caller, or of whoever called that. Addresses inside memory are followed
where its type says that they are some: a `c_void_p` of a ctypes structure or array, a uint64 of NumPy's.
"""

from __future__ import annotations

import ctypes
import gc
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch

from loramux_server.kernels.compiled.abi import FUNCTIONS, POINTER, VectorIsa
from loramux_server.kernels.compiled.library import LIBRARY, NativeLibrary

NUMBER, ADDRESS, ISA = range(3)  # kinds of arguments
_SCRATCH = "scratch"  # a field of this name points to memory whose content counts neither before nor after
_FLOATS = {"float32": 4, "float64": 8}
_NOT_SEARCHED = (ModuleType, FunctionType, CodeType, FrameType, type, str, bytes, int, float, bool, type(None))


@dataclass
class Region:
    """Memory that has an owner: [start, end), and what is known of it."""

    start: int
    end: int
    addresses: set[int] = field(default_factory=set)  # where in it addresses lie
    scratch: set[int] = field(default_factory=set)  # those of them that point to scratch
    float_bytes: int = 0  # of a number, where it is known to hold fp32 or fp64

    def content(self) -> bytes:
        return ctypes.string_at(self.start, self.end - self.start)


@dataclass
class Call:
    """One call. Places in memory are (block, offset); contents are numbers of those kept by the recorder."""

    name: str
    arguments: list[tuple[int, int, int]] = field(default_factory=list)  # (kind, number or block, offset)
    blocks: list[tuple[int, int]] = field(default_factory=list)  # (content before, -1: zeros; bytes)
    pointers: list[tuple[int, int, int, int]] = field(default_factory=list)  # at (block, offset): a place
    results: list[tuple[int, int, int]] = field(default_factory=list)  # (block, content after, float_bytes)
    returned: int = 0

    @property
    def takes_isa(self) -> bool:
        return any(kind == ISA for kind, _, _ in self.arguments)


class RecordingLibrary(NativeLibrary):
    """The library, with every call of its functions recorded while `is_on`."""

    def __init__(self, most: int = 1 << 30) -> None:
        """`most`: calls of one function that are kept. Contents of memory are kept once each, with their numbers."""
        self.calls: list[Call] = []
        self.is_on = False
        self._most = most
        self.contents: dict[bytes, int] = {}
        super().__init__(LIBRARY)
        self.is_on = True

    def function(self, name: str) -> Callable[..., Any]:
        call = super().function(name)

        def recorded(*arguments: Any) -> Any:
            if not self.is_on or sum(each.name == name for each in self.calls) >= self._most:
                return call(*arguments)
            return self._record(name, call, arguments, sys._getframe(1))

        return recorded

    def _record(self, name: str, call: Callable[..., Any], arguments: tuple[Any, ...], frame: FrameType) -> Any:
        memory = _Memory(frame)
        made = Call(name)
        regions: dict[int, int] = {}  # start -> block

        def place(address: int, scratch: bool = False) -> tuple[int, int]:
            region = memory.region(address, f"an argument of {name}")
            if region.start not in regions:
                regions[region.start] = len(made.blocks)
                block, content = len(made.blocks), region.content()
                made.blocks.append((-1 if scratch else self._keep(_without(content, region)), len(content)))
                for offset in sorted(region.addresses):
                    (target,) = struct.unpack_from("<Q", content, offset)
                    if target:
                        made.pointers.append((block, offset, *place(target, offset in region.scratch)))
            return regions[region.start], address - region.start

        for kind, argument in zip(FUNCTIONS[name][1], arguments, strict=True):
            if kind is POINTER and argument:
                made.arguments.append((ADDRESS, *place(argument)))
            elif isinstance(argument, VectorIsa):
                made.arguments.append((ISA, int(argument), 0))
            else:
                made.arguments.append((NUMBER, _bits(kind, argument), 0))
        before = {start: memory.region(start, name).content() for start in regions}
        returned = call(*arguments)
        made.returned = 0 if returned is None else returned
        for start, block in regions.items():
            region = memory.region(start, name)
            after = region.content()
            if after != before[start] and made.blocks[block][0] >= 0:
                made.results.append((block, self._keep(_without(after, region)), region.float_bytes))
        self.calls.append(made)
        return returned

    def _keep(self, content: bytes) -> int:
        return self.contents.setdefault(content, len(self.contents))

    def save(self, path: Path) -> None:
        """Writes what replay.cpp reads: 64-bit numbers in the order of bytes of x86 and aarch64, contents, names."""
        with path.open("wb") as file:

            def numbers(*values: int) -> None:
                file.write(struct.pack(f"<{len(values)}q", *values))

            def listed(rows: list[Any]) -> None:
                numbers(len(rows), *(value for row in rows for value in row))

            def text(content: bytes) -> None:
                numbers(len(content))
                file.write(content + bytes(-len(content) % 8))

            numbers(len(self.contents))
            for content in self.contents:
                text(content)
            numbers(len(self.calls))
            for call in self.calls:
                text(call.name.encode())
                for rows in (call.arguments, call.blocks, call.pointers, call.results):
                    listed(rows)
                numbers(call.returned)


class _Memory:
    """What can be reached from a caller's locals; callers of callers are looked at as they are needed."""

    def __init__(self, frame: FrameType) -> None:
        self._frame: FrameType | None = frame
        self._seen: set[int] = set()
        self._regions: list[Region] = []

    def region(self, address: int, what: str) -> Region:
        """The whole of the memory around this address that has one owner, or owners that overlap."""
        while True:
            for region in self._regions:
                if region.start <= address < region.end:
                    return region
            if self._frame is None:
                raise LookupError(f"nothing that the callers hold owns the memory at {address:#x}: {what}")
            self._look_at(list(self._frame.f_locals.values()))
            self._frame = self._frame.f_back

    def _look_at(self, objects: list[Any]) -> None:
        while objects:
            found = objects.pop()
            if id(found) in self._seen or isinstance(found, (*_NOT_SEARCHED, RecordingLibrary)):
                continue
            self._seen.add(id(found))
            if (region := _region_of(found)) is not None:
                self._add(region)
            objects += gc.get_referents(found)

    def _add(self, new: Region) -> None:
        """Regions that overlap become one."""
        apart = []
        for old in self._regions:
            if old.end <= new.start or new.end <= old.start:
                apart.append(old)
                continue
            start = min(old.start, new.start)
            for name in ("addresses", "scratch"):
                both = {each + part.start - start for part in (old, new) for each in getattr(part, name)}
                setattr(new, name, both)
            float_bytes = max(old.float_bytes, new.float_bytes)
            new = Region(start, max(old.end, new.end), new.addresses, new.scratch, float_bytes)
        self._regions = [*apart, new]


def _region_of(found: Any) -> Region | None:
    """The memory that this object owns or looks into; None where it has none that a kernel could be given."""
    if isinstance(found, torch.Tensor):
        if found.device.type != "cpu" or found.layout is not torch.strided or not found.numel():
            return None
        storage = found.untyped_storage()
        return Region(
            storage.data_ptr(),
            storage.data_ptr() + storage.nbytes(),
            float_bytes=_FLOATS.get(str(found.dtype).removeprefix("torch."), 0),
        )
    if isinstance(found, np.ndarray):
        start, end = np.lib.array_utils.byte_bounds(found)
        end = max(end, start + 1)  # an empty one has an address
        region = Region(start, end, float_bytes=_FLOATS.get(str(found.dtype), 0))
        if found.flags.c_contiguous:
            region.addresses = set(_addresses_of_array(found))
        return region
    if isinstance(found, (ctypes.Structure, ctypes.Array)):
        start = ctypes.addressof(found)
        places = list(_addresses_of_type(type(found), 0))
        return Region(
            start,
            start + ctypes.sizeof(found),
            {offset for offset, _ in places},
            {offset for offset, name in places if name == _SCRATCH},
        )
    return None


def _addresses_of_type(kind: Any, at: int, name: str = "") -> Iterator[tuple[int, str]]:
    """(offset, name of the field) of each address in a ctypes type."""
    if kind is ctypes.c_void_p:
        yield at, name
    elif issubclass(kind, ctypes.Structure):
        for field_name, field_kind, *_ in kind._fields_:
            yield from _addresses_of_type(field_kind, at + getattr(kind, field_name).offset, field_name)
    elif issubclass(kind, ctypes.Array):
        for index in range(kind._length_):
            yield from _addresses_of_type(kind._type_, at + index * ctypes.sizeof(kind._type_), name)


def _addresses_of_array(array: np.ndarray[Any, Any]) -> Iterator[int]:
    fields = array.dtype.fields or {"": (array.dtype, 0)}
    places = [place[1] for place in fields.values() if place[0] == np.uint64]
    if places:
        for index in range(array.size):
            yield from (index * array.itemsize + place for place in places)


def _without(content: bytes, region: Region) -> bytes:
    """The content with zeros for its addresses: they are other ones at each run."""
    cleaned = bytearray(content)
    for offset in region.addresses:
        cleaned[offset : offset + 8] = bytes(8)
    return bytes(cleaned)


def _bits(kind: Any, argument: Any) -> int:
    """A number as the low bytes of one of 64 bits."""
    if kind is POINTER:
        return 0
    if kind is ctypes.c_double or kind is ctypes.c_float:
        form = "<d" if kind is ctypes.c_double else "<f"
        return int.from_bytes(struct.pack(form, argument).ljust(8, b"\0"), "little", signed=True)
    return int(argument)
