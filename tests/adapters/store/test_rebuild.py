from __future__ import annotations

import fcntl
import logging
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loramux_adapters.artifact.format import CONFIG_FILE, WEIGHTS_FILE
from loramux_adapters.errors import AdapterCorrupt, AdapterNotFound, IndexLost, StoreUnavailable
from loramux_adapters.store import directory_records, index, index_file
from loramux_adapters.store.index_file import INDEX_FILE
from loramux_adapters.store.quarantine import in_short
from loramux_adapters.store.rebuild import rebuild_index
from loramux_adapters.store.store import AdapterStore, Published
from loramux_adapters.store.version_record import RECORD_FILE
from support.adapter_files import TINY_LINEARS, write_adapter

Open = Callable[..., AdapterStore]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def open_store(root: Path) -> Iterator[Open]:
    opened: list[AdapterStore] = []

    def open_(**options: Any) -> AdapterStore:
        opened.append(AdapterStore(root, **{"clock": lambda: 1000.0, "keep_versions": 3, **options}))
        return opened[-1]

    yield open_
    for store in opened:
        store.close()


def upload(store: AdapterStore, name: str = "tuned", seed: int = 0) -> Published:
    with store.stage() as staging:
        write_adapter(staging.directory, TINY_LINEARS, targets=["q_proj"], rank=1, seed=seed)
        return store.publish(name, staging, rank=1, base_id=None, target_modules=["q_proj"])


def lose_index(root: Path) -> None:
    for path in root.glob(f"{INDEX_FILE}*"):
        path.unlink()


def as_written_by_an_older_release(root: Path, schema: int) -> None:
    """Take from a store what the releases before did not know."""
    index = sqlite3.connect(root / INDEX_FILE)
    index.execute("DROP TABLE state")
    index.execute("DROP INDEX history_digest")
    for column in ("adapted_layers", "base_layers", "notes"):
        index.execute(f"ALTER TABLE history DROP COLUMN {column}")
    if schema == 1:
        index.execute("ALTER TABLE adapters DROP COLUMN pinned")
        index.execute("ALTER TABLE versions DROP COLUMN corrupt")
        index.execute("ALTER TABLE history DROP COLUMN fingerprint")
    index.execute(f"PRAGMA user_version = {schema}")
    index.commit()
    index.close()
    for path in (root / "generation", root / "changes.lock", *root.glob(f"versions/*/{RECORD_FILE}")):
        path.unlink()


def test_rollbacks_pins_times_and_shared_versions_come_back_and_what_was_deleted_does_not(
    open_store: Open, root: Path
) -> None:
    store = open_store()
    for seed in range(5):
        upload(store, "rolled-back", seed)
    store.rollback("rolled-back", upload(store, "other", 2).version)
    store.pin("other")
    upload(store, "deleted", 2)
    store.delete("deleted")
    upload(store, "gone", 9)
    lease = store.acquire("gone")
    store.delete("gone")  # its files are still there, for the request that runs
    assert store.directory(lease.version).exists()
    before = store.records()
    store.close()
    lose_index(root)
    with pytest.raises(IndexLost, match="it is not there"):
        open_store()
    rebuilt = rebuild_index(root)
    assert rebuilt.is_whole and rebuilt.names == {"rolled-back": 3, "other": 1} and rebuilt.old_index is None
    store = open_store()
    assert store.records() == before
    assert store.rollback("rolled-back", store.record("rolled-back").versions[0].version).outcome == "rolled_back"
    assert not store.directory(lease.version).exists()
    store.check_integrity()


def test_the_old_index_is_kept_aside_and_what_came_back_is_said(open_store: Open, root: Path) -> None:
    store = open_store()
    version = upload(store).version
    store.close()
    damaged = b"rotten" * 100
    (root / INDEX_FILE).write_bytes(damaged)
    with pytest.raises(IndexLost, match="it is damaged"):
        open_store()
    assert (root / INDEX_FILE).read_bytes() == damaged
    rebuilt = rebuild_index(root)
    assert rebuilt.old_index is not None and (root / rebuilt.old_index / INDEX_FILE).read_bytes() == damaged
    assert list(rebuilt.lines()) == [
        "the index is made anew: 1 adapters with 1 versions",
        "  tuned: 1 version",
        f"the old index is kept in {rebuilt.old_index}/",
    ]
    assert open_store().record("tuned").version == version
    open_store(owner=False)


