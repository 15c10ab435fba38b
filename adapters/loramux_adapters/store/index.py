"""The store's index: which names there are, and which versions each has had. One SQLite file, any number of processes.

WAL, so that a lookup never waits for a write; synchronous=FULL, so that what was committed survives a power cut.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from loramux_adapters.errors import StoreUnavailable
from loramux_adapters.store.changes import IndexWriter
from loramux_adapters.store.rows import Digests, KeptVersion, select_kept

SCHEMA_VERSION = 2
# A name points at one version (`adapters.digest`), which is among those it keeps (`history`, newest last).
_SCHEMA = (
    """CREATE TABLE versions (
        digest TEXT PRIMARY KEY, rank INTEGER NOT NULL, target_modules TEXT NOT NULL, nbytes INTEGER NOT NULL,
        created INTEGER NOT NULL
    )""",
    """CREATE TABLE history (
        id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL,
        digest TEXT NOT NULL REFERENCES versions (digest),
        base_id TEXT, checked_base TEXT, created INTEGER NOT NULL, UNIQUE (name, digest)
    )""",
    """CREATE TABLE adapters (
        name TEXT PRIMARY KEY, digest TEXT NOT NULL, created INTEGER NOT NULL, updated INTEGER NOT NULL,
        FOREIGN KEY (name, digest) REFERENCES history (name, digest) DEFERRABLE INITIALLY DEFERRED
    )""",
)
# From the schema of this number to the next.
_MIGRATIONS: Mapping[int, Sequence[str]] = {
    0: _SCHEMA,
    1: (
        "ALTER TABLE adapters ADD COLUMN pinned INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE versions ADD COLUMN corrupt INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE history ADD COLUMN fingerprint TEXT NOT NULL DEFAULT 'none'",
    ),
}


@contextmanager
def storage_errors(doing: str) -> Iterator[None]:
    """Turn what the disk and SQLite raise into `StoreUnavailable`, which names no path."""
    try:
        yield
    except OSError as error:
        raise StoreUnavailable(
            f"the adapter store failed while {doing}: {error.strerror or type(error).__name__}"
        ) from error
    except sqlite3.Error as error:
        raise StoreUnavailable(f"the adapter store failed while {doing}: {error}") from error


class StoreIndex:
    """Reads share one connection under a short lock; writes have their own, and one transaction runs at a time."""

    def __init__(self, path: Path, *, busy_timeout: float) -> None:
        """Open or create the index. `busy_timeout`: seconds to wait for another process's write."""
        self._read_lock = threading.Lock()
        self._write_lock = threading.Lock()
        with storage_errors("opening its index"):
            self._writer = _connect(path, busy_timeout)
            try:
                self._prepare()
                self._reader = _connect(path, busy_timeout)
            except BaseException:
                self._writer.close()
                raise

    def close(self) -> None:
        with self._write_lock, self._read_lock:
            self._reader.close()
            self._writer.close()

    @contextmanager
    def write(self) -> Iterator[IndexWriter]:
        """One transaction: all of the block is committed at its end, or, if it raises, none of it.

        The write lock is held from the start, against other processes too.
        """
        with self._write_lock:
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield IndexWriter(self._writer)
                self._writer.execute("COMMIT")
            except BaseException:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                raise

    def kept(self, name: str) -> list[KeptVersion]:
        """The versions the name keeps, newest first; empty for an unknown name."""
        return self._select("WHERE h.name = ? ORDER BY h.id DESC", (name,))

    def all_kept(self, *, pinned: bool = False) -> list[KeptVersion]:
        """The versions of all names, or of pinned names alone, by name, newest first."""
        return self._select(("WHERE a.pinned " if pinned else "") + "ORDER BY h.name, h.id DESC", ())

    def digests(self) -> Digests:
        """All versions, as of one moment."""
        with self._read_lock:
            rows = self._reader.execute(
                "SELECT digest, digest IN (SELECT digest FROM adapters) FROM versions"
            ).fetchall()
        return Digests(
            frozenset(digest for digest, current in rows if current), frozenset(digest for digest, _ in rows)
        )

    def change_mark(self) -> int:
        """A number that is another one after any commit, in this process or in another."""
        with self._read_lock:
            (mark,) = self._reader.execute("PRAGMA data_version").fetchone()
        return int(mark)

    def _select(self, rest: str, values: tuple[str, ...]) -> list[KeptVersion]:
        with self._read_lock:
            return select_kept(self._reader, rest, values)

    def _prepare(self) -> None:
        with self.write():
            (found,) = self._writer.execute("PRAGMA user_version").fetchone()
            if found > SCHEMA_VERSION:
                raise StoreUnavailable(
                    f"the adapter store has schema {found} and this release reads up to {SCHEMA_VERSION}:"
                    " use the release that wrote it"
                )
            for version in range(found, SCHEMA_VERSION):
                for statement in _MIGRATIONS[version]:
                    self._writer.execute(statement)
            if found < SCHEMA_VERSION:
                self._writer.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def _connect(path: Path, busy_timeout: float) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=busy_timeout, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
    except sqlite3.Error:
        connection.close()
        raise
    return connection
