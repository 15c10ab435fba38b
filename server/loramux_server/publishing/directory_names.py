"""Which adapters a directory of adapters holds: DIR/NAME, and DIR/ORG/NAME, which is called ORG/NAME."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from loramux_adapters.artifact.format import SOURCE_FILES

_CHECKPOINT = re.compile(r"checkpoint-[0-9]+")


def adapter_names(directory: Path) -> list[str]:
    """The names of its subdirectories, and of theirs where they hold no file of an adapter; in order.

    What begins with a dot is no adapter: it is where to put files together before a rename. Nor is a checkpoint that a
    trainer leaves below its output. Links are named, so that they can be refused, and not gone into. Raises OSError.
    """
    names = []
    for name in _subdirectories(directory):
        names.append(name)
        within = directory / name
        if not within.is_symlink() and not any(os.path.lexists(within / file) for file in SOURCE_FILES):
            names += [f"{name}/{below}" for below in _adapters_in(within) if not _CHECKPOINT.fullmatch(below)]
    return sorted(names)


def _subdirectories(directory: Path) -> Iterator[str]:
    with os.scandir(directory) as entries:
        for entry in entries:
            if not entry.name.startswith(".") and (entry.is_dir(follow_symlinks=False) or entry.is_symlink()):
                yield entry.name


def _adapters_in(directory: Path) -> list[str]:
    """Those that hold files of an adapter; none of one that cannot be read: its turn comes again."""
    try:
        return [
            name
            for name in _subdirectories(directory)
            if any(os.path.lexists(directory / name / file) for file in SOURCE_FILES)
        ]
    except OSError:
        return []
