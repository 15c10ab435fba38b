from __future__ import annotations

import errno
import fcntl
import os
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from loramux_adapters.artifact.format import CONFIG_FILE, KNOWN_FILES, WEIGHTS_FILE
from loramux_adapters.errors import (
    AdapterCorrupt,
    AdapterNotFound,
    AdapterRejected,
    BaseMismatch,
    InvalidAdapterName,
    StoreUnavailable,
)
from loramux_adapters.store import directory_records
from loramux_adapters.store.store import AdapterStore, Published
from loramux_adapters.store.version_record import RECORD_FILE
from support.adapter_files import TINY_LINEARS, write_adapter


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def open_store(tmp_path: Path, clock: Clock) -> Iterator[Callable[..., AdapterStore]]:
    opened: list[AdapterStore] = []

    def open_(root: Path = tmp_path / "store", **options: object) -> AdapterStore:
        opened.append(AdapterStore(root, **{"busy_timeout": 0.05, "clock": clock, **options}))  # type: ignore[arg-type]
        return opened[-1]

    yield open_
    for store in opened:
        store.close()


@pytest.fixture
def store(open_store: Callable[..., AdapterStore]) -> AdapterStore:
    return open_store(reserved_names=["base"])


def upload(
    store: AdapterStore, name: str = "tuned", *, seed: int = 0, base_id: str | None = None, rank: int = 4
) -> Published:
    with store.stage() as staging:
        write_adapter(staging.directory, TINY_LINEARS, targets=["q_proj"], rank=rank, seed=seed)
        return store.publish(name, staging, rank=rank, base_id=base_id, target_modules=["q_proj"])


def stored(root: Path) -> set[str]:
    return {path.name for path in (root / "versions").iterdir()}


def is_consistent(store: AdapterStore, root: Path) -> bool:
    store.check_integrity()
    kept = {version.version for record in store.records() for version in record.versions}
    for version in kept:
        store.load(version)
    return stored(root) == kept and not list((root / "staging").iterdir())


def test_a_published_adapter_is_listed_leased_and_loaded(store: AdapterStore, clock: Clock) -> None:
    published = upload(store, rank=8)
    assert published.outcome == "created"
    record = store.record("tuned")
    assert (record.name, record.version, record.rank) == ("tuned", published.version, 8)
    assert record.target_modules == ["q_proj"] and record.base_verified is False and record.references == 0
    assert (record.created, record.updated) == (1000, 1000)
    files = [path for path in store.directory(published.version).iterdir() if path.name in KNOWN_FILES]
    assert record.nbytes == sum(path.stat().st_size for path in files) and len(files) == 2
    with store.acquire("tuned") as lease:
        assert (lease.name, lease.version, lease.rank) == ("tuned", published.version, 8)
        assert lease.nbytes == record.nbytes >= store.load(lease.version).nbytes
        assert store.record("tuned").references == 1
        adapter = store.load(lease.version)
        assert adapter.version == published.version and adapter.rank == 8 and len(adapter.modules) == 2
    assert store.record("tuned").references == 0


def test_new_bytes_update_the_name_and_the_same_bytes_change_nothing(store: AdapterStore, clock: Clock) -> None:
    first = upload(store)
    clock.now = 2000
    assert upload(store) == Published("tuned", first.version, "unchanged")
    assert store.record("tuned").updated == 1000
    second = upload(store, seed=1)
    assert second.outcome == "updated" and second.version != first.version
    record = store.record("tuned")
    assert (record.version, record.created, record.updated) == (second.version, 1000, 2000)
    assert [(version.version, version.created) for version in record.versions] == [
        (second.version, 2000),
        (first.version, 1000),
    ]


def test_each_name_keeps_its_last_versions_and_others_go(store: AdapterStore, tmp_path: Path) -> None:
    versions = [upload(store, seed=seed).version for seed in range(4)]
    assert [record.version for record in store.record("tuned").versions] == [versions[3], versions[2]]
    assert stored(tmp_path / "store") == set(versions[2:])


def test_an_older_version_that_comes_back_is_the_newest_again(store: AdapterStore) -> None:
    first, second = upload(store, seed=0), upload(store, seed=1)
    assert upload(store, seed=0) == Published("tuned", first.version, "updated")
    assert [record.version for record in store.record("tuned").versions] == [first.version, second.version]


def test_a_replaced_version_stays_while_it_is_leased(open_store: Callable[..., AdapterStore], tmp_path: Path) -> None:
    store = open_store(keep_versions=1)
    old = upload(store, seed=0)
    leases = [store.acquire("tuned"), store.acquire("tuned")]
    new = upload(store, seed=1)
    assert store.acquire("tuned").version == new.version
    leases[0].release()
    leases[0].release()
    assert store.load(old.version).version == old.version
    leases[1].release()
    assert stored(tmp_path / "store") == {new.version}
    with pytest.raises(AdapterCorrupt):
        store.load(old.version)


