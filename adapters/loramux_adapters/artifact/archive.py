"""A zip, tar or tar.gz of an adapter's directory -> its files, without trusting a name, a size or a link in it."""

from __future__ import annotations

import io
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

from loramux_adapters.artifact.config import CONFIG_FILE
from loramux_adapters.artifact.tar_reader import Gunzipped, TarRefused, is_header, tar_files
from loramux_adapters.errors import AdapterRejected, AdapterTooLarge

MAX_ENTRIES = 1000  # files and directories
MAX_NAME = 1024
MAX_PART_BYTES = 255  # of one component of a path, what file systems take
_MAX_READ = 2**20  # of one call: what the directory of a zip may have
_COPY = 64 * 2**10
_ZIP, _GZIP = b"PK\x03\x04", b"\x1f\x8b"
_OTHERS = {
    b"BZh": "packed with bzip2",
    b"\xfd7zXZ": "packed with xz",
    b"\x28\xb5\x2f\xfd": "packed with zstd",
    b"7z\xbc\xaf": "a 7-Zip archive",
    b"Rar!": "a RAR archive",
    b"GGUF": "a GGUF file",
}
# What weights unpack to is little more than what they are packed to; zeros of a layer that was not trained are.
_MAX_RATIO = 100
_RATIO_FREE = 16 * 2**20
# What is not file content, headers and padding, is at most some KiB for each entry.
_OVERHEAD = 64 * 2**20
# What zipfile and zlib raise over bytes that somebody has tampered with.
_DAMAGE = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, ValueError, RuntimeError)
_DEFLATE_OR_STORED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


@dataclass(frozen=True, slots=True)
class Member:
    """One regular file. `open` is valid until the next member is asked for."""

    path: PurePosixPath
    size: int
    content: BinaryIO


@dataclass(frozen=True, slots=True)
class _Bound:
    """How many bytes an archive may unpack to, and what is raised for more."""

    nbytes: int
    too_large: Exception

    @classmethod
    def of(cls, archive: Path, limit: int) -> _Bound:
        in_proportion = _MAX_RATIO * archive.stat().st_size + _RATIO_FREE
        if in_proportion < limit:
            return cls(in_proportion, AdapterRejected(["the archive unpacks to far more than weights would"]))
        return cls(limit, AdapterTooLarge(limit))


def unpack(archive: Path, target: Path, limit: int) -> None:
    """Write the files of the archive's adapter into `target`; folders beside or below it are left out.

    The adapter is where the archive's topmost adapter_config.json is. What the archive is packed with is told by its
    first bytes, not by a name. Blocks; at most `limit` bytes are written or unpacked, and no more than are in
    proportion to those that came.
    Raises AdapterRejected, AdapterTooLarge, OSError.
    """
    bound = _Bound.of(archive, limit)
    try:
        folder = _topmost_folder(archive, bound)
        with _members(archive, bound) as members:
            for member in members:
                if member.path.parent == folder:
                    _copy(member, target / member.path.name, bound.nbytes)
    except TarRefused as error:
        raise AdapterRejected([f"the archive cannot be used: {error}"]) from error
    except _DAMAGE as error:
        raise AdapterRejected(["the archive is damaged"]) from error


def _topmost_folder(archive: Path, bound: _Bound) -> PurePosixPath:
    """The folder of the topmost config. Looks at every member, so that nothing is written of an archive to refuse."""
    total = 0
    seen: set[PurePosixPath] = set()
    with _members(archive, bound) as members:
        for member in members:
            total += member.size
            if total > bound.nbytes:
                raise bound.too_large
            if member.path in seen:
                raise AdapterRejected(["the archive holds two files of one name"])
            seen.add(member.path)
    folders = sorted((path.parent for path in seen if path.name == CONFIG_FILE), key=lambda folder: len(folder.parts))
    if not folders:
        raise AdapterRejected([f"the archive holds no {CONFIG_FILE}"])
    if len(folders) > 1 and len(folders[0].parts) == len(folders[1].parts):
        raise AdapterRejected([f"the archive holds more than one {CONFIG_FILE} at its top"])
    return folders[0]


