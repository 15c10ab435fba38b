"""The header of a GGUF file: its metadata and where its tensors lie, within bounds; of a small file such as a LoRA's.

The format (ggml's docs/gguf.md), little-endian: the magic, a version, how many tensors and how many pairs of
metadata; the pairs; for each tensor a name, its dimensions with the innermost first, a type and an offset; then the
data, from the next multiple of the alignment on.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from loramux_adapters.artifact.reading.own_files import open_regular
from loramux_adapters.artifact.reading.strict_json import quoted
from loramux_adapters.errors import AdapterRejected

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER_BYTES = 16 * 2**20
MAX_TENSORS = 65_536
MAX_PAIRS = 4096
MAX_TEXT = 2**20
MAX_DIMENSIONS = 4
_ALIGNMENT_KEY, _ALIGNMENT = "general.alignment", 32
_TEXT, _ARRAY = 8, 9
_SCALARS = {  # type -> form of its bytes
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_Q8_NUMBERS = 32  # of a block of Q8_0: a scale in F16, then so many signed bytes
_Q8_BYTES = 2 + _Q8_NUMBERS


@dataclass(frozen=True, slots=True)
class GGUFTensorSpec:
    """One tensor: `shape` with the outermost dimension first, as PyTorch has it; bytes from `offset` in the file on."""

    kind: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """`metadata` holds numbers and texts; arrays are passed over."""

    metadata: Mapping[str, float | int | bool | str]
    tensors: Mapping[str, GGUFTensorSpec]


_KINDS = {0: "F32", 1: "F16", 8: "Q8_0", 30: "BF16"}  # those that converters of LoRA write
_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


def read_gguf_header(path: Path) -> GGUFHeader:
    """Raises `AdapterRejected`: it is no GGUF file, damaged, or has what no LoRA has."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        reader = _Reader(file.read(MAX_HEADER_BYTES), path.name)
    if reader.take(4) != MAGIC:
        raise AdapterRejected([f"{path.name} is no GGUF file, whatever its name says"])
    version = reader.number("<I")
    if version not in VERSIONS:
        raise AdapterRejected([f"{path.name} is of a version of GGUF that is not read; {VERSIONS} are, little-endian"])
    num_tensors, num_pairs = reader.number("<Q"), reader.number("<Q")
    if num_tensors > MAX_TENSORS or num_pairs > MAX_PAIRS:
        raise AdapterRejected([f"{path.name} claims more tensors or metadata than a LoRA has"])
    metadata: dict[str, float | int | bool | str] = {}
    for _ in range(int(num_pairs)):
        key = reader.text()
        if key in metadata:
            raise AdapterRejected([f"{path.name} has the metadata {quoted(key, 80)} twice"])
        value = reader.value(int(reader.number("<I")))
        if value is not None:
            metadata[key] = value
    entries = [reader.tensor() for _ in range(int(num_tensors))]
    alignment = metadata.get(_ALIGNMENT_KEY, _ALIGNMENT)
    if not isinstance(alignment, int) or not 0 < alignment <= 2**20 or alignment & (alignment - 1):
        raise AdapterRejected([f"{path.name} has an alignment that is no power of two"])
    start = -(-reader.position // alignment) * alignment
    tensors: dict[str, GGUFTensorSpec] = {}
    for name, shape, kind, offset in entries:
        if name in tensors:
            raise AdapterRejected([f"{path.name} has the tensor {quoted(name)} twice"])
        if kind not in _KINDS:
            shown = ", ".join(_KINDS.values())
            raise AdapterRejected([f"tensor {quoted(name)} is of GGUF's type {kind}; {shown} are read"])
        nbytes = _bytes_of(_KINDS[kind], shape, name)
        if offset % alignment or start + offset + nbytes > size:
            raise AdapterRejected([f"the data of {quoted(name)} in {path.name} is cut short, or out of place"])
        tensors[name] = GGUFTensorSpec(_KINDS[kind], shape, start + offset, nbytes)
    return GGUFHeader(metadata, tensors)


def _bytes_of(kind: str, shape: tuple[int, ...], name: str) -> int:
    count = math.prod(shape)
    if kind != "Q8_0":
        return count * _ITEM_BYTES[kind]
    if shape[-1] % _Q8_NUMBERS:
        raise AdapterRejected([f"tensor {quoted(name)} has rows that are no whole blocks of Q8_0"])
    return count // _Q8_NUMBERS * _Q8_BYTES


def read_rows(path: Path, spec: GGUFTensorSpec) -> npt.NDArray[np.generic]:
    """A matrix's numbers [rows, columns]: F32, for Q8_0 too, or F16; BF16 as its 16 bits.

    Raises `AdapterRejected`, OSError.
    """
    with open_regular(path) as file:
        data = _exactly(file, spec, path.name)
    rows, columns = spec.shape
    if spec.kind == "Q8_0":
        blocks = np.frombuffer(data, np.uint8).reshape(-1, _Q8_BYTES)
        scales = blocks[:, :2].copy().view("<f2").astype(np.float32)
        numbers = blocks[:, 2:].view(np.int8).astype(np.float32)
        return (scales * numbers).reshape(rows, columns)
    dtype = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[spec.kind]
    return np.frombuffer(data, dtype).reshape(rows, columns)


def _exactly(file: BinaryIO, spec: GGUFTensorSpec, name: str) -> bytes:
    file.seek(spec.offset)
    data = file.read(spec.nbytes)
    if len(data) != spec.nbytes:
        raise AdapterRejected([f"{name} ended while it was read"])
    return data


class _Reader:
    """Takes one thing after another from the beginning of a file."""

    def __init__(self, data: bytes, name: str) -> None:
        self._data = data
        self._name = name
        self.position = 0

    def take(self, count: int) -> bytes:
        """Raises `AdapterRejected` at the end of what may be a header."""
        if count > len(self._data) - self.position:
            raise AdapterRejected([f"the header of {self._name} is cut short, or larger than a LoRA's"])
        data = self._data[self.position : self.position + count]
        self.position += count
        return data

    def number(self, form: str) -> float | int | bool:
        value: float | int | bool = struct.unpack(form, self.take(struct.calcsize(form)))[0]
        return value

    def text(self) -> str:
        length = int(self.number("<Q"))
        if length > MAX_TEXT:
            raise AdapterRejected([f"the header of {self._name} has a text of {length} bytes"])
        try:
            return self.take(length).decode()
        except UnicodeDecodeError as error:
            raise AdapterRejected([f"the header of {self._name} has a text that is not UTF-8"]) from error

    def value(self, kind: int) -> float | int | bool | str | None:
        """None for an array, whose items are passed over; arrays of arrays do not occur."""
        if kind == _TEXT:
            return self.text()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY:
            raise AdapterRejected([f"the header of {self._name} has metadata of an unknown type"])
        of, count = int(self.number("<I")), int(self.number("<Q"))
        if of in _SCALARS:
            self.take(struct.calcsize(_SCALARS[of]) * count)
        elif of == _TEXT:
            for _ in range(min(count, MAX_HEADER_BYTES)):
                self.text()
        else:
            raise AdapterRejected([f"the header of {self._name} has metadata of an unknown type"])
        return None

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, type and offset."""
        name = self.text()
        dimensions = int(self.number("<I"))
        if not 0 < dimensions <= MAX_DIMENSIONS:
            raise AdapterRejected([f"tensor {quoted(name)} has {dimensions} dimensions"])
        shape = tuple(int(self.number("<Q")) for _ in range(dimensions))[::-1]
        return name, shape, int(self.number("<I")), int(self.number("<Q"))
