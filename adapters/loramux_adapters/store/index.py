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
from loramux_adapters.store.records import Digests, KeptVersion, UploadRow

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
            return _select_kept(self._reader, rest, values)

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


class IndexWriter:
    """The changes that can be made inside `StoreIndex.write`; its reads see what the transaction has done so far."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def current_digest(self, name: str) -> str | None:
        row = self._connection.execute("SELECT digest FROM adapters WHERE name = ?", (name,)).fetchone()
        return row[0] if row else None

    def kept(self, name: str) -> list[KeptVersion]:
        """The versions the name keeps, newest first; empty for an unknown name."""
        return _select_kept(self._connection, "WHERE h.name = ? ORDER BY h.id DESC", (name,))

    def all_kept(self) -> list[KeptVersion]:
        """The versions of all names, by name, newest first."""
        return _select_kept(self._connection, "ORDER BY h.name, h.id DESC", ())

    def digests(self) -> set[str]:
        """Every version that some name keeps."""
        return {digest for (digest,) in self._connection.execute("SELECT digest FROM versions")}

    def keep(self, upload: UploadRow) -> None:
        """Make the version the newest that the name keeps, and point the name at it.

        What the name pointed at becomes the newest but one: it is what a rollback goes back to, whatever was published
        and rolled back since.
        """
        self._connection.execute(
            "UPDATE history SET id = (SELECT max(id) + 1 FROM history)"
            " WHERE name = :name AND digest = (SELECT digest FROM adapters WHERE name = :name)"
            " AND id < (SELECT max(id) FROM history WHERE name = :name)",
            {"name": upload.name},
        )
        self._connection.execute(
            "INSERT INTO versions (digest, rank, target_modules, nbytes, created) VALUES (?, ?, ?, ?, ?)"
            " ON CONFLICT (digest) DO UPDATE SET corrupt = 0",
            (upload.digest, upload.rank, upload.target_modules, upload.nbytes, upload.created),
        )
        self._connection.execute("DELETE FROM history WHERE name = ? AND digest = ?", (upload.name, upload.digest))
        self._connection.execute(
            "INSERT INTO history (name, digest, base_id, checked_base, created, fingerprint) VALUES (?, ?, ?, ?, ?, ?)",
            (upload.name, upload.digest, upload.base_id, upload.checked_base, upload.created, upload.fingerprint),
        )
        self._connection.execute(
            "INSERT INTO adapters (name, digest, created, updated) VALUES (?, ?, ?, ?)"
            " ON CONFLICT (name) DO UPDATE SET digest = excluded.digest, updated = excluded.updated",
            (upload.name, upload.digest, upload.created, upload.created),
        )

    def confirm(self, upload: UploadRow) -> None:
        """Note what a renewed upload of a kept version says of its base and its fingerprint; its files are sound."""
        self._connection.execute(
            "UPDATE history SET base_id = coalesce(?, base_id), checked_base = ?,"
            " fingerprint = CASE WHEN ? IN ('none', 'skipped') THEN fingerprint ELSE ? END"
            " WHERE name = ? AND digest = ?",
            (upload.base_id, upload.checked_base, upload.fingerprint, upload.fingerprint, upload.name, upload.digest),
        )
        self.mark_corrupt(upload.digest, False)

    def point(self, name: str, digest: str, updated: int) -> None:
        """Point a name at another version that it keeps."""
        self._connection.execute("UPDATE adapters SET digest = ?, updated = ? WHERE name = ?", (digest, updated, name))

    def pin(self, name: str, pinned: bool) -> None:
        self._connection.execute("UPDATE adapters SET pinned = ? WHERE name = ?", (pinned, name))

    def pinned_bytes(self, without: str) -> int:
        """Bytes of the versions that pinned names point at, `without` one name."""
        (nbytes,) = self._connection.execute(
            "SELECT coalesce(sum(nbytes), 0) FROM versions"
            " WHERE digest IN (SELECT digest FROM adapters WHERE pinned AND name != ?)",
            (without,),
        ).fetchone()
        return int(nbytes)

    def restore(self, uploads: list[UploadRow], current: str, *, pinned: bool, created: int, updated: int) -> None:
        """Enter a name that is not there, with the versions it keeps, oldest first."""
        for upload in uploads:
            self.keep(upload)
        self._connection.execute(
            "UPDATE adapters SET digest = ?, pinned = ?, created = ?, updated = ? WHERE name = ?",
            (current, pinned, created, updated, uploads[-1].name),
        )

    def is_corrupt(self, digest: str) -> bool:
        row = self._connection.execute("SELECT corrupt FROM versions WHERE digest = ?", (digest,)).fetchone()
        return bool(row and row[0])

    def mark_corrupt(self, digest: str, corrupt: bool) -> None:
        self._connection.execute("UPDATE versions SET corrupt = ? WHERE digest = ?", (corrupt, digest))

    def corrupt_digests(self) -> set[str]:
        """Versions whose files are said to be damaged."""
        return {digest for (digest,) in self._connection.execute("SELECT digest FROM versions WHERE corrupt")}

    def names_of(self, digest: str) -> list[str]:
        """The names that keep a version."""
        rows = self._connection.execute("SELECT name FROM history WHERE digest = ? ORDER BY name", (digest,))
        return [name for (name,) in rows]

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


def _select_kept(connection: sqlite3.Connection, rest: str, values: tuple[str, ...]) -> list[KeptVersion]:
    """`rest` is the query from WHERE or ORDER BY on, over h (history), v (versions) and a (adapters)."""
    query = (
        "SELECT h.name, h.digest, v.rank, v.target_modules, v.nbytes, h.base_id, h.checked_base, h.created,"
        " h.fingerprint, a.digest = h.digest, v.corrupt, a.created, a.updated, a.pinned"
        f" FROM history h JOIN versions v ON v.digest = h.digest JOIN adapters a ON a.name = h.name {rest}"
    )
    return [
        KeptVersion(UploadRow(*row[:9]), bool(row[9]), bool(row[10]), row[11], row[12], bool(row[13]))
        for row in connection.execute(query, values).fetchall()
    ]


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