def test_a_sound_index_made_anew_says_the_same(open_store: Open, root: Path) -> None:
    store = open_store()
    upload(store, "a", 0)
    upload(store, "a", 1)
    before = store.records()
    store.close()
    names = {rebuild_index(root).old_index for _ in range(3)}
    assert len(names) == 3
    assert open_store().records() == before


def test_no_index_is_made_anew_under_a_running_server(open_store: Open, root: Path) -> None:
    store = open_store()
    upload(store)
    with pytest.raises(StoreUnavailable, match="another server uses this store"):
        rebuild_index(root)
    assert store.record("tuned").name == "tuned"


def test_a_version_without_a_record_is_looked_up_in_what_is_left_of_the_old_index(open_store: Open, root: Path) -> None:
    store = open_store()
    version = upload(store).version
    store.close()
    (root / "versions" / version / RECORD_FILE).write_bytes(b"{}")
    index = sqlite3.connect(root / INDEX_FILE)
    index.execute("UPDATE adapters SET updated = 1001")
    index.commit()
    index.close()
    with pytest.raises(IndexLost, match="what it says is not what was written"):
        open_store()
    assert rebuild_index(root).is_whole
    store = open_store()
    assert (store.record("tuned").version, store.record("tuned").created) == (version, 1000)
    store.check_integrity()


