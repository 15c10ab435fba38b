"""The file of keys and tenants beside an adapter store: SQLite, open to several processes at once.

It is a file of its own, not part of the store's index: that can be made anew from the versions' records, and a key
cannot. Each look asks the file, so what one process revokes holds for the next request of every other.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hmac import compare_digest
from pathlib import Path
from typing import Any

from loramux_server.access.caller import Caller, Scope
from loramux_server.access.key_text import KeyText
from loramux_server.access.private_file import connected, make_database, make_private
from loramux_server.access.tenant import Tenant, TenantLimits
from loramux_server.errors import AccessUnavailable, NoSuchKey

ACCESS_FILE = "access.sqlite"
SECRET_FILE = "access.secret"
_SECRET_BYTES = 32
_VERSION = 1
_SCHEMA = """
CREATE TABLE tenants (name TEXT PRIMARY KEY, created INTEGER NOT NULL, limits TEXT NOT NULL) STRICT;
CREATE TABLE keys (
    id TEXT PRIMARY KEY, hash BLOB NOT NULL, tenant TEXT REFERENCES tenants (name), scopes TEXT NOT NULL,
    note TEXT NOT NULL, created INTEGER NOT NULL, expires INTEGER, revoked INTEGER
) STRICT;
CREATE INDEX keys_tenant ON keys (tenant);
"""
_COLUMNS = "id, tenant, scopes, note, keys.created, expires, revoked"


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """What is known of a key. Times are unix seconds.

    Attributes:
        tenant: None for the operator's.
        expires: it is refused from then on; None is never.
        revoked: when it was; None for one that was not. A time to come is that of a key that was rotated.
    """

    id: str
    tenant: str | None
    scopes: frozenset[Scope]
    note: str
    created: int
    expires: int | None
    revoked: int | None

    def state(self, now: float) -> str:
        """ "active", "revoked" or "expired"."""
        if self.revoked is not None and self.revoked <= now:
            return "revoked"
        return "expired" if self.expires is not None and self.expires <= now else "active"

    def told(self, now: float) -> dict[str, Any]:
        """As the API and lists show it: nothing in it opens anything."""
        return {
            "id": self.id,
            "object": "key",
            "tenant": self.tenant,
            "scopes": sorted(self.scopes),
            "note": self.note,
            "state": self.state(now),
            "created": self.created,
            "expires": self.expires,
            "revoked": self.revoked,
        }


@dataclass(slots=True)
class _Connected:
    """A connection and who may use it."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    connection: sqlite3.Connection | None = None


