"""The files of an adapter in a directory of this machine: what they look like now, and a copy to check and publish.

The copy is a PEFT directory, also where the files are mlx-lm's.

Links are followed as `artifact/reading/own_files.py` says: inside the adapter's own root, and no further.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from loramux_adapters.artifact.format import (
    CONFIG_FILE,
    MLX_WEIGHTS_FILE,
    PICKLES,
    SOURCE_FILES,
    WEIGHTS_FILE,
    pickle_reason,
)
from loramux_adapters.artifact.mlx_layout import convert_mlx
from loramux_adapters.artifact.reading.own_files import OwnDirectory, own_directory
from loramux_adapters.errors import AdapterTooLarge

# (name, device, inode, bytes, time of the last change in nanoseconds) of each file that is there.
Look = tuple[tuple[str, int, int, int, int], ...]


def look_at(root: Path, parts: Sequence[str]) -> Look:
    """The files of the adapter in `root/parts...`, in order of their names; none for a directory that is not there.

    Raises LinkInTheWay, OSError.
    """
    with own_directory(root, parts) as directory:
        return _look(directory) if directory is not None else ()


def is_complete(look: Look) -> bool:
    """Whether the files are there without which there is no adapter."""
    names = {name for name, *_ in look}
    return CONFIG_FILE in names and bool({WEIGHTS_FILE, MLX_WEIGHTS_FILE} & names)


def unread_weights(root: Path, parts: Sequence[str]) -> str | None:
    """Why waiting for an adapter's weights is in vain: they are there, as a pickle. None if they may still come.

    Raises LinkInTheWay, OSError.
    """
    with own_directory(root, parts) as directory:
        if directory is None or directory.look(CONFIG_FILE) is None:
            return None
        return next((pickle_reason(name) for name in PICKLES if directory.look(name) is not None), None)


def copy_adapter(root: Path, parts: Sequence[str], target: Path, *, limit: int | None) -> Look:
    """Copy the adapter's files into `target`; returns what it looked like before, () if there is none.

    To be sure that it was not changed meanwhile, look at it again. Raises AdapterTooLarge (`limit` is in bytes, of all
    files together), AdapterRejected for a link that leads out and for what cannot be converted, OSError.
    """
    with own_directory(root, parts) as directory:
        if directory is None:
            return ()
        look = _look(directory)
        if limit is not None and sum(size for *_, size, _ in look) > limit:
            raise AdapterTooLarge(limit)
        for name, _, _, size, _ in look:
            descriptor = directory.open(name)
            try:
                with (target / name).open("xb") as copy:
                    shutil.copyfileobj(_FileAsItWas(descriptor, size), copy, 2**20)
            finally:
                os.close(descriptor)
    convert_mlx(target)
    return look


class _FileAsItWas:
    """A file that may grow while it is read: no more is read than there was."""

    def __init__(self, descriptor: int, size: int) -> None:
        self._descriptor, self._left = descriptor, size

    def read(self, size: int = -1, /) -> bytes:
        data = os.read(self._descriptor, self._left if size < 0 else min(size, self._left))
        self._left -= len(data)
        return data


def _look(directory: OwnDirectory) -> Look:
    found = []
    for name in SOURCE_FILES:
        status = directory.look(name)
        if status is not None:
            found.append((name, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns))
    return tuple(found)
