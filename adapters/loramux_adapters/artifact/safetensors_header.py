"""The header of a safetensors file, checked before any library reads the file.

The format: 8 bytes of little-endian header length, a JSON object {name: {"dtype", "shape", "data_offsets"}},
then the data.

Why by hand: the library opens a file or raises one sentence, with no bound on the number of tensors or dimensions. Here
every reason is found at once, in bounded time and memory, before the library maps the file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

from loramux_adapters.artifact.reading.own_files import open_regular
from loramux_adapters.artifact.reading.strict_json import StrictJSONError, is_int, parse_object, quoted
from loramux_adapters.errors import AdapterRejected

ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
# What a file of this name is found to be instead, by how it begins.
_OTHERS = {
    b"GGUF": "is a GGUF file: send the PEFT directory it was converted from, or use `loramux adapters convert`",
    b"PK\x03\x04": "is a pickle, as torch.save writes it, which is never read: save it with safetensors",
    b"\x80\x02": "is a pickle, which is never read: save it with safetensors",
    b"\x80\x04": "is a pickle, which is never read: save it with safetensors",
    b"version ": "is a pointer of Git LFS and not the file itself: run `git lfs pull` where it was cloned",
    b"<": "is a web page: the download of the file has failed",
    b"\x1f\x8b": "is an archive: send it as one",
}
MAX_HEADER_BYTES = 16 * 2**20
MAX_TENSORS = 65_536
MAX_DIMENSIONS = 8
LENGTH_BYTES = 8
_REMEMBERED_BYTES = 512 * 2**10  # of a header; longer ones are parsed each time


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of the file: `nbytes` bytes of `dtype`, one of `ITEM_BYTES`, from `offset` in the file on."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(path: Path) -> Mapping[str, TensorSpec]:
    """Check the header of a safetensors file and return its tensors by name.

    The data must be covered by the tensors exactly: no gap, no overlap, no byte left over.
    Raises `AdapterRejected` with every reason found.
    """
    with open_regular(path) as file:
        file_bytes = os.fstat(file.fileno()).st_size
        start = file.read(LENGTH_BYTES)
        header_bytes = int.from_bytes(start, "little")
        if file_bytes < LENGTH_BYTES:
            raise AdapterRejected([f"{path.name} is too short to be a safetensors file"])
        if header_bytes > MAX_HEADER_BYTES:
            too_long = f"claims a header of more than {MAX_HEADER_BYTES} bytes"
            raise AdapterRejected([f"{path.name} {_other_format(start) or too_long}"])
        data_start = LENGTH_BYTES + header_bytes
        if data_start > file_bytes:
            too_long = "claims a header that is longer than the file"
            raise AdapterRejected([f"{path.name} {_other_format(start) or too_long}"])
        raw = file.read(header_bytes)
    if not raw.startswith(b"{"):
        raise AdapterRejected([f"{path.name} {_other_format(start) or 'is not a safetensors file'}"])
    parse = _parse_remembered if header_bytes <= _REMEMBERED_BYTES else _parse
    return parse(raw, file_bytes, path.name)


def _other_format(start: bytes) -> str | None:
    """What a file that begins like this is instead."""
    return next((what for magic, what in _OTHERS.items() if start.startswith(magic)), None)


def _parse(raw: bytes, file_bytes: int, file: str) -> Mapping[str, TensorSpec]:
    """What a header of a file of this size says. Depends on nothing else. Raises `AdapterRejected`."""
    data_start = LENGTH_BYTES + len(raw)
    try:
        header = parse_object(raw, limit=MAX_HEADER_BYTES)
    except StrictJSONError as error:
        raise AdapterRejected([f"the header of {file} {error}"]) from error
    reasons = _metadata_reasons(header.pop("__metadata__", None))
    if len(header) > MAX_TENSORS:
        raise AdapterRejected([*reasons, f"{file} holds more than {MAX_TENSORS} tensors"])
    specs: dict[str, TensorSpec] = {}
    for name, entry in header.items():
        parsed = _parse_entry(entry, data_start)
        if isinstance(parsed, str):
            reasons.append(f"tensor {quoted(name)} {parsed}")
        else:
            specs[name] = parsed
    if not reasons:
        reasons = _coverage_reasons(file, specs, data_start, file_bytes)
    if reasons:
        raise AdapterRejected(reasons)
    return MappingProxyType(specs)


# One upload is parsed four times on its way, and adapters of one shape have one header: worth 3 ms of Python each time.
_parse_remembered = lru_cache(maxsize=64)(_parse)


def _metadata_reasons(metadata: object) -> list[str]:
    if metadata is None:
        return []
    if isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values()):
        return []
    return ["the header's __metadata__ is not an object of strings"]


def _parse_entry(entry: object, data_start: int) -> TensorSpec | str:
    """The tensor that a header entry describes, or what is wrong with it."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        return "is not described by dtype, shape and data_offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        return f"has dtype {quoted(str(dtype), 24)}; {', '.join(ITEM_BYTES)} are read"
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(is_int(n) and n >= 0 for n in shape):
        return "has a shape that is not a short list of non-negative integers"
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(is_int(n) and n >= 0 for n in offsets):
        return "has data_offsets that are not two non-negative integers"
    begin, end = offsets
    nbytes = ITEM_BYTES[dtype]
    for size in shape:
        nbytes *= size
    if end - begin != nbytes:
        return "has data_offsets that do not fit its shape and dtype"
    return TensorSpec(dtype=dtype, shape=tuple(shape), offset=data_start + begin, nbytes=nbytes)


def _coverage_reasons(file: str, specs: dict[str, TensorSpec], data_start: int, file_bytes: int) -> list[str]:
    position = data_start
    for name, spec in sorted(specs.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if spec.offset != position:
            how = "overlaps the one before it" if spec.offset < position else "leaves a gap before it"
            return [f"tensor {quoted(name)} {how}"]
        position += spec.nbytes
    if position != file_bytes:
        how = "is cut short" if position > file_bytes else "has bytes that belong to no tensor"
        return [f"the data of {file} {how}"]
    return []
