"""The files of an adapter in a directory of this machine: what they look like now, and a copy to check and publish.

No symbolic link is followed, neither in the way from the root to the directory nor for a file in it: each step is
opened from the one before, so nothing that is changed meanwhile leads elsewhere.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from loramux_adapters.artifact.format import CONFIG_FILE, KNOWN_FILES, TOKENIZER_FILES, WEIGHTS_FILE
from loramux_adapters.errors import AdapterRejected, AdapterTooLarge


class LinkInTheWay(AdapterRejected):
    """A symbolic link, or another special file, stands where a directory or a file should."""


# (name, device, inode, bytes, time of the last change in nanoseconds) of each file that is there.
Look = tuple[tuple[str, int, int, int, int], ...]


def look_at(root: Path, parts: Sequence[str]) -> Look:
    """The files of the adapter in `root/parts...`, in order of their names; none for a directory that is not there.

    Raises LinkInTheWay, OSError.
    """
    with _opened(root, parts) as directory:
        return _look(directory) if directory is not None else ()


def is_complete(look: Look) -> bool:
    """Whether the files are there without which there is no adapter."""
    return {CONFIG_FILE, WEIGHTS_FILE} <= {name for name, *_ in look}


def copy_adapter(root: Path, parts: Sequence[str], target: Path, *, limit: int) -> Look:
    """Copy the adapter's files into `target`; returns what it looked like before, () if there is none.

    To be sure that it was not changed meanwhile, look at it again. Raises LinkInTheWay, AdapterTooLarge (`limit` is
    in bytes, of all files together), OSError.
    """
    with _opened(root, parts) as directory:
        look = _look(directory) if directory is not None else ()
        if sum(size for *_, size, _ in look) > limit:
            raise AdapterTooLarge(limit)
        for name, _, _, size, _ in look:
            with _file(directory, name) as source, (target / name).open("xb") as copy:
                shutil.copyfileobj(_FileAsItWas(source, size), copy, 2**20)
        return look


class _FileAsItWas:
    """A file that may grow while it is read: no more is read than there was."""

    def __init__(self, descriptor: int, size: int) -> None:
        self._descriptor, self._left = descriptor, size

    def read(self, size: int = -1, /) -> bytes:
        data = os.read(self._descriptor, self._left if size < 0 else min(size, self._left))
        self._left -= len(data)
        return data


@contextmanager
def _opened(root: Path, parts: Sequence[str]) -> Iterator[int | None]:
    """A descriptor of the directory; None if there is none."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    descriptor: int | None = None
    try:
        descriptor = os.open(root, flags)
        for part in parts:
            assert part not in ("", ".", "..") and "/" not in part
            above = descriptor
            try:
                descriptor = os.open(part, flags | os.O_NOFOLLOW, dir_fd=above)
            except FileNotFoundError:
                descriptor = None
                break
            except OSError as error:
                descriptor = None
                if error.errno in (errno.ENOTDIR, errno.ELOOP):
                    raise LinkInTheWay(["the way to the adapter holds a symbolic link or a file"]) from error
                raise
            finally:
                os.close(above)
        yield descriptor
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _look(directory: int) -> Look:
    found = []
    for name in dict.fromkeys((*KNOWN_FILES, *TOKENIZER_FILES)):
        try:
            status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        except FileNotFoundError:
            continue
        if not stat.S_ISREG(status.st_mode):
            raise LinkInTheWay([f"{name} is a symbolic link or another special file; put the file itself there"])
        found.append((name, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns))
    return tuple(found)


@contextmanager
def _file(directory: int | None, name: str) -> Iterator[int]:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(name, flags, dir_fd=directory)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise LinkInTheWay([f"{name} is a symbolic link; put the file itself there"]) from error
        raise
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise LinkInTheWay([f"{name} is not a regular file"])
        yield descriptor
    finally:
        os.close(descriptor)
