"""What the cache directory holds is whole or not there: it is written beside its place and then renamed."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loramux_server.errors import BaseModelError


@contextmanager
def partial_directory(target: Path) -> Iterator[Path]:
    """A fresh directory beside `target`, removed at the end unless it was renamed.

    One process at a time has one in a cache, so what an earlier one left behind was killed, and is removed.

    Raises:
        BaseModelError: the cache cannot be written to.
    """
    cache, prefix = target.parent, f".{target.name}-"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = os.open(cache, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise _cache_failed(cache, error) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # goes with the process, however it ends
        for left in [path for path in cache.iterdir() if path.name.startswith(prefix)]:
            shutil.rmtree(left, ignore_errors=True)
        try:
            partial = Path(tempfile.mkdtemp(prefix=prefix, dir=cache))
        except OSError as error:
            raise _cache_failed(cache, error) from error
        try:
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    finally:
        os.close(lock)


@contextmanager
def borrowed_cache(cache: Path) -> Iterator[Path]:
    """A cache directory that holds what `cache` holds, as links; what is added to it is gone at the end."""
    with tempfile.TemporaryDirectory(prefix="loramux-") as scratch:
        for path in cache.iterdir() if cache.is_dir() else ():
            link = Path(scratch) / path.name
            if path.is_dir() and not (path / "config.json").is_file():  # holds several things, and gets more
                link.mkdir()
                for each in path.iterdir():
                    (link / each.name).symlink_to(each.resolve())
            else:
                link.symlink_to(path.resolve())
        yield Path(scratch)


def _cache_failed(cache: Path, error: OSError) -> BaseModelError:
    return BaseModelError(
        f"the cache directory {cache} cannot be used ({error.strerror}); name another with --cache-dir"
    )