def test_a_deleted_name_is_gone_at_once_and_its_bytes_with_the_last_lease(store: AdapterStore, tmp_path: Path) -> None:
    published = upload(store)
    lease = store.acquire("tuned")
    store.delete("tuned")
    for call in (store.record, store.delete, store.acquire):
        with pytest.raises(AdapterNotFound):
            call("tuned")
    assert store.records() == []
    store.load(published.version)
    lease.release()
    assert stored(tmp_path / "store") == set()


def test_a_version_that_two_names_share_stays_for_the_other(store: AdapterStore, tmp_path: Path) -> None:
    first, second = upload(store, "a"), upload(store, "b")
    assert first.version == second.version and second.outcome == "created"
    store.delete("a")
    assert store.acquire("b").version == first.version
    store.load(first.version)


def test_a_version_published_again_while_it_waits_for_its_last_lease_stays(store: AdapterStore) -> None:
    published = upload(store)
    lease = store.acquire("tuned")
    store.delete("tuned")
    upload(store, "again")
    lease.release()
    store.load(published.version)


def test_a_kept_version_is_leased_by_a_prefix_of_its_digest(store: AdapterStore) -> None:
    old, new = upload(store, seed=0).version, upload(store, seed=1).version
    assert store.acquire("tuned", old[:8]).version == old
    assert store.acquire("tuned", new).version == new
    for prefix in (old[:7], old[:8].upper(), "0" * 8, old + "0", "", "%" * 8, "../../.."):
        with pytest.raises(AdapterNotFound):
            store.acquire("tuned", prefix)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/../b", "/a", "a\0", "a\n", "-a", "a:b", "a@b", "a b", "\u00e4", "a\u2024b", "%2e%2e"]
    + ["a" * 256, "base"],
)
def test_a_name_outside_the_rule_or_reserved_is_refused(store: AdapterStore, name: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidAdapterName):
        upload(store, name)
    with pytest.raises(AdapterNotFound):
        store.acquire(name)
    assert is_consistent(store, tmp_path / "store")


@pytest.mark.parametrize("name", ["a", "0", "A.b_c-1", "org/adapter", "a" * 255])
def test_a_name_inside_the_rule_is_taken(store: AdapterStore, name: str) -> None:
    assert upload(store, name).name == name


def test_unpublished_files_go_with_their_staging(store: AdapterStore, tmp_path: Path) -> None:
    with pytest.raises(KeyError), store.stage() as staging:
        (staging.directory / "half").write_bytes(b"x")
        raise KeyError
    assert not list((tmp_path / "store" / "staging").iterdir())


def test_only_the_parts_of_a_version_are_stored(store: AdapterStore) -> None:
    with store.stage() as staging:
        write_adapter(staging.directory, TINY_LINEARS, targets=["q_proj"])
        (staging.directory / "card.json").write_text("{}")
        (staging.directory / "README.md").write_text("x")
        (staging.directory / "folder").mkdir()
        (staging.directory / "link").symlink_to("/etc")
        version = store.publish("a", staging, rank=8, base_id=None, target_modules=["q_proj"]).version
    names = {path.name for path in store.directory(version).iterdir()}
    assert names == {CONFIG_FILE, WEIGHTS_FILE, "card.json", RECORD_FILE}


def test_files_that_cannot_be_parsed_are_not_published(store: AdapterStore, tmp_path: Path) -> None:
    with store.stage() as staging, pytest.raises(AdapterRejected):
        store.publish("a", staging, rank=8, base_id=None, target_modules=["q_proj"])
    assert is_consistent(store, tmp_path / "store") and store.records() == []


def test_everything_is_there_after_reopening(open_store: Callable[..., AdapterStore], tmp_path: Path) -> None:
    first = open_store()
    upload(first, "a", seed=0)
    upload(first, "a", seed=1, base_id="ab" * 32)
    upload(first, "b", seed=2)
    before = first.records()
    first.acquire("a")  # never released: leases end with the process
    first.delete("b")
    first.close()
    second = open_store()
    assert second.records() == before[:1]
    assert is_consistent(second, tmp_path / "store")


