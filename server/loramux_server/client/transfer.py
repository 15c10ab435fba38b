"""An adapter directory on its way between client and server: the files of a form out, a tar.gz archive in."""

from __future__ import annotations

import gzip
import io
import os
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import IO, TYPE_CHECKING

from loramux_adapters.artifact.format import MLX_WEIGHTS_FILE, PICKLES, UPLOAD_PARTS, pickle_reason
from loramux_adapters.artifact.reading.own_files import open_regular
from loramux_adapters.errors import AdapterRejected
from loramux_server.errors import CommandFailed

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

REQUIRED = ("config", "weights")
CHUNK_BYTES = 256 * 1024
MAX_PADDING_BYTES = 1 << 20  # tar fills its last block with zeros
MAX_EXTRACTED_BYTES = 16 << 30
MAX_ENTRIES = 1000


def files_to_send(directory: Path) -> dict[str, Path]:
    """The files of a PEFT adapter that an upload is made of, by the names of the form's parts.

    Raises CommandFailed if the directory is not a PEFT adapter with safetensors weights.
    """
    if not directory.exists():
        raise CommandFailed(f"there is no directory {directory}; an adapter on the hub is named owner/name")
    if not directory.is_dir():
        raise CommandFailed(f"{directory} is not a directory")
    paths = {part: directory / name for part, name in UPLOAD_PARTS.items()}
    if not paths["weights"].is_file() and (directory / MLX_WEIGHTS_FILE).is_file():
        paths["weights"] = directory / MLX_WEIGHTS_FILE  # the server converts them
    for part in REQUIRED:
        if not paths[part].is_file():
            pickles = [name for name in PICKLES if part == "weights" and (directory / name).exists()]
            hint = f": {pickle_reason(pickles[0])}" if pickles else ""
            raise CommandFailed(f"{directory} holds no {UPLOAD_PARTS[part]}{hint}")
    return {part: path for part, path in paths.items() if path.is_file()}


def open_to_send(path: Path) -> BufferedReader:
    """Raises CommandFailed for what is no file, and for a link that leads out of the adapter's own root."""
    try:
        return open_regular(path)
    except AdapterRejected as error:
        raise CommandFailed(f"{path.parent} cannot be sent: {error}") from error


class ArchiveStream(io.RawIOBase):
    """The pieces of an archive, as they come from the network, as one stream to read."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._left = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        while not self._left and (piece := next(self._pieces, None)) is not None:
            self._left = memoryview(piece)
        target = memoryview(buffer).cast("B")
        count = min(len(target), len(self._left))
        target[:count], self._left = self._left[:count], self._left[count:]
        return count


def extract(archive: IO[bytes], target: Path, *, max_bytes: int = MAX_EXTRACTED_BYTES) -> list[str]:
    """Unpacks an adapter archive into a new directory, all of it or nothing, and returns the names of its files.

    Only regular files with an adapter's file names are written, whatever folder they stand in; anything else in the
    archive is refused.

    Args:
        archive: a tar.gz stream, read once from front to back.
        target: must not exist yet, or be an empty directory.
        max_bytes: most bytes to write in all.

    Raises:
        CommandFailed: the target is in the way, or the archive is damaged, too large, or holds what it should not.
    """
    check_target(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".loramux-", dir=target.parent))
    except OSError as error:
        raise CommandFailed(f"cannot write to {target.parent}: {error.strerror}") from error
    try:
        names = _unpack(archive, staging, max_bytes)
        staging.chmod(0o755)
        os.replace(staging, target)  # takes the place of an empty directory, fails for any other
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise CommandFailed(f"the archive that the server sent is damaged: {error}") from error
    except OSError as error:
        raise CommandFailed(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return names


def check_target(target: Path) -> None:
    """Raises CommandFailed unless the directory is absent or empty."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise CommandFailed(f"{target} exists and is not a directory")
    if target.exists() and any(target.iterdir()):
        raise CommandFailed(f"{target} is not empty; name a new directory")


def _unpack(archive: IO[bytes], staging: Path, max_bytes: int) -> list[str]:
    names: list[str] = []
    unzipped = gzip.GzipFile(fileobj=archive)
    with tarfile.open(fileobj=unzipped, mode="r|") as tar:
        for count, member in enumerate(tar):
            if count == MAX_ENTRIES:
                raise CommandFailed(f"the archive that the server sent holds more than {MAX_ENTRIES} entries")
            if member.isdir():
                continue
            name = Path(member.name).name
            if not member.isreg() or name not in UPLOAD_PARTS.values() or name in names:
                raise CommandFailed(
                    f"the archive that the server sent holds {member.name!r}, which is not expected there"
                )
            max_bytes -= member.size
            if max_bytes < 0:
                raise CommandFailed("the archive that the server sent is larger than an adapter can be")
            source = tar.extractfile(member)
            assert source is not None  # a regular file
            with (staging / name).open("xb") as file:
                shutil.copyfileobj(source, file, CHUNK_BYTES)
            names.append(name)
    if len(unzipped.read(MAX_PADDING_BYTES + 1)) > MAX_PADDING_BYTES:  # reading to the end checks the checksum
        raise CommandFailed("the archive that the server sent has something behind its end")
    missing = [UPLOAD_PARTS[part] for part in REQUIRED if UPLOAD_PARTS[part] not in names]
    if missing:
        raise CommandFailed(f"the archive that the server sent holds no {' and no '.join(missing)}")
    return names
