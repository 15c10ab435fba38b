"""What is in the index's file: its tables, the query that reads all of them, and how it is seen that they are whole.

Beside the tables stand the number of the last change and a sum over all that they say. A bit that flips in a page
changes what is read and so the sum, or is found by SQLite. That the index has lost its last changes shows when its
number is held against the one that is written after each change (`directory_records`).
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from loramux_adapters.store.records import KeptVersion, UploadRow

INDEX_FILE = "index.sqlite"
SCHEMA_VERSION = 3
FIRST_WITH_STATE = 3  # of the schemas
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
    2: (
        "CREATE TABLE state (generation INTEGER NOT NULL, content INTEGER NOT NULL, records TEXT NOT NULL,"
        " seal INTEGER NOT NULL)",
        "CREATE INDEX history_digest ON history (digest)",
        "ALTER TABLE history ADD COLUMN adapted_layers INTEGER",
        "ALTER TABLE history ADD COLUMN base_layers INTEGER",
        "ALTER TABLE history ADD COLUMN notes TEXT NOT NULL DEFAULT ''",
    ),
}
# Where the fields of `UploadRow` stand, in their order: h is `history`, v is `versions`.
_UPLOAD_COLUMNS = (
    *("h.name", "h.digest", "v.rank", "v.target_modules", "v.nbytes", "h.base_id", "h.checked_base", "h.created"),
    *("h.fingerprint", "h.adapted_layers", "h.base_layers", "h.notes"),
)


_MASK = (1 << 63) - 1
# The result codes that blame the machine, not the file: locked, out of memory, disk full, cannot be opened, ...
_NO_DAMAGE = (
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_INTERRUPT,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_AUTH,
)

Row = tuple[Any, ...]


class IndexFault(Exception):
    """What is wrong with an index, in words. `StoreIndex` makes an `IndexLost` of it."""


class State(NamedTuple):
    """What the index says of itself.

    Attributes:
        generation: the number of the last change.
        content: the sum over all rows and tables.
        records: the versions whose records that change writes, in its order; why no name keeps it where none does.
    """

    generation: int
    content: int
    records: Mapping[str, str | None]


def read_state(connection: sqlite3.Connection) -> State:
    """Raises `IndexFault`, sqlite3.Error."""
    rows = connection.execute("SELECT generation, content, records, seal FROM state").fetchall()
    if len(rows) != 1 or _number(rows[0][:3]) != rows[0][3]:
        raise IndexFault("it is damaged (in what it says of itself)")
    generation, content, records, _ = rows[0]
    return State(generation, content, json.loads(records))


def write_state(connection: sqlite3.Connection, state: State) -> None:
    row = (state.generation, state.content, json.dumps(state.records))
    connection.execute("DELETE FROM state")
    connection.execute("INSERT INTO state VALUES (?, ?, ?, ?)", (*row, _number(row)))


def sum_of(rows: Iterable[Row]) -> int:
    """A sum that does not depend on the order of rows; `replaced` changes it without reading the others."""
    return sum(_number(row) for row in rows) & _MASK


def replaced(content: int, before: Iterable[Row], after: Iterable[Row]) -> int:
    """The sum once these rows have taken the place of those."""
    return (content - sum_of(before) + sum_of(after)) & _MASK


def schema_rows(connection: sqlite3.Connection) -> list[Row]:
    """The definitions of all tables: a damaged one could change what a query says."""
    return connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_master").fetchall()


def check_pages(connection: sqlite3.Connection) -> None:
    """Have SQLite look at every page. Raises `IndexFault`, sqlite3.Error."""
    (found,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
    if found != "ok":
        raise IndexFault(f"it is damaged ({str(found).splitlines()[-1]})")


def is_damage(error: sqlite3.Error, path: Path) -> bool:
    """Whether the file is not as SQLite wrote it, in contrast to an error that may be gone in a moment."""
    code = getattr(error, "sqlite_errorcode", None) or sqlite3.SQLITE_ERROR
    if code & 0xFF == sqlite3.SQLITE_READONLY:  # a damaged header says so, too
        return os.access(path, os.W_OK)
    return code == sqlite3.SQLITE_IOERR_SHORT_READ or code & 0xFF not in _NO_DAMAGE


def _number(row: Row) -> int:
    return int.from_bytes(blake2b(ascii(row).encode(), digest_size=8).digest(), "little") & _MASK


def migrate(connection: sqlite3.Connection, found: int, generation: int) -> None:
    """From the schema `found` to this release's; the state is made anew, with this number."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        for version in range(found, SCHEMA_VERSION):
            for statement in _MIGRATIONS[version]:
                connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        write_state(connection, State(generation, content_of(connection), {}))
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def content_of(connection: sqlite3.Connection) -> int:
    """The sum over all that the index says."""
    return sum_of([*schema_rows(connection), *rows_of(connection, "", ())])


def rows_of(connection: sqlite3.Connection, rest: str, values: tuple[str, ...]) -> list[Row]:
    """All that the index says of versions, one row for each that a name keeps, without what was found of its files.

    `rest` is the query from WHERE or ORDER BY on, over h (history), v (versions) and a (adapters).
    """
    return [row[1:] for row in _select(connection, rest, values)]


def kept_rows(connection: sqlite3.Connection, rest: str, values: tuple[str, ...]) -> list[KeptVersion]:
    """`rest` as in `rows_of`."""
    return [kept_version(row[1:], corrupt=bool(row[0])) for row in _select(connection, rest, values)]


def _select(connection: sqlite3.Connection, rest: str, values: tuple[str, ...]) -> list[Row]:
    query = (
        f"SELECT v.corrupt, {', '.join(_UPLOAD_COLUMNS)}, a.digest = h.digest, a.created, a.updated, a.pinned, h.id"
        f" FROM history h JOIN versions v ON v.digest = h.digest JOIN adapters a ON a.name = h.name {rest}"
    )
    return connection.execute(query, values).fetchall()


def kept_version(row: Row, *, corrupt: bool = False) -> KeptVersion:
    current, created, updated, pinned, order = row[-5:]
    return KeptVersion(UploadRow(*row[:-5]), bool(current), corrupt, created, updated, bool(pinned), order)


def kept_by_digest(connection: sqlite3.Connection) -> dict[str, list[KeptVersion]]:
    rows = kept_rows(connection, "ORDER BY h.digest", ())
    return {digest: list(kept) for digest, kept in groupby(rows, key=lambda row: row.upload.digest)}


def connect(path: Path, busy_timeout: float) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=busy_timeout, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def read_remains(path: Path) -> list[KeptVersion]:
    """What can still be read of an index that is lost, by name, newest first."""
    try:
        connection = connect(path, 0.0)
    except (sqlite3.Error, UnicodeError):
        return []
    try:
        return kept_rows(connection, "ORDER BY h.name, h.id DESC", ())
    except (sqlite3.Error, UnicodeError, TypeError):
        return []
    finally:
        connection.close()