def test_the_base_that_is_served_decides(open_store: Callable[..., AdapterStore]) -> None:
    first = open_store(served_base_id="aa")
    upload(first, "named", seed=0, base_id="aa")
    upload(first, "unnamed", seed=1)
    upload(first, "forced", seed=2, base_id="bb")
    assert {record.name: record.base_verified for record in first.records()} == {
        "forced": False,
        "named": True,
        "unnamed": False,
    }
    first.close()
    second = open_store(served_base_id="cc")
    for name in ("named", "unnamed", "forced"):
        with pytest.raises(BaseMismatch):
            second.acquire(name)
    assert upload(second, "unnamed", seed=1).outcome == "unchanged"
    assert second.acquire("unnamed").name == "unnamed"


def test_damaged_files_are_found_when_they_are_loaded(store: AdapterStore) -> None:
    version = upload(store).version
    weights = store.directory(version) / WEIGHTS_FILE
    sound = weights.read_bytes()
    for damaged in (sound[:-1], sound[:-1] + bytes([sound[-1] ^ 1]), sound + b"x", b"", None):
        weights.unlink() if damaged is None else weights.write_bytes(damaged)
        with pytest.raises(AdapterCorrupt) as caught:
            store.load(version)
        assert str(weights.parent.parent) not in str(caught.value)
        assert upload(store).outcome == "repaired" and weights.read_bytes() == sound


@pytest.mark.parametrize("name", ["tuned", "other"])
def test_uploading_a_damaged_version_again_repairs_it(store: AdapterStore, name: str, tmp_path: Path) -> None:
    version = upload(store).version
    (store.directory(version) / WEIGHTS_FILE).write_bytes(b"rotten")
    upload(store, name)
    assert store.load(version).version == version
    assert is_consistent(store, tmp_path / "store")


