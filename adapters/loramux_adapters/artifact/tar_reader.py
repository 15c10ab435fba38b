"""A strict reader of tar archives: regular files and directories, nothing else, bounded memory and bounded work.

The standard library reads links, sparse maps and headers of any size, and a stranger's archive can make each of
them expensive. An adapter needs none of them. Whatever an archive holds, each entry of it counts, of any kind, and so
does what stands between them.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_BLOCK = 512
_COPY = 64 * 2**10
_FILE, _DIRECTORY = (b"0", b"\0", b"7"), b"5"
_LINKS = (b"1", b"2")
_PAX, _PAX_GLOBAL, _GNU_NAME = b"x", b"g", b"L"
_GZIP = b"\x1f\x8b"
# Every header is a block, and a file may have some before its own: pax, a GNU long name.
_HEADERS_PER_ENTRY = 4
_MAX_EXTENSION = 64 * 2**10  # bytes of one pax header or GNU long name
_MAX_EXTENSIONS = 4 * 2**20  # bytes of all of them together
_MAX_RECORDS = 256  # of one pax header
_MAX_PADDING = 2**20  # zeros behind the end: tar fills its last record, of 10 KiB as a rule
_MAX_STREAMS = 1000  # in one gzip file; a tool that packs on several processors makes more than one


class TarRefused(ValueError):
    """The archive is damaged, or holds what is not taken; the message says which, and quotes nothing."""


@dataclass(frozen=True, slots=True)
class TarFile:
    """A regular file. `size` bytes follow in the archive."""

    name: str
    size: int


def tar_files(archive: BinaryIO, *, max_entries: int) -> Iterator[TarFile]:
    """The regular files, in order. The caller may read a file's bytes from `archive` before asking for the next.

    `max_entries`: of files and directories together. Whoever asks to the end has read all of `archive`.
    Raises TarRefused.
    """
    name: str | None = None  # from an extension header: it is about the next file
    entries = extensions = 0
    for _ in range(_HEADERS_PER_ENTRY * max_entries + 1):
        header = archive.read(_BLOCK)
        if len(header) < _BLOCK:
            raise TarRefused("it ends in the middle")
        if not any(header):
            _expect_end(archive)
            return
        if not is_header(header):
            raise TarRefused("it has a damaged header")
        size, kind = _number(header[124:136]), header[156:157]
        if kind in (_PAX, _PAX_GLOBAL, _GNU_NAME):
            extensions += size
            if size > _MAX_EXTENSION or extensions > _MAX_EXTENSIONS:
                raise TarRefused("it has an oversized header")
            data = _extension(archive, size)
            name = _text(data.split(b"\0")[0]) if kind == _GNU_NAME else _pax_name(data) or name
            if kind == _PAX_GLOBAL:
                name = None
            continue
        if kind not in _FILE and kind != _DIRECTORY:
            hint = "; with -h, tar packs what links lead to" if kind in _LINKS else ""
            raise TarRefused(f"it holds a link or another special file{hint}")
        entries += 1
        if entries > max_entries:
            break
        start = archive.tell()
        if kind in _FILE:
            yield TarFile(name if name is not None else _plain_name(header), size)
        name = None
        _skip(archive, start + -(-size // _BLOCK) * _BLOCK - archive.tell())
    raise TarRefused(f"it holds more than {max_entries} entries")


def is_header(block: bytes) -> bool:
    """Whether a block is one that an entry of a tar archive begins with: it carries its own check sum."""
    if len(block) < _BLOCK or not any(block):
        return False
    try:
        stated = _number(block[148:156])
    except TarRefused:
        return False
    return stated == sum(block[:148]) + 8 * ord(" ") + sum(block[156:_BLOCK])


class Gunzipped(io.RawIOBase):
    """What a gzip file unpacks to, with its check sums checked; the file stays the caller's.

    Several streams in one file count as one, but no more than `_MAX_STREAMS`: the standard library takes any number,
    and empty ones make it work for nothing. Reading raises TarRefused, EOFError and zlib.error.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._packed = b""
        self._inflate: zlib._Decompress | None = None
        self._streams = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        target = memoryview(buffer).cast("B")
        while True:
            self._packed = self._packed or self._file.read(_COPY)
            is_at_end = not self._packed
            if self._inflate is None:
                self._packed = self._packed.lstrip(b"\0")  # what tapes fill their blocks with
                if is_at_end:
                    return 0
                if not self._packed:
                    continue
                self._inflate = self._next_stream()
            data = self._inflate.decompress(self._packed, len(target))
            if self._inflate.eof:
                self._packed, self._inflate = self._inflate.unused_data, None
            elif is_at_end and not data:
                raise EOFError("it ends in the middle")
            else:
                self._packed = self._inflate.unconsumed_tail
            if data:
                target[: len(data)] = data
                return len(data)

    def _next_stream(self) -> zlib._Decompress:
        if self._streams and not self._packed.startswith(_GZIP[:1]):
            raise TarRefused("something follows its end")
        self._streams += 1
        if self._streams > _MAX_STREAMS:
            raise TarRefused(f"it is made of more than {_MAX_STREAMS} gzip streams")
        return zlib.decompressobj(wbits=31)


def _plain_name(header: bytes) -> str:
    name, prefix = header[:100].split(b"\0")[0], header[345:500].split(b"\0")[0]
    return _text(prefix + b"/" + name if prefix and header[257:263] == b"ustar\0" else name)


def _extension(archive: BinaryIO, size: int) -> bytes:
    padded = -(-size // _BLOCK) * _BLOCK
    data = archive.read(padded)
    if len(data) < padded:
        raise TarRefused("it ends in the middle")
    return data[:size]


def _pax_name(data: bytes) -> str | None:
    """`path` of a pax header; records are b"<length> <key>=<value>\\n"."""
    name, start = None, 0
    for _ in range(_MAX_RECORDS):
        if start == len(data):
            return name
        digits, space, _ = data[start : start + 20].partition(b" ")
        if not space or not digits.isdigit() or not len(digits) + 2 < int(digits) <= len(data) - start:
            raise TarRefused("it has a damaged header")
        end = start + int(digits)
        key, _, value = data[start + len(digits) + 1 : end - 1].partition(b"=")
        if key in (b"size", b"linkpath") or key.startswith(b"GNU.sparse"):
            raise TarRefused("it holds a link or another special file")
        if key == b"path":
            name = _text(value)
        start = end
    raise TarRefused("it has an oversized header")


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
        data = archive.read(min(count, _COPY))
        if not data:
            raise TarRefused("it ends in the middle")
        count -= len(data)


def _expect_end(archive: BinaryIO) -> None:
    """Read what follows the last entry: nothing but some zeros. So check sums of what is around it are checked too."""
    left = _MAX_PADDING
    while data := archive.read(_COPY):
        left -= len(data)
        if left < 0 or any(data):
            raise TarRefused("something follows its end")
