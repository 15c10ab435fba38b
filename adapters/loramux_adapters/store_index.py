"""The store's index: which names there are, and which versions each has had. One SQLite file, any number of processes.

WAL, so that a lookup never waits for a write; synchronous=FULL, so that what was committed survives a power cut.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from loramux_adapters.errors import StoreUnavailable

SCHEMA_VERSION = 1
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


@dataclass(frozen=True, slots=True)
class Upload:
    """A version as one name got it.

    Attributes:
        target_modules: names joined by commas.
        nbytes: of all files of the version.
        base_id: that the upload named; None if it named none.
        checked_base: that the upload was checked against; None if the store was not told.
        created: unix seconds.
    """

    name: str
    digest: str
    rank: int
    target_modules: str
    nbytes: int
    base_id: str | None
    checked_base: str | None
    created: int


@dataclass(frozen=True, slots=True)
class KeptVersion:
    """An upload that its name still keeps. `current`: the name points at it; the name's own times in unix seconds."""

    upload: Upload
    current: bool
    name_created: int
    name_updated: int


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

    def all_kept(self) -> list[KeptVersion]:
        """The versions of all names, by name, newest first."""
        return self._select("ORDER BY h.name, h.id DESC", ())

    def _select(self, rest: str, values: tuple[str, ...]) -> list[KeptVersion]:
        query = (
            "SELECT h.name, h.digest, v.rank, v.target_modules, v.nbytes, h.base_id, h.checked_base, h.created,"
            " a.digest = h.digest, a.created, a.updated"
            f" FROM history h JOIN versions v ON v.digest = h.digest JOIN adapters a ON a.name = h.name {rest}"
        )
        with self._read_lock:
            rows = self._reader.execute(query, values).fetchall()
        return [KeptVersion(Upload(*row[:8]), bool(row[8]), row[9], row[10]) for row in rows]

    def _prepare(self) -> None:
        with self.write():
            (found,) = self._writer.execute("PRAGMA user_version").fetchone()
            if found == 0:
                for statement in _SCHEMA:
                    self._writer.execute(statement)
                self._writer.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            elif found != SCHEMA_VERSION:
                raise StoreUnavailable(
                    f"the adapter store has schema {found} and this release reads {SCHEMA_VERSION}:"
                    " use the release that wrote it"
                )


class IndexWriter:
    """The changes that can be made inside `StoreIndex.write`."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def current_digest(self, name: str) -> str | None:
        row = self._connection.execute("SELECT digest FROM adapters WHERE name = ?", (name,)).fetchone()
        return row[0] if row else None

    def digests(self) -> set[str]:
        """Every version that some name keeps."""
        return {digest for (digest,) in self._connection.execute("SELECT digest FROM versions")}

    def keep(self, upload: Upload) -> None:
        """Make the version the newest that the name keeps, and point the name at it."""
        self._connection.execute(
            "INSERT INTO versions VALUES (?, ?, ?, ?, ?) ON CONFLICT (digest) DO NOTHING",
            (upload.digest, upload.rank, upload.target_modules, upload.nbytes, upload.created),
        )
        self._connection.execute("DELETE FROM history WHERE name = ? AND digest = ?", (upload.name, upload.digest))
        self._connection.execute(
            "INSERT INTO history (name, digest, base_id, checked_base, created) VALUES (?, ?, ?, ?, ?)",
            (upload.name, upload.digest, upload.base_id, upload.checked_base, upload.created),
        )
        self._connection.execute(
            "INSERT INTO adapters VALUES (?, ?, ?, ?)"
            " ON CONFLICT (name) DO UPDATE SET digest = excluded.digest, updated = excluded.updated",
            (upload.name, upload.digest, upload.created, upload.created),
        )

    def confirm(self, name: str, digest: str, base_id: str | None, checked_base: str | None) -> None:
        """Note what a renewed upload of a kept version says of its base."""
        self._connection.execute(
            "UPDATE history SET base_id = coalesce(?, base_id), checked_base = ? WHERE name = ? AND digest = ?",
            (base_id, checked_base, name, digest),
        )

    def forget_old(self, name: str, keep: int) -> set[str]:
        """Keep the newest versions of a name only; returns the digests that no name keeps any more."""
        self._connection.execute(
            "DELETE FROM history WHERE name = :name AND id NOT IN"
            " (SELECT id FROM history WHERE name = :name ORDER BY id DESC LIMIT :keep)",
            {"name": name, "keep": keep},
        )
        return self._drop_unkept()

    def remove(self, name: str) -> set[str]:
        """Forget a name; returns the digests that no name keeps any more."""
        self._connection.execute("DELETE FROM adapters WHERE name = ?", (name,))
        self._connection.execute("DELETE FROM history WHERE name = ?", (name,))
        return self._drop_unkept()

    def _drop_unkept(self) -> set[str]:
        unkept = "digest NOT IN (SELECT digest FROM history)"
        dropped = {digest for (digest,) in self._connection.execute(f"SELECT digest FROM versions WHERE {unkept}")}
        self._connection.execute(f"DELETE FROM versions WHERE {unkept}")
        return dropped


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
