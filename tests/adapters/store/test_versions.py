"""Versions of a name: going back, keeping, pinning, damage, and what other processes do to them."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loramux_adapters.artifact.coverage import LayerCount
from loramux_adapters.artifact.format import WEIGHTS_FILE
from loramux_adapters.errors import (
    AdapterCorrupt,
    AdapterNotFound,
    BaseMismatch,
    PinRefused,
    RollbackImpossible,
)
from loramux_adapters.store.store import AdapterStore, Published
from support.adapter_files import TINY_LINEARS, write_adapter

Open = Callable[..., AdapterStore]


class Retired(list[str]):
    """What the store said may leave the memories."""

    def of(self, store: AdapterStore) -> Retired:
        store.tell_retired(self.append)
        return self


@pytest.fixture
def open_store(tmp_path: Path) -> Iterator[Open]:
    opened: list[AdapterStore] = []

    def open_(**options: Any) -> AdapterStore:
        opened.append(AdapterStore(tmp_path / "store", **{"clock": lambda: 1000.0, "keep_versions": 3, **options}))
        return opened[-1]

    yield open_
    for store in opened:
        store.close()


@pytest.fixture
def store(open_store: Open) -> AdapterStore:
    return open_store()


def upload(store: AdapterStore, name: str = "tuned", seed: int = 0, rank: int = 4) -> Published:
    with store.stage() as staging:
        write_adapter(staging.directory, TINY_LINEARS, targets=["q_proj"], rank=rank, seed=seed)
        return store.publish(name, staging, rank=rank, base_id=None, target_modules=["q_proj"])


def kept(store: AdapterStore, name: str = "tuned") -> list[str]:
    return [version.version for version in store.record(name).versions]


def spoil(store: AdapterStore, version: str) -> None:
    weights = store.directory(version) / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(AdapterCorrupt):
        store.load(version)


# rollback


def test_one_call_goes_back_and_another_one_further(store: AdapterStore) -> None:
    first, second, third = (upload(store, seed=seed).version for seed in range(3))
    assert store.rollback("tuned") == Published("tuned", second, "rolled_back")
    assert store.acquire("tuned").version == second and kept(store) == [third, second, first]
    assert store.rollback("tuned").version == first
    with pytest.raises(RollbackImpossible, match="no version older"):
        store.rollback("tuned")
    assert store.rollback("tuned", third[:8]) == Published("tuned", third, "rolled_back")
    assert store.rollback("tuned", third) == Published("tuned", third, "unchanged")


def test_what_is_not_kept_cannot_be_gone_back_to(store: AdapterStore) -> None:
    upload(store)
    with pytest.raises(AdapterNotFound):
        store.rollback("other")
    for prefix in ("0" * 64, "xyz", "", "../.."):
        with pytest.raises(AdapterNotFound):
            store.rollback("tuned", prefix)
    with pytest.raises(RollbackImpossible):
        store.rollback("tuned")


def test_the_version_that_was_rolled_back_to_outlives_the_one_that_was_rolled_back(open_store: Open) -> None:
    store = open_store(keep_versions=2)
    good, bad = upload(store, seed=0).version, upload(store, seed=1).version
    store.rollback("tuned")
    better = upload(store, seed=2).version
    assert kept(store) == [better, good] and bad not in kept(store)
    assert store.rollback("tuned").version == good


def test_running_requests_keep_their_version_through_a_rollback(store: AdapterStore) -> None:
    old, new = upload(store, seed=0).version, upload(store, seed=1).version
    lease = store.acquire("tuned")
    store.rollback("tuned")
    assert (lease.version, store.acquire("tuned").version) == (new, old)
    store.load(lease.version)


def test_nothing_that_cannot_be_served_is_gone_back_to(open_store: Open) -> None:
    store = open_store(served_base_id="aa")
    old, new = upload(store, seed=0).version, upload(store, seed=1).version
    store.close()
    store = open_store(served_base_id="bb")
    with pytest.raises(BaseMismatch):
        store.rollback("tuned")
    store.close()
    store = open_store(served_base_id="aa")
    spoil(store, old)
    with pytest.raises(AdapterCorrupt):
        store.rollback("tuned")
    assert store.acquire("tuned").version == new


def test_threads_that_publish_and_roll_back_always_leave_a_kept_version(store: AdapterStore) -> None:
    upload(store, seed=0)
    failures: list[Exception] = []

    def work(worker: int) -> None:
        try:
            for round_ in range(8):
                upload(store, seed=(worker + round_) % 5)
                try:
                    store.rollback("tuned")
                except RollbackImpossible:
                    continue
                with store.acquire("tuned") as lease:
                    store.load(lease.version)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and store.record("tuned").version in kept(store) and len(kept(store)) <= 3


# retirement: what may leave device and host memory


def test_a_replaced_rolled_back_or_deleted_version_is_retired_at_once_if_nobody_uses_it(store: AdapterStore) -> None:
    retired = Retired().of(store)
    first, second = upload(store, seed=0).version, upload(store, seed=1).version
    assert retired == [first]
    upload(store, seed=1)  # what is stored already changes nothing
    store.rollback("tuned")
    assert retired == [first, second]
    store.delete("tuned")
    assert sorted(retired[2:]) == sorted([first, second])  # one was current, the other could still be asked for by @


def test_a_version_in_use_is_retired_when_its_last_lease_ends(store: AdapterStore) -> None:
    retired = Retired().of(store)
    first = upload(store, seed=0).version
    leases = [store.acquire("tuned"), store.acquire("tuned")]
    upload(store, seed=1)
    leases[0].release()
    assert retired == []
    leases[1].release()
    assert retired == [first]


def test_a_version_that_is_pointed_at_again_is_not_retired(store: AdapterStore) -> None:
    retired = Retired().of(store)
    upload(store, seed=0)
    upload(store, "twin", seed=0)
    lease = store.acquire("tuned")
    second = upload(store, seed=1).version
    assert retired == []  # the twin points at it
    store.delete("twin")
    store.rollback("tuned")
    lease.release()
    assert retired == [second]


def test_an_old_version_that_is_asked_for_by_its_digest_stays(store: AdapterStore) -> None:
    retired = Retired().of(store)
    first = upload(store, seed=0).version
    upload(store, seed=1)
    del retired[:]
    store.acquire("tuned", first[:8]).release()
    assert retired == []


# pins


def test_a_pin_is_kept_in_the_store_and_belongs_to_the_name(open_store: Open) -> None:
    store = open_store()
    upload(store, seed=0)
    store.pin("tuned")
    store.pin("tuned")
    upload(store, seed=1)
    upload(store, "other", seed=2)
    store.close()
    store = open_store()
    assert {record.name: record.pinned for record in store.records()} == {"tuned": True, "other": False}
    assert [record.name for record in store.records(pinned=True)] == ["tuned"]
    store.unpin("tuned")
    store.unpin("tuned")
    assert store.records(pinned=True) == []
    for call in (store.pin, store.unpin):
        with pytest.raises(AdapterNotFound):
            call("nobody")


def test_a_deleted_name_takes_its_pin_with_it(store: AdapterStore) -> None:
    upload(store)
    store.pin("tuned")
    store.delete("tuned")
    upload(store)
    assert store.record("tuned").pinned is False


def test_pins_are_refused_beyond_their_share_of_memory(open_store: Open) -> None:
    store = open_store()
    upload(store, "a")
    size = store.record("a").nbytes
    store.close()
    store = open_store(pin_bytes=2 * size + size // 2)
    for seed, name in enumerate(("b", "c")):
        upload(store, name, seed=seed + 1)
    store.pin("a")
    store.pin("b")
    store.pin("b")
    with pytest.raises(PinRefused, match=f"the adapter c has {size} bytes, .* {2 * size} of the"):
        store.pin("c")
    store.unpin("a")
    store.pin("c")


# damage


def test_a_damaged_version_is_set_aside_named_and_healed_by_an_upload(
    store: AdapterStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sound = upload(store, seed=0).version
    version = upload(store, seed=1).version
    upload(store, "twin", seed=1)
    spoil(store, version)
    assert "(tuned, twin) is damaged" in caplog.text and "upload it again" in caplog.text
    assert not store.directory(version).exists()
    assert (tmp_path / "store" / "quarantine" / version / WEIGHTS_FILE).exists()
    for name in ("tuned", "twin"):
        assert store.record(name).corrupt
        with pytest.raises(AdapterCorrupt, match="upload it again"):
            store.acquire(name)
    assert [one.corrupt for one in store.record("tuned").versions] == [True, False]
    store.acquire("tuned", sound[:8]).release()  # the rest serves
    assert upload(store, seed=1) == Published("tuned", version, "repaired")
    store.acquire("twin").release()
    assert store.load(version).version == version and not store.record("twin").corrupt
    assert not list((tmp_path / "store" / "quarantine").iterdir())
    assert upload(store, seed=1).outcome == "unchanged"


def test_one_can_go_back_from_a_damaged_version(store: AdapterStore) -> None:
    sound, version = upload(store, seed=0).version, upload(store, seed=1).version
    spoil(store, version)
    assert store.rollback("tuned").version == sound
    store.acquire("tuned").release()


def test_what_was_set_aside_goes_with_its_name(store: AdapterStore, tmp_path: Path) -> None:
    version = upload(store).version
    spoil(store, version)
    store.delete("tuned")
    assert not list((tmp_path / "store" / "quarantine").iterdir())


def test_a_version_whose_files_are_gone_is_corrupt_from_the_next_opening_on(open_store: Open, tmp_path: Path) -> None:
    store = open_store()
    version = upload(store).version
    store.close()
    for path in store.directory(version).iterdir():
        path.unlink()
    store.directory(version).rmdir()
    assert open_store().record("tuned").corrupt


def test_a_file_that_cannot_be_opened_at_this_moment_is_not_set_aside(
    store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = upload(store).version

    def refuse(*_: object, **__: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(AdapterCorrupt):
            store.load(version)
    assert not store.record("tuned").corrupt
    assert store.load(version).version == version


def test_an_upload_between_the_failed_load_and_its_quarantine_is_not_set_aside(store: AdapterStore) -> None:
    version = upload(store).version
    weights = store.directory(version) / WEIGHTS_FILE
    sound = weights.read_bytes()
    weights.write_bytes(b"rotten")
    set_aside = store._upkeep.set_aside

    def heal_first(version: str) -> None:
        weights.write_bytes(sound)
        set_aside(version)

    store._upkeep.set_aside = heal_first  # type: ignore[method-assign]
    with pytest.raises(AdapterCorrupt):
        store.load(version)
    assert not store.record("tuned").corrupt and store.load(version).version == version


# what the check had to say


def test_layers_and_notes_of_a_version_are_kept_and_a_renewed_upload_renews_them(
    open_store: Open, tmp_path: Path
) -> None:
    store = open_store()
    upload(store)
    with store.stage() as staging:
        write_adapter(staging.directory, TINY_LINEARS, targets=["q_proj"], rank=4, seed=1)
        layers, notes = LayerCount(1, 2), ["one", "two"]
        store.publish("tuned", staging, rank=4, base_id=None, target_modules=["q_proj"], layers=layers, notes=notes)
    store.close()
    store = open_store()
    new, old = store.record("tuned").versions
    assert (new.layers, new.notes, old.layers, old.notes) == ((1, 2), ["one", "two"], None, [])
    assert (store.record("tuned").layers, store.record("tuned").notes) == ((1, 2), ["one", "two"])
    with store.stage() as staging:
        write_adapter(staging.directory, TINY_LINEARS, targets=["q_proj"], rank=4, seed=1)
        store.publish("tuned", staging, rank=4, base_id=None, target_modules=["q_proj"], notes=["three"])
    assert (store.record("tuned").layers, store.record("tuned").notes) == ((1, 2), ["three"])


# other processes

OTHER = """
import sys
from pathlib import Path
from support.adapter_files import TINY_LINEARS, write_adapter
from loramux_adapters.store.store import AdapterStore