def test_a_full_disk_changes_nothing(store: AdapterStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (upload(store), store.records())

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/secret/path")

    for call in ("fsync", "rename", "mkdir"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            with pytest.raises(StoreUnavailable, match="No space left") as caught:
                upload(store, seed=1)
        assert "secret" not in str(caught.value)
        assert store.records() == before[1]
    with pytest.raises(StoreUnavailable), store.stage():
        fail()
    with pytest.raises(ConnectionResetError), store.stage():
        raise ConnectionResetError
    assert upload(store, seed=1).outcome == "updated"
    assert is_consistent(store, tmp_path / "store")


def fail_with(number: int) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_a_record_that_finds_no_room_changes_nothing_and_leaves_nothing(
    store: AdapterStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "store"
    version = upload(store).version
    other = upload(store, "other", seed=5).version
    (store.directory(other) / WEIGHTS_FILE).write_bytes(b"rotten")
    before = store.records()
    with monkeypatch.context() as patch:
        patch.setattr(directory_records, "write_beside", fail_with(errno.ENOSPC))
        for change in (
            lambda: upload(store, seed=1),
            lambda: upload(store, "new", seed=2),
            lambda: upload(store, "other", seed=5),  # which would repair it
            lambda: store.pin("tuned"),
            lambda: store.delete("tuned"),
        ):
            with pytest.raises(StoreUnavailable, match="No space left"):
                change()
            assert store.records() == before and stored(root) == {version, other}
            assert not list((root / "staging").iterdir()) and not store.quarantined()
    assert upload(store, "other", seed=5).outcome == "repaired"
    assert is_consistent(store, root)


def test_a_record_that_cannot_take_its_place_is_written_with_the_next_change(
    store: AdapterStore, open_store: Callable[..., AdapterStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(store)
    with monkeypatch.context() as patch:
        patch.setattr(directory_records, "put_in_place", fail_with(errno.EIO))
        with pytest.raises(StoreUnavailable, match="Input/output error"):
            store.pin("tuned")
    store.check_integrity()  # it began with what was left to do
    assert store.record("tuned").pinned
    with monkeypatch.context() as patch:
        patch.setattr(directory_records, "put_in_place", fail_with(errno.EIO))
        with pytest.raises(StoreUnavailable):
            store.unpin("tuned")
    store.close()
    again = open_store()
    assert not again.record("tuned").pinned and is_consistent(again, tmp_path / "store")


def test_another_process_that_changes_the_store_is_waited_for_and_then_named(
    store: AdapterStore, tmp_path: Path
) -> None:
    upload(store)
    with open(tmp_path / "store" / "changes.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(StoreUnavailable, match="another process keeps the adapter store locked"):
            store.pin("tuned")
        assert store.acquire("tuned").name == "tuned"
    store.pin("tuned")


def test_a_locked_index_stops_changes_and_not_lookups(store: AdapterStore, tmp_path: Path) -> None:
    published = upload(store)
    other = sqlite3.connect(tmp_path / "store" / "index.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    try:
        with pytest.raises(StoreUnavailable, match="locked"):
            upload(store, seed=1)
        with pytest.raises(StoreUnavailable, match="locked"):
            store.delete("tuned")
        assert store.acquire("tuned").version == published.version
    finally:
        other.execute("ROLLBACK")
        other.close()
    assert is_consistent(store, tmp_path / "store")
    assert upload(store, seed=1).outcome == "updated"


def test_an_index_that_is_none_or_from_the_future_is_not_touched(
    open_store: Callable[..., AdapterStore], tmp_path: Path
) -> None:
    root = tmp_path / "store"
    root.mkdir()
    (root / "index.sqlite").write_bytes(b"this is no database" * 100)
    with pytest.raises(StoreUnavailable):
        open_store()
    assert (root / "index.sqlite").read_bytes().startswith(b"this is")
    (root / "index.sqlite").unlink()
    future = sqlite3.connect(root / "index.sqlite")
    future.execute("PRAGMA user_version = 99")
    future.close()
    with pytest.raises(StoreUnavailable, match="99"):
        open_store()


def test_a_root_that_is_a_file_is_reported(open_store: Callable[..., AdapterStore], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreUnavailable):
        open_store(tmp_path / "file")


def test_opening_removes_what_a_crash_left_and_nothing_else(
    open_store: Callable[..., AdapterStore], tmp_path: Path
) -> None:
    root = tmp_path / "store"
    store = open_store()
    version = upload(store).version
    store.close()
    for litter in ("staging/incoming-1", "staging/outgoing-1", "versions/" + "0" * 64):
        shutil.copytree(root / "versions" / version, root / litter)
    for foreign in ("staging/mine", "versions/mine", "mine"):
        (root / foreign).mkdir()
    open_store()
    assert stored(root) == {version, "mine"} and (root / "mine").exists()
    assert [path.name for path in (root / "staging").iterdir()] == ["mine"]


def test_a_store_has_one_owner_at_a_time(open_store: Callable[..., AdapterStore], tmp_path: Path) -> None:
    tool = open_store(owner=False)
    first = open_store()
    version = upload(first).version
    with pytest.raises(StoreUnavailable, match="another server uses this store; give each its own --adapter-dir"):
        open_store()
    assert upload(tool, seed=1).outcome == "updated"
    first.close()
    assert stored(tmp_path / "store") == {record.version for record in open_store().record("tuned").versions}
    assert version in stored(tmp_path / "store")


def test_an_adapter_whose_name_is_the_bases_now_is_named_in_the_log(
    open_store: Callable[..., AdapterStore], caplog: pytest.LogCaptureFixture
) -> None:
    first = open_store()
    upload(first, "tuned")
    first.close()
    assert not caplog.records
    second = open_store(reserved_names=["base", "tuned"])
    assert [record.getMessage() for record in caplog.records] == [
        "the adapter tuned is shadowed by the base model, which is now served under its name"
    ]
    assert second.record("tuned").name == "tuned"


def test_a_second_process_sees_everything_and_removes_nothing(
    store: AdapterStore, open_store: Callable[..., AdapterStore], tmp_path: Path
) -> None:
    published = upload(store)
    lease = store.acquire("tuned")
    with store.stage() as staging:
        second = open_store(owner=False)
        assert second.record("tuned").version == published.version
        second.delete("tuned")
        upload(second, "new", seed=1)
        assert staging.directory.exists()
    assert [record.name for record in store.records()] == ["new"]
    store.load(lease.version)


def test_threads_that_publish_lease_and_delete_leave_a_consistent_store(
    open_store: Callable[..., AdapterStore], tmp_path: Path
) -> None:
    store = open_store(keep_versions=1, busy_timeout=5.0)
    stop = threading.Event()

    def publish(worker: int) -> None:
        for round_ in range(6):
            upload(store, f"name-{worker % 2}", seed=round_ % 3)
            if round_ % 3 == 2:
                try:
                    store.delete(f"name-{worker % 2}")
                except AdapterNotFound:
                    continue

    def read(worker: int) -> int:
        loads = 0
        while not stop.is_set():
            try:
                lease = store.acquire(f"name-{worker % 2}")
            except AdapterNotFound:
                continue
            with lease:
                assert store.load(lease.version).version == lease.version
                loads += 1
        return loads

    with ThreadPoolExecutor(5) as pool:
        readers = [pool.submit(read, worker) for worker in range(2)]
        try:
            for writer in [pool.submit(publish, worker) for worker in range(3)]:
                writer.result(timeout=60)
        finally:
            stop.set()
        assert sum(reader.result(timeout=10) for reader in readers) > 0
    assert is_consistent(store, tmp_path / "store")
