"""How much a library has written so far, where it does not say so itself: its directory is looked at."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def growth_told(directory: Path, tell: Callable[[int], None], *, every: float) -> Iterator[None]:
    """For as long as this lasts, a thread tells the bytes that the directory has gained, every so many seconds."""
    ended = threading.Event()
    before = bytes_in(directory)

    def watch() -> None:
        while not ended.wait(every):
            tell(max(0, bytes_in(directory) - before))

    watcher = threading.Thread(target=watch, name="growth", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def bytes_in(directory: Path) -> int:
    """Of all plain files below; links are not followed. A directory that is not there holds none."""
    total = 0
    for path in directory.rglob("*"):
        try:
            total += path.lstat().st_size if path.is_file() and not path.is_symlink() else 0
        except OSError:  # it has just gone
            continue
    return total
