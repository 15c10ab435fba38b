"""Files that are there whole or not at all, also after a crash."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from loramux_adapters.digests import sha256_of_json


def write_whole(path: Path, content: bytes) -> None:
    """Puts the content in place of the file in one step; raises OSError, and then the file is as it was."""
    write_beside(path, content)
    put_in_place(path)


def write_beside(path: Path, content: bytes) -> None:
    """Forces the content to disk under another name; `put_in_place` or `drop_beside` has to follow. Raises OSError."""
    partial = _beside(path)
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def put_in_place(path: Path) -> None:
    """What `write_beside` wrote becomes the file, in one step. Raises OSError, and then the file is as it was."""
    try:
        os.replace(_beside(path), path)
    except OSError:
        drop_beside(path)
        raise
    sync(path.parent)


def drop_beside(path: Path) -> None:
    """Forgets what `write_beside` wrote."""
    _beside(path).unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Forces a file, or the names in a directory, to the disk."""
    opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def sealed(content: dict[str, Any]) -> bytes:
    """JSON that shows by itself whether it is whole: the content and its check sum."""
    return json.dumps({"sha256": sha256_of_json(content), "content": content}, indent=1).encode() + b"\n"


def unsealed(raw: bytes) -> dict[str, Any]:
    """What was `sealed`. Raises ValueError if it is not that any more."""
    try:
        whole = json.loads(raw)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(whole, dict) or not isinstance(content := whole.get("content"), dict):
        raise ValueError("not sealed")
    if whole.get("sha256") != sha256_of_json(content):
        raise ValueError("its check sum is another one")
    return content


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


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")
