"""What a transaction can change in the store's index."""

from __future__ import annotations

import sqlite3

from loramux_adapters.store.rows import KeptVersion, Upload, select_kept


class IndexWriter:
    """The changes that can be made inside `StoreIndex.write`; its reads see what the transaction has done so far."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def current_digest(self, name: str) -> str | None:
        row = self._connection.execute("SELECT digest FROM adapters WHERE name = ?", (name,)).fetchone()
        return row[0] if row else None

    def kept(self, name: str) -> list[KeptVersion]:
        """The versions the name keeps, newest first; empty for an unknown name."""
        return select_kept(self._connection, "WHERE h.name = ? ORDER BY h.id DESC", (name,))

    def all_kept(self) -> list[KeptVersion]:
        """The versions of all names, by name, newest first."""
        return select_kept(self._connection, "ORDER BY h.name, h.id DESC", ())

    def digests(self) -> set[str]:
        """Every version that some name keeps."""
        return {digest for (digest,) in self._connection.execute("SELECT digest FROM versions")}

    def keep(self, upload: Upload) -> None:
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

    def confirm(self, upload: Upload) -> None:
        """Note what a renewed upload of a kept version says of its base and its fingerprint; its files are sound."""
        self._connection.execute(
            "UPDATE history SET base_id = coalesce(?, base_id), checked_base = ?,"
            " fingerprint = coalesce(nullif(?, 'none'), fingerprint) WHERE name = ? AND digest = ?",
            (upload.base_id, upload.checked_base, upload.fingerprint, upload.name, upload.digest),
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

    def restore(self, uploads: list[Upload], current: str, *, pinned: bool, created: int, updated: int) -> None:
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
