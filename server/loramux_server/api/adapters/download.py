"""A stored adapter as a tar.gz, made while it is sent."""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path

from loramux_adapters.artifact.format import KNOWN_FILES
from loramux_server.api.http.worker_threads import run_in_thread

_BLOCK = 256 * 2**10
_TAR_BLOCK = 512
_LEVEL = 1  # weights hardly shrink


async def packed(directory: Path, root: str) -> AsyncGenerator[bytes, None]:
    """The files of the version in `directory`, in a folder `root`, packed in worker threads."""
    pieces = _pieces(directory, root)
    while piece := await run_in_thread(_next_piece, pieces):
        yield piece


def _next_piece(pieces: Iterator[bytes]) -> bytes:
    """The next piece that is not empty; empty at the end."""
    return next((piece for piece in pieces if piece), b"")


def _pieces(directory: Path, root: str) -> Iterator[bytes]:
    compress = zlib.compressobj(_LEVEL, wbits=31)
    files = (path for path in directory.iterdir() if path.name in KNOWN_FILES)
    for path in sorted(path for path in files if path.is_file() and not path.is_symlink()):
        with path.open("rb") as file:
            entry = tarfile.TarInfo(f"{root}/{path.name}")
            entry.size = path.stat().st_size
            yield compress.compress(entry.tobuf(tarfile.USTAR_FORMAT))
            left = entry.size
            while left:
                data = file.read(min(_BLOCK, left))
                if not data:
                    raise OSError("a stored file became shorter while it was sent")
                left -= len(data)
                yield compress.compress(data)
            yield compress.compress(bytes(-entry.size % _TAR_BLOCK))
    yield compress.compress(bytes(2 * _TAR_BLOCK))
    yield compress.flush()
