"""The log of changes: who, what, which version, from where; added to, and never changed."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from pathlib import Path

import pytest

from loramux_adapters.store.records import StoreChange
from loramux_server.access.actor import Actor, acting, at_the_shell, current_actor
from loramux_server.access.audit_file import AUDIT_FILE, AuditFile, EntryFilter
from loramux_server.api.http.worker_threads import run_in_thread

ACME = Actor("key 1234", "acme", "10.0.0.7", "req-1")


@pytest.fixture
def audit(tmp_path: Path) -> AuditFile:
    times = iter(range(1000, 2000))
    return AuditFile(tmp_path / "store", clock=lambda: float(next(times)))


def test_an_entry_says_who_what_and_from_where(audit: AuditFile) -> None:
    assert audit.entries(EntryFilter()) == []
    with acting(ACME):
        audit.changed(StoreChange("published", "acme~spam", "a" * 64, "created"))
    audit.append("key created", "1234")
    newest, first = audit.entries(EntryFilter())
    assert (newest.who, newest.action, newest.version) == ("the server", "key created", None)
    assert first.told() == {
        "object": "audit",
        "id": 1,
        "at": 1000.0,
        "who": "key 1234",
        "tenant": "acme",
        "address": "10.0.0.7",
        "request": "req-1",
        "action": "published",
        "subject": "acme~spam",
        "version": "a" * 64,
        "detail": "created",
    }


def test_entries_are_found_by_tenant_subject_time_and_page(audit: AuditFile) -> None:
    for number in range(6):
        with acting(ACME if number % 2 else Actor("x")):
            audit.append("pinned", f"adapter-{number // 2}")
    assert [one.id for one in audit.entries(EntryFilter(tenant="acme"))] == [6, 4, 2]
    assert [one.id for one in audit.entries(EntryFilter(subject="adapter-1"))] == [4, 3]
    assert [one.id for one in audit.entries(EntryFilter(since=1004.0))] == [6, 5]
    assert [one.id for one in audit.entries(EntryFilter(limit=2))] == [6, 5]
    assert [one.id for one in audit.entries(EntryFilter(limit=2, before=5))] == [4, 3]
    assert audit.entries(EntryFilter(tenant="acme", subject="adapter-9")) == []


def test_what_is_written_stays(audit: AuditFile, tmp_path: Path) -> None:
    audit.append("pinned", "spam")
    path = tmp_path / "store" / AUDIT_FILE
    assert path.stat().st_mode & 0o077 == 0
    with sqlite3.connect(path) as connection:
        for change in ("UPDATE entries SET who = 'nobody'", "DELETE FROM entries"):
            with pytest.raises(sqlite3.IntegrityError, match="entries are never"):
                connection.execute(change)
    audit.close()
    assert len(AuditFile(tmp_path / "store").entries(EntryFilter())) == 1


def test_a_log_that_cannot_be_written_stops_nobody_and_says_what_it_lacks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    audit = AuditFile(tmp_path)
    audit.append("pinned", "spam")
    audit.close()
    (tmp_path / AUDIT_FILE).write_bytes(b"no database at all" * 100)
    with caplog.at_level(logging.ERROR):
        audit.append("deleted", "spam")
    assert "the audit log cannot be written; it lacks" in caplog.text and "'deleted', 'spam'" in caplog.text


@pytest.mark.anyio
async def test_who_acts_is_known_in_worker_threads_and_to_nobody_else() -> None:
    async def one(who: str) -> Actor:
        with acting(Actor(who)):
            await asyncio.sleep(0)
            return await run_in_thread(current_actor)

    assert [actor.who for actor in await asyncio.gather(one("a"), one("b"))] == ["a", "b"]
    assert current_actor().who == "the server"
    assert at_the_shell().who.endswith("at the shell")
