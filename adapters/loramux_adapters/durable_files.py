"""Files that are there whole or not at all, also after a crash."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Puts the content in place of the file in one step; raises OSError, and then the file is as it was."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Forces a file, or the names in a directory, to the disk."""
    opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def replace_directory(filled: Path, target: Path) -> None:
    """A filled directory takes the place of another, with everything in it on disk before it has its name."""
    for path in filled.iterdir():
        sync(path)
    sync(filled)
    aside = target.with_name(f".{target.name}.old")
    remove_tree(aside)
    if target.exists():
        os.rename(target, aside)
    os.rename(filled, target)
    sync(target.parent)
    remove_tree(aside)


def remove_tree(directory: Path) -> None:
    """Removes a directory of plain files, if it is there. Raises OSError."""
    if not directory.is_dir():
        return
    for path in directory.iterdir():
        remove_tree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    directory.rmdir()
