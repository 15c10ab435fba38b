"""A new directory that has its name only when everything is in it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loramux_adapters.errors import CheckpointError


@contextmanager
def whole_directory(out: Path) -> Iterator[Path]:
    """A directory to fill, which gets the name `out` at the end if nothing was raised; otherwise it is removed.

    Raises:
        CheckpointError: `out` is there and not empty, or cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} is there already and not empty; name a new directory with --out")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise cannot_write(out, error) from error
    try:
        yield partial
        partial.chmod(0o755)  # it and some of its files were made for us alone
        for path in partial.iterdir():
            path.chmod(0o644)
        partial.rename(out)
    except OSError as error:
        raise cannot_write(out, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def cannot_write(directory: Path, error: OSError) -> CheckpointError:
    """What to tell of a disk that does not take it."""
    return CheckpointError(
        f"{directory} cannot be written ({error.strerror or error}); free some space or name another"
    )
