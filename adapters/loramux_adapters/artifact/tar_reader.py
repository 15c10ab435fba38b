"""A strict reader of tar archives: regular files and directories, nothing else, bounded memory.

The standard library reads links, sparse maps and headers of any size, and a stranger's archive can make each of
them expensive. An adapter needs none of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

_BLOCK = 512
_MAX_EXTENSION = 64 * 2**10  # bytes of a pax header or a GNU long name
_FILE, _DIRECTORY = (b"0", b"\0", b"7"), b"5"
_PAX, _PAX_GLOBAL, _GNU_NAME = b"x", b"g", b"L"


class TarRefused(ValueError):
    """The archive is damaged, or holds what is not taken; the message says which, and quotes nothing."""


@dataclass(frozen=True, slots=True)
class TarFile:
    """A regular file. `size` bytes follow in the archive."""

    name: str
    size: int


def tar_files(archive: BinaryIO) -> Iterator[TarFile]:
    """The regular files, in order. The caller may read a file's bytes from `archive` before asking for the next.

    Raises TarRefused.
    """
    name: str | None = None  # from an extension header: it is about the next file
    while True:
        header = archive.read(_BLOCK)
        if len(header) < _BLOCK:
            raise TarRefused("it ends in the middle")
        if not any(header):
            return
        _check_sum(header)
        size, kind = _number(header[124:136]), header[156:157]
        if kind in (_PAX, _PAX_GLOBAL, _GNU_NAME):
            data = _extension(archive, size)
            name = _text(data.split(b"\0")[0]) if kind == _GNU_NAME else _pax_name(data) or name
            if kind == _PAX_GLOBAL:
                name = None
            continue
        if kind not in _FILE and kind != _DIRECTORY:
            raise TarRefused("it holds a link or another special file")
        start = archive.tell()
        if kind in _FILE:
            yield TarFile(name if name is not None else _plain_name(header), size)
        name = None
        _skip(archive, start + -(-size // _BLOCK) * _BLOCK - archive.tell())


def _plain_name(header: bytes) -> str:
    name, prefix = header[:100].split(b"\0")[0], header[345:500].split(b"\0")[0]
    return _text(prefix + b"/" + name if prefix and header[257:263] == b"ustar\0" else name)


def _extension(archive: BinaryIO, size: int) -> bytes:
    if size > _MAX_EXTENSION:
        raise TarRefused("it has an oversized header")
    padded = -(-size // _BLOCK) * _BLOCK
    data = archive.read(padded)
    if len(data) < padded:
        raise TarRefused("it ends in the middle")
    return data[:size]


def _pax_name(data: bytes) -> str | None:
    """`path` of a pax header; records are b"<length> <key>=<value>\\n"."""
    name = None
    while data:
        digits, space, _ = data[:20].partition(b" ")
        if not space or not digits.isdigit() or not len(digits) + 2 < int(digits) <= len(data):
            raise TarRefused("it has a damaged header")
        record, data = data[len(digits) + 1 : int(digits) - 1], data[int(digits) :]
        key, _, value = record.partition(b"=")
        if key in (b"size", b"linkpath") or key.startswith(b"GNU.sparse"):
            raise TarRefused("it holds a link or another special file")
        if key == b"path":
            name = _text(value)
    return name


def _check_sum(header: bytes) -> None:
    stated = _number(header[148:156])
    if stated != sum(header[:148]) + 8 * ord(" ") + sum(header[156:]):
        raise TarRefused("it has a damaged header")


def _number(field: bytes) -> int:
    """Octal digits, or GNU's big-endian form for large values."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    if digits.strip(b"01234567"):
        raise TarRefused("it has a damaged header")
    return int(digits or b"0", 8)


def _text(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TarRefused("it holds a name that is not UTF-8") from error


def _skip(archive: BinaryIO, count: int) -> None:
    while count > 0:
        data = archive.read(min(count, 64 * 2**10))
        if not data:
            raise TarRefused("it ends in the middle")
        count -= len(data)
