"""Files that only the server's own user may read: how they come into being, and SQLite on them."""

from __future__ import annotations

import os
import secrets
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

from loramux_adapters.durable_files import sync
from loramux_server.errors import AccessUnavailable

BUSY_SECONDS = 5.0


def make_private(path: Path, fill: Callable[[Path], object]) -> None:
    """A file for this user alone, unless it is there; whoever sees it sees all of it."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    try:
        os.close(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        fill(new)
        sync(new)
        with suppress(FileExistsError):  # another process was first
            os.link(new, path)
        sync(path.parent)
    finally:
        new.unlink(missing_ok=True)


def make_database(path: Path, schema: str, version: int) -> None:
    """Empty tables in a private file, unless it is there."""

    def fill(new: Path) -> None:
        with closing(sqlite3.connect(new, isolation_level=None)) as connection:  # closed, it is one file again
            connection.execute("PRAGMA journal_mode = WAL")  # stays with it: who reads never waits for who writes
            connection.executescript(f"{schema} PRAGMA user_version = {version};")

    make_private(path, fill)


def connected(path: Path, version: int) -> sqlite3.Connection:
    """A connection to a database that is there, for any thread. Raises AccessUnavailable, sqlite3.Error."""
    address = f"{path.absolute().as_uri()}?mode=rw"  # not made here: an empty one would say that nobody has a key
    connection = sqlite3.connect(address, uri=True, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        (found,) = connection.execute("PRAGMA user_version").fetchone()
        if found != version:
            raise AccessUnavailable(f"{path.name} was written by a newer loramux; run that one")
    except BaseException:
        connection.close()
        raise
    return connection
