"""An index that is gone, damaged or short: either all that was acknowledged is there, or the store does not open."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from loramux_adapters.artifact.format import WEIGHTS_FILE
from loramux_adapters.errors import AdapterCorrupt, IndexLost, StoreUnavailable
from loramux_adapters.store.index_file import INDEX_FILE
from loramux_adapters.store.rebuild import rebuild_index
from loramux_adapters.store.records import AdapterRecord
from loramux_adapters.store.store import AdapterStore
from support.adapter_files import TINY_LINEARS, write_adapter

WAL = f"{INDEX_FILE}-wal"
FLIPS, CUTS = 160, 24  # of each file


def upload(store: AdapterStore, name: str, seed: int) -> str:
    with store.stage() as staging:
        write_adapter(staging.directory, TINY_LINEARS, targets=["q_proj"], rank=1, seed=seed)
        return store.publish(name, staging, rank=1, base_id="ab" * 32, target_modules=["q_proj"], proof="close").version


@contextmanager
def opened(root: Path) -> Iterator[AdapterStore]:
    store = AdapterStore(root, busy_timeout=0.05, clock=lambda: 2000.0, served_base_id="ab" * 32)
    try:
        yield store
    finally:
        store.close()


def fill(store: AdapterStore) -> list[AdapterRecord]:
    """One of everything that can become of a name; returns what was acknowledged."""
    for seed in range(3):
        upload(store, "replaced", seed)
    upload(store, "rolled-back", 3)
    upload(store, "rolled-back", 4)
    store.rollback("rolled-back")
    upload(store, "pinned", 5)
    store.pin("pinned")
    shared = [upload(store, name, 6) for name in ("one", "two", "deleted-too")]
    upload(store, "deleted", 7)
    store.delete("deleted")
    store.delete("deleted-too")
    assert len(set(shared)) == 1
    damaged = upload(store, "damaged", 8)
    (store.directory(damaged) / WEIGHTS_FILE).write_bytes(b"rotten")
    with pytest.raises(AdapterCorrupt):
        store.load(damaged)
    return store.records()


Template = tuple[Path, list[AdapterRecord]]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Template:
    """A store as a kill leaves it, with changes in its WAL; and what was acknowledged."""
    root = tmp_path_factory.mktemp("killed") / "store"
    with opened(root) as store:
        upload(store, "first", 20)
        reader = sqlite3.connect(root / INDEX_FILE, isolation_level=None)
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM adapters").fetchall()  # so the WAL cannot be emptied
        acknowledged = fill(store)
        shutil.copytree(root, root.with_name("copy"))
        reader.close()
    return root.with_name("copy"), acknowledged


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Template:
    """A store as a stop leaves it, without a WAL."""
    root = tmp_path_factory.mktemp("stopped") / "store"
    with opened(root) as store:
        upload(store, "first", 20)
        acknowledged = fill(store)
    return root, acknowledged


def copied(killed: Path, root: Path) -> Path:
    """The versions are hard links: no file of theirs is written into."""
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(killed, root, copy_function=os.link)
    for path in [path for path in root.iterdir() if path.is_file()]:
        path.unlink()
        shutil.copyfile(killed / path.name, path)
    return root


def assert_all_is_there(root: Path, acknowledged: list[AdapterRecord]) -> bool:
    """At once, or after the index was made anew; returns whether that was needed."""
    was_refused = False
    try:
        with opened(root) as store:
            store.check_integrity()
    except StoreUnavailable as error:
        was_refused = True
        assert isinstance(error, IndexLost) or "use the release that wrote it" in str(error)
        rebuild_index(root)
    with opened(root) as store:
        assert store.records() == acknowledged
        assert [store.record(one.name) for one in acknowledged] == acknowledged
        assert store.quarantined()[0].reason == "its files are damaged" and len(store.quarantined()) == 1
        store.check_integrity()
    return was_refused


@pytest.fixture
def without_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # thousands of them


@pytest.mark.usefixtures("without_fsync")
@pytest.mark.parametrize(("how", "name"), [("stopped", INDEX_FILE), ("killed", WAL), ("killed", INDEX_FILE)])
def test_whichever_bit_flips_nothing_acknowledged_is_lost(
    how: str, name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    template, acknowledged = request.getfixturevalue(how)
    sound = (template / name).read_bytes()
    assert len(sound) > 20_000
    # the first hundred bytes are SQLite's header, where each one counts
    places = [*range(0, 100, 5), *range(100, len(sound), len(sound) // FLIPS)]
    refused = 0
    for number, place in enumerate(places):
        root = copied(template, tmp_path / "store")
        damaged = bytearray(sound)
        damaged[place] ^= 1 << number % 8
        (root / name).write_bytes(damaged)
        refused += assert_all_is_there(root, acknowledged)
    print(f"{how}, {name}: {len(places)} flips, {refused} refused")
    assert refused > len(places) // 20


@pytest.mark.usefixtures("without_fsync")
@pytest.mark.parametrize(("how", "name"), [("stopped", INDEX_FILE), ("killed", WAL), ("killed", INDEX_FILE)])
def test_wherever_a_file_is_cut_off_nothing_acknowledged_is_lost(
    how: str, name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    template, acknowledged = request.getfixturevalue(how)
    size = (template / name).stat().st_size
    refused = 0
    lengths = sorted({0, 1, 100, 4096, size - 1, *range(0, size, size // CUTS)})
    for length in lengths:
        root = copied(template, tmp_path / "store")
        os.truncate(root / name, length)
        refused += assert_all_is_there(root, acknowledged)
    print(f"{how}, {name}: {len(lengths)} lengths, {refused} refused")
    assert refused > len(lengths) // 10


@pytest.mark.parametrize("gone", [[INDEX_FILE], [WAL], [INDEX_FILE, WAL]])
def test_a_missing_index_is_refused_by_name_and_made_anew(killed: Template, gone: list[str], tmp_path: Path) -> None:
    template, acknowledged = killed
    root = copied(template, tmp_path / "sto re")
    for name in gone:
        (root / name).unlink()
    before = sorted(path.relative_to(root) for path in root.rglob("*") if WAL not in path.name)
    for owner in (True, False):
        with pytest.raises(IndexLost) as caught:
            AdapterStore(root, owner=owner)
    assert f"loramux adapters rebuild-index --adapter-dir '{root}'" in str(caught.value)
    assert f"Beside it are {len(list((root / 'versions').iterdir()))} versions' files" in str(caught.value)
    assert "is not there" in str(caught.value) or "lacks the last" in str(caught.value)
    assert [path for path in before if not (root / path).exists() and "-shm" not in path.name] == []
    assert assert_all_is_there(root, acknowledged)


def test_an_empty_index_that_is_sound_by_itself_is_refused(killed: Template, tmp_path: Path) -> None:
    template, acknowledged = killed
    root = copied(template, tmp_path / "store")
    for path in root.glob(f"{INDEX_FILE}*"):
        path.unlink()
    other = sqlite3.connect(root / INDEX_FILE)
    other.execute("VACUUM")
    other.execute("PRAGMA user_version = 0")
    other.close()
    with pytest.raises(IndexLost, match="it holds nothing|it is empty"):
        AdapterStore(root)
    assert assert_all_is_there(root, acknowledged)


def test_an_older_index_put_back_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "store"
    with opened(root) as store:
        upload(store, "kept", 0)
        upload(store, "deleted", 1)
    old = (root / INDEX_FILE).read_bytes()
    with opened(root) as store:
        store.delete("deleted")
        acknowledged = store.records()
    (root / INDEX_FILE).write_bytes(old)
    with pytest.raises(IndexLost, match="it lacks the last 1 changes"):
        AdapterStore(root)
    rebuild_index(root)
    with opened(root) as store:
        assert store.records() == acknowledged


def test_the_number_of_the_last_change_is_found_in_the_records_if_its_file_is_lost(tmp_path: Path) -> None:
    root = tmp_path / "store"
    with opened(root) as store:
        upload(store, "kept", 0)
    old = (root / INDEX_FILE).read_bytes()
    with opened(root) as store:
        upload(store, "kept", 1)
        acknowledged = store.records()
    new = (root / INDEX_FILE).read_bytes()
    for damaged in (b"{}", (root / "generation").read_bytes() + b"x" * 5000):
        (root / "generation").write_bytes(damaged)
        with opened(root) as store:  # nothing is missing
            assert store.records() == acknowledged
            store.check_integrity()
    (root / "generation").unlink()
    (root / INDEX_FILE).write_bytes(old)
    with pytest.raises(IndexLost, match="it lacks the last 1 changes"):
        AdapterStore(root)
    (root / INDEX_FILE).write_bytes(new)
    with opened(root) as store:
        assert store.records() == acknowledged


def test_a_store_whose_versions_are_all_gone_begins_anew_without_an_index(tmp_path: Path) -> None:
    root = tmp_path / "store"
    with opened(root) as store:
        upload(store, "a", 0)
        store.delete("a")
    (root / INDEX_FILE).unlink()
    with opened(root) as store:
        assert store.records() == []
        upload(store, "b", 1)
        store.check_integrity()


def test_the_wal_is_empty_after_each_change(tmp_path: Path) -> None:
    root = tmp_path / "store"
    with opened(root) as store:
        for change in (lambda: upload(store, "a", 0), lambda: store.pin("a"), lambda: store.delete("a")):
            change()
            assert (root / WAL).stat().st_size == 0