store = AdapterStore(Path(sys.argv[1]), owner=False)
for line in sys.stdin:
    action, name, seed = line.split()
    if action == "publish":
        with store.stage() as staging:
            write_adapter(staging.directory, TINY_LINEARS, targets=["q_proj"], rank=4, seed=int(seed))
            done = store.publish(name, staging, rank=4, base_id=None, target_modules=["q_proj"]).version
    elif action == "delete":
        done = store.delete(name)
    elif action == "pin":
        done = store.pin(name)
    print(done, flush=True)
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Callable[..., str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", OTHER, str(tmp_path / "store")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None

    def tell(action: str, name: str, seed: int = 0) -> str:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(f"{action} {name} {seed}\n")
        process.stdin.flush()
        return process.stdout.readline().strip()

    yield tell
    process.stdin.close()
    process.stdout.close()
    assert process.wait(20) == 0


def test_what_another_process_publishes_and_deletes_is_seen_and_leaves_memory_and_disk(
    store: AdapterStore, other: Callable[..., str], tmp_path: Path
) -> None:
    retired = Retired().of(store)
    mine = upload(store, "mine", seed=7).version
    store.refresh()
    theirs = other("publish", "theirs", 0)
    with store.acquire("theirs") as lease:  # at once, without a refresh
        assert lease.version == theirs and store.load(theirs).version == theirs
    assert store.refresh() and not store.refresh()
    running = store.acquire("theirs")
    newer = other("publish", "theirs", 1)
    other("pin", "theirs")
    assert store.refresh() and retired == []
    assert store.acquire("theirs").version == newer and store.records(pinned=True)[0].name == "theirs"
    running.release()
    assert retired == [theirs]
    other("delete", "theirs")
    other("delete", "mine")
    with pytest.raises(AdapterNotFound):
        store.acquire("mine")
    assert store.directory(mine).exists()  # only the owner collects
    assert store.refresh()
    assert mine in retired and not store.directory(mine).exists()
    left = {path.name for path in (tmp_path / "store" / "versions").iterdir()}
    assert left == {newer}  # leased above, and never given back


def test_two_processes_that_publish_at_the_same_time_lose_nothing(
    store: AdapterStore, other: Callable[..., str]
) -> None:
    stop = threading.Event()

    def refresh() -> None:
        while not stop.is_set():
            store.refresh()

    thread = threading.Thread(target=refresh)
    thread.start()
    try:
        for seed in range(10):
            theirs, mine = other("publish", f"their-{seed}", seed), upload(store, f"my-{seed}", seed=seed).version
            assert theirs == mine
            if seed % 2:
                other("delete", f"their-{seed}")
    finally:
        stop.set()
        thread.join()
    for record in store.records():
        assert store.load(record.version).version == record.version
    assert len(store.records()) == 15
