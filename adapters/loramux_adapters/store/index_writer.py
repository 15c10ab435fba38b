"""The changes that one transaction of the index makes, and what they mean for the records of versions."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping
from pathlib import Path

from loramux_adapters.store.directory_records import Change
from loramux_adapters.store.index_file import (
    Row,
    State,
    connect,
    kept_rows,
    kept_version,
    migrate,
    read_state,
    replaced,
    rows_of,
    write_state,
)
from loramux_adapters.store.records import KeptVersion, UploadRow
from loramux_adapters.store.version_record import Claim, DirectoryRecord, claims_of


class IndexWriter:
    """The changes that can be made inside `StoreIndex.write`; its reads see what the transaction has done so far."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._before: dict[str, list[Row]] = {}  # of each name that was touched
        self._without_record: set[str] = set()
        self._why_unkept: dict[str, str] = {}
        self._undo: list[Callable[[], None]] = []

    def write_record(self, digest: str) -> None:
        """The version's directory needs its record written, also if nothing else changes."""
        self._without_record.add(digest)

    def on_rollback(self, undo: Callable[[], None]) -> None:
        """Have `undo` called, with the locks held, if the change is not made."""
        self._undo.append(undo)

    def undo(self) -> None:
        """After the transaction was rolled back: take back what was done beside it."""
        while self._undo:
            self._undo.pop()()

    def settle(self) -> Change | None:
        """The last step of the transaction: number it, sum it up; the records it changes, None if nothing changed."""
        before = [row for rows in self._before.values() for row in rows]
        after = [row for name in self._before for row in rows_of(self._connection, "WHERE h.name = ?", (name,))]
        if {*before} == {*after} and not self._without_record:
            return None
        generation, content, _ = read_state(self._connection)
        was, now = ({Claim.of(kept_version(row)) for row in rows} for rows in (before, after))
        pointed, points = ({claim.upload.digest for claim in claims if claim.name} for claims in (was, now))
        digests = {claim.upload.digest for claim in was ^ now} | self._without_record
        ordered = sorted(digests, key=lambda digest: (0 if digest in points else 2 if digest in pointed else 1, digest))
        records = {digest: self._why_unkept.get(digest) for digest in ordered}
        write_state(self._connection, State(generation + 1, replaced(content, before, after), records))
        return self._change(generation + 1, records)

    def last_change(self) -> Change:
        """What the transaction before this one changed."""
        state = read_state(self._connection)
        return self._change(state.generation, state.records)

    def _change(self, generation: int, records: Mapping[str, str | None]) -> Change:
        return Change(generation, [self._record(digest, generation, why) for digest, why in records.items()])

    def _record(self, digest: str, generation: int, why: str | None) -> DirectoryRecord:
        claims = claims_of(kept_rows(self._connection, "WHERE h.digest = ?", (digest,)))
        return DirectoryRecord(digest, generation, claims, None if claims else why)

    def _touch(self, *names: str) -> None:
        """To be called before a name is changed, or a version that it keeps."""
        for name in names:
            if name not in self._before:
                self._before[name] = rows_of(self._connection, "WHERE h.name = ?", (name,))

    def current_digest(self, name: str) -> str | None:
        row = self._connection.execute("SELECT digest FROM adapters WHERE name = ?", (name,)).fetchone()
        return row[0] if row else None

    def kept(self, name: str) -> list[KeptVersion]:
        """The versions the name keeps, newest first; empty for an unknown name."""
        return kept_rows(self._connection, "WHERE h.name = ? ORDER BY h.id DESC", (name,))

    def all_kept(self) -> list[KeptVersion]:
        """The versions of all names, by name, newest first."""
        return kept_rows(self._connection, "ORDER BY h.name, h.id DESC", ())

    def digests(self) -> set[str]:
        """Every version that some name keeps."""
        return {digest for (digest,) in self._connection.execute("SELECT digest FROM versions")}

    def is_kept(self, digest: str) -> bool:
        """Whether some name keeps the version."""
        return self._connection.execute("SELECT 1 FROM versions WHERE digest = ?", (digest,)).fetchone() is not None

    def keep(self, upload: UploadRow) -> None:
        """Make the version the newest that the name keeps, and point the name at it.

        What the name pointed at becomes the newest but one: it is what a rollback goes back to, whatever was published
        and rolled back since.
        """
        self._touch(upload.name, *self.names_of(upload.digest))
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
            "INSERT INTO history (name, digest, base_id, checked_base, created, fingerprint, adapted_layers,"
            " base_layers, notes) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (upload.name, upload.digest, upload.base_id, upload.checked_base, upload.created, upload.fingerprint)
            + (upload.adapted_layers, upload.base_layers, upload.notes),
        )
        self._connection.execute(
            "INSERT INTO adapters (name, digest, created, updated) VALUES (?, ?, ?, ?)"
            " ON CONFLICT (name) DO UPDATE SET digest = excluded.digest, updated = excluded.updated",
            (upload.name, upload.digest, upload.created, upload.created),
        )

    def confirm(self, upload: UploadRow) -> None:
        """Note what a renewed upload of a kept version says and was found to be; its files are sound."""
        self._touch(upload.name, *self.names_of(upload.digest))
        self._connection.execute(
            "UPDATE history SET base_id = coalesce(?, base_id), checked_base = ?,"
            " fingerprint = CASE WHEN ? IN ('none', 'skipped') THEN fingerprint ELSE ? END,"
            " adapted_layers = coalesce(?, adapted_layers), base_layers = coalesce(?, base_layers), notes = ?"
            " WHERE name = ? AND digest = ?",
            (upload.base_id, upload.checked_base, upload.fingerprint, upload.fingerprint, upload.adapted_layers)
            + (upload.base_layers, upload.notes, upload.name, upload.digest),
        )
        self.mark_corrupt(upload.digest, False)

    def point(self, name: str, digest: str, updated: int) -> None:
        """Point a name at another version that it keeps."""
        self._touch(name)
        self._connection.execute("UPDATE adapters SET digest = ?, updated = ? WHERE name = ?", (digest, updated, name))

    def pin(self, name: str, pinned: bool) -> None:
        self._touch(name)
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
        self._touch(name)
        before = self._digests_of(name)
        self._connection.execute(
            "DELETE FROM history WHERE name = :name AND id NOT IN"
            " (SELECT id FROM history WHERE name = :name ORDER BY id DESC LIMIT :keep)",
            {"name": name, "keep": keep},
        )
        return self._drop_unkept(before, f"the adapter {name} keeps {keep} versions, and has newer ones")

    def remove(self, name: str, why: str) -> set[str]:
        """Forget a name; returns the digests that no name keeps any more, and `why` is said of them."""
        self._touch(name)
        before = self._digests_of(name)
        self._connection.execute("DELETE FROM adapters WHERE name = ?", (name,))
        self._connection.execute("DELETE FROM history WHERE name = ?", (name,))
        return self._drop_unkept(before, why)

    def _digests_of(self, name: str) -> list[str]:
        return [digest for (digest,) in self._connection.execute("SELECT digest FROM history WHERE name = ?", (name,))]

    def _drop_unkept(self, digests: list[str], why: str) -> set[str]:
        """Of these, forget those that no name keeps any more, and return them."""
        dropped = {digest for digest in digests if not self.names_of(digest)}
        self._connection.executemany("DELETE FROM versions WHERE digest = ?", [(digest,) for digest in dropped])
        self._why_unkept.update(dict.fromkeys(dropped, why))
        return dropped


def build_index(path: Path, generation: int, enter: Callable[[IndexWriter], None]) -> None:
    """Make a new index that holds what `enter` puts into it. May raise OSError, sqlite3.Error.

    `generation`: greater than that of any record.
    """
    connection = connect(path, 0.0)
    try:
        migrate(connection, 0, generation - 1)
        connection.execute("BEGIN IMMEDIATE")
        writer = IndexWriter(connection)
        enter(writer)
        writer.settle()
        connection.execute("COMMIT")
    finally:
        connection.close()
