"""The tensors of a base as its kernels read them: where they lie in memory, and the file that later starts read.

In host memory they lie in one mapping with huge pages, and the file is read, not mapped: a mapped file lies in small
pages, and a step of one row waits for memory. On a graphics processor each has memory of its own, and passes through
pinned buffers. Either way the file is read and digested in parts, side by side, and nothing is used before all of it
was found right.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch

from loramux_adapters.device.cpu import CpuDevice
from loramux_adapters.device.device import Device
from loramux_adapters.device.upload import Upload
from loramux_adapters.memory import mapping
from loramux_server.kernels.layers.nf4_layout import Shapes

_MAGIC = b"loramux packed base\n"
_LENGTH = struct.Struct("<Q")  # of the header, between its digest and itself
_ALIGNED = 64  # bytes, each tensor in the file
_PART = 1 << 22  # bytes that have a digest of their own
_WINDOW = 8 * _PART  # of a device's tensors at a time
_LARGEST_HEADER = 1 << 26
_DTYPES = {
    str(dtype): dtype
    for dtype in (
        *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
        *(torch.bfloat16, torch.float16, torch.float32, torch.float64),
    )
}


class Unusable(Exception):
    """A file is not what was packed; the text says why."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies in the file, counted from the first one."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


Places = Mapping[str, Place]


class Tensors(Protocol):
    """Every tensor of a packed base, by its name.

    Attributes:
        places: of each in the file, in order.
        upload: copies to where they lie.
        window: bytes of the file that pass at a time.
    """

    places: Places
    upload: Upload
    window: int

    def __contains__(self, name: str) -> bool: ...

    def __getitem__(self, name: str) -> torch.Tensor: ...

    def put(self, name: str, source: torch.Tensor) -> None:
        """Fills one from host memory, in its own dtype."""

    def outgoing(self, begin: int, end: int) -> Any:
        """The file's bytes from `begin` to `end`: a numpy array, to be read before the next call."""

    def incoming(self, begin: int, end: int) -> Any:
        """Where these bytes are to be written to: a numpy array. `arrived` follows."""

    def arrived(self, begin: int, end: int) -> None: ...


class HostTensors:
    """`Tensors` in one mapping, [bytes] uint8."""

    def __init__(self, places: Places) -> None:
        self.places = places
        self.memory = mapping(size_of(places), huge_pages=True)
        self.window = max(1, len(self.memory))
        self.upload = Upload(CpuDevice())
        self._bytes: Any = self.memory.numpy()

    def __contains__(self, name: str) -> bool:
        return name in self.places

    def __getitem__(self, name: str) -> torch.Tensor:
        place = self.places[name]
        return self.memory[place.offset : place.offset + place.nbytes].view(place.dtype).view(place.shape)

    def put(self, name: str, source: torch.Tensor) -> None:
        self[name].copy_(source)

    def outgoing(self, begin: int, end: int) -> Any:
        return self._bytes[begin:end]

    def incoming(self, begin: int, end: int) -> Any:
        return self._bytes[begin:end]

    def arrived(self, begin: int, end: int) -> None: ...


class DeviceTensors:
    """`Tensors` on a device, each in memory of its own, so that one can be freed."""

    window = _WINDOW

    def __init__(self, places: Places, device: Device) -> None:
        """Raises DeviceFull: there is no room for them."""
        self.places = places
        self.upload = Upload(device, _WINDOW)
        self._device = device
        self._held = {name: device.scratch(place.shape, place.dtype) for name, place in places.items()}

    def __contains__(self, name: str) -> bool:
        return name in self.places

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._held[name]

    def put(self, name: str, source: torch.Tensor) -> None:
        self.upload.copy(self[name], source)

    def outgoing(self, begin: int, end: int) -> Any:
        window = torch.zeros(end - begin, dtype=torch.uint8)
        for there, at in self._parts(begin, end):
            window[at : at + len(there)] = self._device.take(there)
        return window.numpy()

    def incoming(self, begin: int, end: int) -> Any:
        self._window = self.upload.buffer()[: end - begin]
        return self._window.numpy()

    def arrived(self, begin: int, end: int) -> None:
        for there, at in self._parts(begin, end):
            self._device.copy(there, self._window[at : at + len(there)])
        self.upload.started()

    def _parts(self, begin: int, end: int) -> Iterable[tuple[torch.Tensor, int]]:
        """(bytes of a tensor, where they lie in the window) of all that lies between these places of the file."""
        for name, place in self.places.items():
            first, last = max(begin, place.offset), min(end, place.offset + place.nbytes)
            if first < last:
                flat = self._held[name].view(-1).view(torch.uint8)
                yield flat[first - place.offset : last - place.offset], first - begin


