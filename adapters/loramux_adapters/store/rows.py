"""Rows of the store's index: what one name keeps, as its tables tell it."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Upload:
    """A version as one name got it.

    Attributes:
        target_modules: names joined by commas.
        nbytes: of all files of the version.
        base_id: that the upload named; None if it named none.
        checked_base: that the upload was checked against; None if the store was not told.
        created: unix seconds.
        fingerprint: how the one it came with was replayed; "none" if nobody has.
    """

    name: str
    digest: str
    rank: int
    target_modules: str
    nbytes: int
    base_id: str | None
    checked_base: str | None
    created: int
    fingerprint: str = "none"


@dataclass(frozen=True, slots=True)
class KeptVersion:
    """An upload that its name still keeps.

    Attributes:
        current: the name points at it.
        corrupt: its files were found damaged and are set aside.
        name_created, name_updated: the name's own times, unix seconds.
        name_pinned: the name is to stay in memory.
    """

    upload: Upload
    current: bool
    corrupt: bool
    name_created: int
    name_updated: int
    name_pinned: bool


@dataclass(frozen=True, slots=True)
class Digests:
    """Versions that some name points at, and versions that some name keeps."""

    current: frozenset[str]
    kept: frozenset[str]


def select_kept(connection: sqlite3.Connection, rest: str, values: tuple[str, ...]) -> list[KeptVersion]:
    """`rest` is the query from WHERE or ORDER BY on, over h (history), v (versions) and a (adapters)."""
    query = (
        "SELECT h.name, h.digest, v.rank, v.target_modules, v.nbytes, h.base_id, h.checked_base, h.created,"
        " h.fingerprint, a.digest = h.digest, v.corrupt, a.created, a.updated, a.pinned"
        f" FROM history h JOIN versions v ON v.digest = h.digest JOIN adapters a ON a.name = h.name {rest}"
    )
    return [
        KeptVersion(Upload(*row[:9]), bool(row[9]), bool(row[10]), row[11], row[12], bool(row[13]))
        for row in connection.execute(query, values).fetchall()
    ]
