"""The log of changes beside an adapter store: who changed what, from where. Entries are added, and never changed.

Triggers of SQLite refuse to change or remove one, so that even a tool that opens the file has to mean it. It holds
names, versions and ids; never a prompt, a reply or a key.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loramux_adapters.store.records import StoreChange
from loramux_server.access.access_file import KeyRecord
from loramux_server.access.actor import current_actor
from loramux_server.access.private_file import connected, make_database
from loramux_server.errors import AccessUnavailable

AUDIT_FILE = "audit.sqlite"
MOST_ENTRIES = 1000
_VERSION = 1
_SCHEMA = """
CREATE TABLE entries (
    id INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL, who TEXT NOT NULL, tenant TEXT, address TEXT, request TEXT,
    action TEXT NOT NULL, subject TEXT NOT NULL, version TEXT, detail TEXT NOT NULL
) STRICT;
CREATE INDEX entries_subject ON entries (subject);
CREATE INDEX entries_tenant ON entries (tenant);
CREATE TRIGGER no_change BEFORE UPDATE ON entries BEGIN SELECT raise(ABORT, 'entries are never changed'); END;
CREATE TRIGGER no_removal BEFORE DELETE ON entries BEGIN SELECT raise(ABORT, 'entries are never removed'); END;
"""
_COLUMNS = "id, at, who, tenant, address, request, action, subject, version, detail"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Entry:
    """One change, in the past.

    Attributes:
        at: unix seconds.
        who, tenant, address, request: as `Actor` has them.
        subject: the name of an adapter as the store knows it, the id of a key, or a tenant.
    """

    id: int
    at: float
    who: str
    tenant: str | None
    address: str | None
    request: str | None
    action: str
    subject: str
    version: str | None
    detail: str

    def told(self) -> dict[str, Any]:
        """As the API and lists show it."""
        return {"object": "audit"} | {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class EntryFilter:
    """Which entries: of this tenant, of this subject, since then, before this id; at most so many, the newest."""

    tenant: str | None = None
    subject: str | None = None
    since: float | None = None
    before: int | None = None
    limit: int = 100

    def as_query(self) -> dict[str, str]:
        """For the API."""
        values = {name: getattr(self, name) for name in self.__slots__}
        return {name: str(value) for name, value in values.items() if value is not None}


class AuditFile:
    """Any thread may call any method, and may wait for the disk."""

    def __init__(self, root: Path, *, clock: Callable[[], float] = time.time) -> None:
        """`root`: the store's directory. The file is made with the first entry."""
        self._path, self._clock = root / AUDIT_FILE, clock
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None

    def close(self) -> None:
        """May be called twice."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def append(self, action: str, subject: str, version: str | None = None, detail: str = "") -> None:
        """Something was changed, by whoever acts here. What cannot be written is logged: the change has happened."""
        actor = current_actor()
        row = (self._clock(), actor.who, actor.tenant, actor.address, actor.request, action, subject, version, detail)
        try:
            with self._lock:
                if self._connection is None:
                    make_database(self._path, _SCHEMA, _VERSION)
                self._opened().execute(
                    f"INSERT INTO entries ({_COLUMNS.removeprefix('id, ')}) VALUES ({', '.join('?' * len(row))})", row
                )
        except (sqlite3.Error, OSError, AccessUnavailable):
            logger.exception("the audit log cannot be written; it lacks %s", row)

    def changed(self, change: StoreChange) -> None:
        """The store has changed."""
        self.append(change.action, change.name, change.version, change.outcome)

    def entries(self, wanted: EntryFilter) -> list[Entry]:
        """Newest first. Raises AccessUnavailable."""
        if not self._path.exists():
            return []
        tests = {
            "tenant = ?": wanted.tenant,
            "subject = ?": wanted.subject,
            "at >= ?": wanted.since,
            "id < ?": wanted.before,
        }
        given = {test: value for test, value in tests.items() if value is not None}
        where = f"WHERE {' AND '.join(given)}" if given else ""
        try:
            with self._lock:
                rows = self._opened().execute(
                    f"SELECT {_COLUMNS} FROM entries {where} ORDER BY id DESC LIMIT ?",
                    (*given.values(), min(wanted.limit, MOST_ENTRIES)),
                )
                return [Entry(*row) for row in rows.fetchall()]
        except (sqlite3.Error, OSError) as error:
            raise AccessUnavailable(f"the audit log cannot be read: {error}") from error

    def _opened(self) -> sqlite3.Connection:
        """With the lock held."""
        if self._connection is None:
            self._connection = connected(self._path, _VERSION)
        return self._connection


def of_key(record: KeyRecord) -> str:
    """What an entry says of a key."""
    of = "the operator" if record.tenant is None else f"the tenant {record.tenant}"
    return f"of {of}, with {', '.join(sorted(record.scopes))}"