def places_of(shapes: Shapes) -> Places:
    """One behind the other."""
    places, size = {}, 0
    for name, (dtype, shape) in shapes.items():
        places[name] = Place(dtype, shape, size)
        size += -(-places[name].nbytes // _ALIGNED) * _ALIGNED
    return places


def size_of(places: Places) -> int:
    """Bytes of the file behind its header."""
    return max((-(-(place.offset + place.nbytes) // _ALIGNED) * _ALIGNED for place in places.values()), default=0)


def write(file: BinaryIO, form: object, base_id: str, tensors: Tensors) -> None:
    """Digests of the parts, then the parts."""
    size = size_of(tensors.places)
    digests = ["0" * 64] * -(-size // _PART)
    file.write(_header(form, base_id, tensors.places, size, digests))  # of the same length as in the end
    with _workers() as pool:
        for begin in range(0, size, tensors.window):
            window = tensors.outgoing(begin, min(size, begin + tensors.window))
            parts = [window[start : start + _PART] for start in range(0, len(window), _PART)]
            first = begin // _PART
            digests[first : first + len(parts)] = pool.map(_digest, parts)
            for part in parts:
                file.write(part)
    file.seek(0)
    file.write(_header(form, base_id, tensors.places, size, digests))


def read(path: Path, form: object, base_id: str, reserve: Callable[[Places], Tensors]) -> Tensors:
    """What `write` wrote, every part of it checked.

    Raises:
        Unusable: it is not whole, not unchanged, or of another base.
        OSError: it cannot be read.
        DeviceFull: there is no room for it.
    """
    with path.open("rb", buffering=0) as file:
        header, start = _checked_header(file, form, base_id)
        places = {
            name: Place(_DTYPES[dtype], tuple(shape), offset)
            for name, (dtype, shape, offset) in header["tensors"].items()
        }
        size, digests = int(header["size"]), header["parts"]
        if os.fstat(file.fileno()).st_size != start + size:
            raise Unusable("it is cut short, or longer than it was")
        tensors = reserve(places)

        def right(part: Any, offset: int) -> bool:
            read = os.preadv(file.fileno(), [part], start + offset)
            return read == len(part) and _digest(part) == digests[offset // _PART]

        with _workers() as pool:
            for begin in range(0, size, tensors.window):
                end = min(size, begin + tensors.window)
                window = tensors.incoming(begin, end)
                offsets = range(0, len(window), _PART)
                parts = [window[offset : offset + _PART] for offset in offsets]
                if not all(pool.map(right, parts, [begin + offset for offset in offsets])):
                    raise Unusable("its bytes are not those that were packed")
                tensors.arrived(begin, end)
    return tensors


def _header(form: object, base_id: str, places: Places, size: int, digests: list[str]) -> bytes:
    described = {name: [str(each.dtype), each.shape, each.offset] for name, each in places.items()}
    header = {"form": form, "base_id": base_id, "size": size, "tensors": described, "parts": digests}
    text = json.dumps(header, separators=(",", ":")).encode()
    return _MAGIC + hashlib.sha256(text).digest() + _LENGTH.pack(len(text)) + text


def _checked_header(file: BinaryIO, form: object, base_id: str) -> tuple[dict[str, Any], int]:
    """The header, and where the tensors begin."""
    begin = len(_MAGIC) + hashlib.sha256().digest_size + _LENGTH.size
    start = file.read(begin)
    if len(start) < begin or not start.startswith(_MAGIC):
        raise Unusable("it does not begin as a packed base does")
    digest = start[len(_MAGIC) : -_LENGTH.size]
    (length,) = _LENGTH.unpack(start[-_LENGTH.size :])
    text = file.read(length) if length <= _LARGEST_HEADER else b""
    if hashlib.sha256(text).digest() != digest:
        raise Unusable("its header is not the one that was written")
    header: dict[str, Any] = json.loads(text)
    if header["form"] != form or header["base_id"] != base_id:
        raise Unusable("it is of another base")
    return header, begin + length


def _digest(part: Any) -> str:
    return hashlib.sha256(part).hexdigest()


_workers = partial(ThreadPoolExecutor, max_workers=min(16, os.cpu_count() or 1), thread_name_prefix="packed")