def test_what_cannot_come_back_is_named_and_set_aside(
    open_store: Open, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store()
    nameless = upload(store, "nameless", 0).version
    old = upload(store, "headless", 1).version
    head = upload(store, "headless", 2).version
    damaged = upload(store, "damaged", 3).version
    (store.directory(damaged) / WEIGHTS_FILE).write_bytes(b"rotten")
    with pytest.raises(AdapterCorrupt):
        store.load(damaged)
    store.close()
    lose_index(root)
    (root / "versions" / nameless / RECORD_FILE).unlink()
    shutil.rmtree(root / "versions" / head)
    rebuilt = rebuild_index(root)
    assert not rebuilt.is_whole
    assert rebuilt.names == {"headless": 1, "damaged": 1}
    assert rebuilt.unknown == {nameless: "it has no record"} and rebuilt.damaged == {damaged: ["damaged"]}
    assert rebuilt.doubtful.keys() == {"headless"}
    text = "\n".join(rebuilt.lines())
    assert nameless[:12] in text and "damaged: version" in text and "not as it was: headless" in text
    store = open_store()
    assert store.record("headless").version == old and store.record("damaged").corrupt
    with pytest.raises(AdapterNotFound):
        store.record("nameless")
    (unknown,) = (one for one in store.quarantined() if one.digest == nameless)
    aside = root / "quarantine" / unknown.name
    assert (aside / WEIGHTS_FILE).exists() and (aside / CONFIG_FILE).exists()
    assert "has no record" in unknown.reason and unknown.since > 0 and unknown.nbytes > 1000
    assert any(nameless[:12] in line.getMessage() for line in caplog.records)
    assert "2 versions' files" in str(in_short(store.quarantined())) and in_short([]) is None


def test_what_is_no_version_and_no_record_does_not_stop_the_rest_from_coming_back(open_store: Open, root: Path) -> None:
    store = open_store()
    kept = upload(store, "kept", 0).version
    odd = upload(store, "odd", 1).version
    store.close()
    lose_index(root)
    (root / "versions" / odd / RECORD_FILE).unlink()
    (root / "versions" / odd / RECORD_FILE).mkdir()
    stray = root / "versions" / ("a" * 64)
    stray.write_text("a file")
    rebuilt = rebuild_index(root)
    assert rebuilt.names == {"kept": 1}
    assert rebuilt.unknown == {odd: "its record is damaged: it is a directory"}
    assert open_store().record("kept").version == kept
    assert stray.read_text() == "a file"


def test_versions_that_the_index_does_not_know_are_set_aside_and_never_removed(open_store: Open, root: Path) -> None:
    store = open_store()
    version = upload(store).version
    store.close()
    strays = ["0" * 64, "1" * 64]
    for stray in strays:
        shutil.copytree(root / "versions" / version, root / "versions" / stray)
    (root / "versions" / strays[1] / RECORD_FILE).unlink()
    for _ in range(2):
        store = open_store()
        found = {one.digest: one for one in store.quarantined()}
        assert found.keys() == {*strays}
        assert "its record is damaged" in found[strays[0]].reason and "has no record" in found[strays[1]].reason
        for one in found.values():
            assert (root / "quarantine" / one.name / WEIGHTS_FILE).exists()
        store.close()


def test_a_record_that_is_gone_is_written_anew_at_the_next_opening(open_store: Open, root: Path) -> None:
    store = open_store()
    version = upload(store).version
    before = store.records()
    store.close()
    (root / "versions" / version / RECORD_FILE).unlink()
    store = open_store()
    store.check_integrity()
    store.close()
    lose_index(root)
    assert rebuild_index(root).is_whole and open_store().records() == before


def test_each_removal_is_logged_with_its_reason(open_store: Open, root: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    store = open_store(keep_versions=1)
    first, second = upload(store, "tuned", 0).version, upload(store, "tuned", 1).version
    store.delete("tuned")
    (root / "staging" / "incoming-1").mkdir()
    store.close()
    open_store()
    assert [record.getMessage() for record in caplog.records] == [
        f"version {first[:12]} is removed: the adapter tuned keeps 1 versions, and has newer ones",
        f"version {second[:12]} is removed: the adapter tuned was deleted",
        "incoming-1 is removed from the store: an upload that never ended",
    ]


@pytest.mark.parametrize("schema", [1, 2])
@pytest.mark.parametrize("count", [1, 70])
def test_a_store_of_an_older_release_is_taken_over_and_has_records_then(
    open_store: Open, root: Path, schema: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    store = open_store()
    for seed in range(count):
        upload(store, f"n{seed}", seed)
    before = store.records()
    store.close()
    as_written_by_an_older_release(root, schema)
    store = open_store()
    assert store.records() == before
    store.check_integrity()
    store.close()
    lose_index(root)
    assert rebuild_index(root).is_whole
    assert open_store().records() == before


def test_the_next_schema_writes_the_records_that_a_crash_before_it_left_out(
    open_store: Open, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store()
    upload(store)
    with monkeypatch.context() as patch, pytest.raises(StoreUnavailable):
        patch.setattr(directory_records, "put_in_place", lambda path: os.stat(root / "none"))
        store.pin("tuned")
    before = store.records()
    assert before[0].pinned
    store.close()
    monkeypatch.setattr(index_file, "SCHEMA_VERSION", index_file.SCHEMA_VERSION + 1)
    monkeypatch.setattr(index, "SCHEMA_VERSION", index_file.SCHEMA_VERSION)
    later = {index_file.SCHEMA_VERSION - 1: ("ALTER TABLE history ADD COLUMN later TEXT",)}
    monkeypatch.setattr(index_file, "_MIGRATIONS", {**index_file._MIGRATIONS, **later})
    store = open_store()
    store.check_integrity()
    store.close()
    lose_index(root)
    assert rebuild_index(root).is_whole and open_store().records() == before


def test_a_command_beside_a_server_of_an_older_release_changes_nothing(open_store: Open, root: Path) -> None:
    store = open_store()
    upload(store)
    store.close()
    as_written_by_an_older_release(root, 2)
    running = open((root / "lock"), "ab")  # as the older release holds it
    fcntl.flock(running, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with pytest.raises(StoreUnavailable, match="of an older release"):
        open_store(owner=False)
    running.close()
    assert open_store(owner=False).record("tuned").name == "tuned"