class AccessFile:
    """Any thread may call any method, and may wait for the disk: one row by its id for `caller`, so the event loop may.

    Every method raises AccessUnavailable where the file cannot be read or written.
    """

    def __init__(self, root: Path, *, clock: Callable[[], float] = time.time) -> None:
        """`root`: the store's directory, which is made if it is missing. Files of keys are made with the first key."""
        self._root, self._clock = root, clock
        # Who only looks never waits for who writes, and for the disk that the latter waits for.
        self._reader, self._writer = _Connected(), _Connected()
        self._pepper = b""
        self._has_keys = False

    def close(self) -> None:
        """May be called twice."""
        for one in (self._reader, self._writer):
            with one.lock:
                if one.connection is not None:
                    one.connection.close()
                    one.connection = None

    @property
    def has_keys(self) -> bool:
        """Whether a key was ever made: from then on, nothing is open to callers without one. None is ever removed."""
        if not self._has_keys and (self._root / ACCESS_FILE).exists():
            with self._reading() as connection:
                self._has_keys = bool(connection.execute("SELECT EXISTS (SELECT 1 FROM keys)").fetchone()[0])
        return self._has_keys

    def caller(self, text: bytes) -> Caller | None:
        """Who shows this key; None if it was never made, is revoked or has expired."""
        key = KeyText.parse(text)
        if key is None or not self.has_keys:
            return None
        with self._reading() as connection:
            row = connection.execute(
                f"SELECT hash, tenants.limits, {_COLUMNS} FROM keys LEFT JOIN tenants ON name = tenant WHERE id = ?",
                (key.id,),
            ).fetchone()
            hashed = key.hashed(self._pepper)
        # An unknown id takes as long as a wrong secret.
        is_right = compare_digest(hashed, row[0] if row is not None else bytes(len(hashed)))
        if row is None or not is_right:
            return None
        record = _record(row[2:])
        if record.state(self._clock()) != "active":
            return None
        limits = TenantLimits() if row[1] is None else TenantLimits.of_text(row[1])
        return Caller(f"key {record.id}", record.tenant, record.scopes, limits)

    def create(
        self, *, tenant: str | None, scopes: frozenset[Scope], note: str = "", expires: int | None = None
    ) -> tuple[KeyText, KeyRecord]:
        """A new key, told this one time, and its record. Its tenant is made if there is none of that name."""
        key = KeyText.new()
        record = KeyRecord(key.id, tenant, scopes, note, int(self._clock()), expires, None)
        with self._writing() as connection:
            if tenant is not None:
                _make_tenant(connection, tenant, record.created)
            self._insert(connection, key, record)
        return key, record

    def records(self, tenant: str | None = None) -> list[KeyRecord]:
        """Keys by age, oldest first: all, or one tenant's."""
        if not self.has_keys:
            return []
        with self._reading() as connection:
            rows = connection.execute(f"SELECT {_COLUMNS} FROM keys ORDER BY keys.created, id").fetchall()
        records = map(_record, rows)
        return [record for record in records if tenant is None or record.tenant == tenant]

    def revoke(self, key_id: str, tenant: str | None = None) -> KeyRecord:
        """It is refused from the next request on. Done twice, the first time stays.

        `tenant`: whose key it has to be. Raises NoSuchKey.
        """
        now = int(self._clock())
        with self._writing() as connection:
            self._one(connection, key_id, tenant)
            connection.execute("UPDATE keys SET revoked = min(coalesce(revoked, ?1), ?1) WHERE id = ?2", (now, key_id))
            return self._one(connection, key_id, tenant)

    def rotate(self, key_id: str, *, overlap: int = 0, tenant: str | None = None) -> tuple[KeyText, KeyRecord]:
        """A new key of the same rights and end; the old one is refused after `overlap` seconds.

        `tenant`: whose key it has to be. Raises NoSuchKey, also for one that is revoked or has expired.
        """
        now = int(self._clock())
        key = KeyText.new()
        with self._writing() as connection:
            old = self._one(connection, key_id, tenant)
            if old.state(now) != "active":
                raise NoSuchKey(f"the key {key_id} is {old.state(now)}; create a new one")
            record = KeyRecord(key.id, old.tenant, old.scopes, old.note, now, old.expires, None)
            self._insert(connection, key, record)
            until = now + overlap if old.revoked is None else min(old.revoked, now + overlap)
            connection.execute("UPDATE keys SET revoked = ? WHERE id = ?", (until, key_id))
        return key, record

    def tenants(self) -> list[Tenant]:
        """By name."""
        if not (self._root / ACCESS_FILE).exists():
            return []
        with self._reading() as connection:
            rows = connection.execute("SELECT name, created, limits FROM tenants ORDER BY name").fetchall()
        return [Tenant(name, created, TenantLimits.of_text(limits)) for name, created, limits in rows]

    def limit(self, tenant: str, values: dict[str, Any]) -> Tenant:
        """Changes limits of a tenant, which is made if there is none of that name; they hold from the next request on.

        Raises ConfigError for what is no limit.
        """
        with self._writing() as connection:
            _make_tenant(connection, tenant, int(self._clock()))
            created, text = connection.execute(
                "SELECT created, limits FROM tenants WHERE name = ?", (tenant,)
            ).fetchone()
            limits = TenantLimits.of_text(text).changed(values)
            connection.execute("UPDATE tenants SET limits = ? WHERE name = ?", (limits.as_text(), tenant))
        return Tenant(tenant, created, limits)

    def _insert(self, connection: sqlite3.Connection, key: KeyText, record: KeyRecord) -> None:
        connection.execute(
            "INSERT INTO keys VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                *(record.id, key.hashed(self._pepper), record.tenant, json.dumps(sorted(record.scopes)), record.note),
                *(record.created, record.expires, record.revoked),
            ),
        )

    def _one(self, connection: sqlite3.Connection, key_id: str, tenant: str | None) -> KeyRecord:
        row = connection.execute(f"SELECT {_COLUMNS} FROM keys WHERE id = ?", (key_id,)).fetchone()
        record = None if row is None else _record(row)
        if record is None or (tenant is not None and record.tenant != tenant):
            raise NoSuchKey(f"there is no key {ascii(key_id[:64])}; `loramux keys list` shows all")
        return record

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._reader.lock:
            try:
                yield self._opened(self._reader)
            except (sqlite3.Error, OSError) as error:
                raise AccessUnavailable(f"the file of keys cannot be read: {error}") from error

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """All of a change, or nothing of it."""
        with self._writer.lock:
            try:
                connection = self._opened(self._writer, create=True)
                connection.execute("BEGIN IMMEDIATE")
                try:
                    yield connection
                    connection.execute("COMMIT")
                except BaseException:
                    connection.execute("ROLLBACK")
                    raise
            except (sqlite3.Error, OSError) as error:
                raise AccessUnavailable(f"the file of keys cannot be written: {error}") from error

    def _opened(self, one: _Connected, *, create: bool = False) -> sqlite3.Connection:
        """With its lock held."""
        if one.connection is None:
            if create:
                make_private(
                    self._root / SECRET_FILE, lambda path: path.write_bytes(secrets.token_bytes(_SECRET_BYTES))
                )
                make_database(self._root / ACCESS_FILE, _SCHEMA, _VERSION)
            pepper = (self._root / SECRET_FILE).read_bytes()
            if len(pepper) != _SECRET_BYTES:
                raise AccessUnavailable(f"{SECRET_FILE} is damaged; without it no key can be checked")
            self._pepper = pepper
            one.connection = connected(self._root / ACCESS_FILE, _VERSION)
        return one.connection


def _make_tenant(connection: sqlite3.Connection, name: str, created: int) -> None:
    """Unless there is one of that name."""
    connection.execute("INSERT OR IGNORE INTO tenants VALUES (?, ?, ?)", (name, created, TenantLimits().as_text()))


def has_keys(root: Path) -> bool:
    """Whether a key was ever made for the store in this directory. Raises AccessUnavailable."""
    file = AccessFile(root)
    try:
        return file.has_keys
    finally:
        file.close()


def _record(row: tuple[object, ...]) -> KeyRecord:
    key_id, tenant, scopes, note, created, expires, revoked = row
    return KeyRecord(
        str(key_id),
        None if tenant is None else str(tenant),
        frozenset(map(Scope, json.loads(str(scopes)))),
        str(note),
        int(str(created)),
        None if expires is None else int(str(expires)),
        None if revoked is None else int(str(revoked)),
    )