def _members(archive: Path, bound: _Bound) -> AbstractContextManager[Iterator[Member]]:
    with archive.open("rb") as file:
        start = file.read(512)
    if start.startswith(_ZIP):
        return _zip_members(archive)
    if start.startswith(_GZIP) or is_header(start):
        return _tar_members(archive, bound, zipped=start.startswith(_GZIP))
    what = next((what for magic, what in _OTHERS.items() if start.startswith(magic)), None)
    if what is None and start[8:9] == b"{":
        what = "a safetensors file, which the part 'weights' is for, beside the part 'config'"
    if what is not None:
        raise AdapterRejected([f"the archive is {what}; a zip, tar or tar.gz is taken"])
    raise AdapterRejected(["the archive is neither a zip nor a tar or tar.gz"])


@contextmanager
def _tar_members(archive: Path, bound: _Bound, *, zipped: bool) -> Iterator[Iterator[Member]]:
    with archive.open("rb") as file:
        plain = cast(BinaryIO, io.BufferedReader(Gunzipped(file), _COPY)) if zipped else file
        stream = cast(BinaryIO, _BoundedStream(plain, bound.nbytes + _OVERHEAD, bound.too_large))
        entries = tar_files(stream, max_entries=MAX_ENTRIES)
        yield (Member(_safe(entry.name), entry.size, stream) for entry in entries)


@contextmanager
def _zip_members(archive: Path) -> Iterator[Iterator[Member]]:
    with ExitStack() as stack:
        file = _SmallReads(stack.enter_context(archive.open("rb", buffering=0)))
        container = stack.enter_context(zipfile.ZipFile(file))

        def members() -> Iterator[Member]:
            entries = container.infolist()
            if len(entries) > MAX_ENTRIES:
                raise AdapterRejected([f"the archive cannot be used: it holds more than {MAX_ENTRIES} entries"])
            for entry in entries:
                mode = entry.external_attr >> 16
                if entry.filename.endswith("/"):  # `is_dir` fails for an empty name
                    continue
                if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
                    raise AdapterRejected(["the archive holds a link or another special file"])
                if entry.flag_bits & 1 or entry.compress_type not in _DEFLATE_OR_STORED:
                    raise AdapterRejected(["the archive is encrypted, or packed in a way other than deflate"])
                path = _safe(entry.filename)
                with container.open(entry) as content:
                    yield Member(path, entry.file_size, cast(BinaryIO, content))

        yield members()


def _safe(name: str) -> PurePosixPath:
    """The name as a relative path. Raises AdapterRejected if it could be taken for anything else."""
    parts = name.removeprefix("./").split("/")
    is_long = len(name) > MAX_NAME or len(parts[-1].encode(errors="replace")) > MAX_PART_BYTES
    if is_long or any(part in ("", ".", "..") for part in parts) or not name.isprintable():
        raise AdapterRejected(["the archive holds a name that is absolute, too long, or leads out of it"])
    if "\\" in name or ":" in name:
        raise AdapterRejected(["the archive holds a name with a backslash or a colon"])
    return PurePosixPath(*parts)


def _copy(member: Member, target: Path, limit: int) -> None:
    left = min(member.size, limit)
    with target.open("xb") as file:
        while left:
            data = member.content.read(min(left, _COPY))
            if not data:
                raise EOFError("a file of the archive is shorter than it says")
            file.write(data)
            left -= len(data)


class _BoundedStream:
    """A decompressed stream, read from front to back, that gives out at most so many bytes."""

    def __init__(self, file: BinaryIO, limit: int, too_large: Exception) -> None:
        self._file, self._left, self._too_large = file, limit, too_large
        self._position = 0

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self._position += len(data)
        if self._position > self._left:
            raise self._too_large
        return data

    def tell(self) -> int:
        return self._position


class _SmallReads(io.BufferedReader):
    """A file that refuses a large read: how a zip with a huge directory is found before it is in memory.

    A place that no file has is damage too, and nothing else: zipfile goes wherever the directory points.
    """

    def __init__(self, raw: io.FileIO) -> None:
        super().__init__(raw)

    def seek(self, offset: int, whence: int = 0, /) -> int:
        try:
            return super().seek(offset, whence)
        except (OSError, OverflowError) as error:
            raise zipfile.BadZipFile("the directory points outside of the file") from error

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:
            size = _MAX_READ + 1
        data = super().read(min(size, _MAX_READ + 1))
        if len(data) > _MAX_READ:
            raise zipfile.BadZipFile("the directory is too large")
        return data
