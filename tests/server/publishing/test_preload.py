"""Adapters published at start, into a real store."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loramux_adapters.base_info import BaseInfo
from loramux_adapters.lora.verify import Checked, check_adapter
from loramux_adapters.store.store import AdapterStore
from loramux_server.errors import ConfigError, ServerBusy
from loramux_server.publishing.preload import BUSY_SECONDS, preload
from support.adapter_files import TINY_LINEARS, as_hub_snapshot, write_adapter
from support.publishing import unproved

OLD, NEW = BaseInfo("aa" * 32, TINY_LINEARS), BaseInfo("bb" * 32, TINY_LINEARS)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A directory with two adapters, a file and a directory that is none."""
    directory = tmp_path / "adapters"
    for seed, name in enumerate(("haiku", "pirate")):
        write_adapter(directory / name, TINY_LINEARS, targets=["q_proj"], rank=4, seed=seed)
    (directory / "notes").mkdir()
    (directory / "README.md").write_text("x")
    return directory


@pytest.fixture
def open_store(tmp_path: Path) -> Iterator[Callable[[BaseInfo], AdapterStore]]:
    opened: list[AdapterStore] = []

    def open_(base: BaseInfo) -> AdapterStore:
        for store in opened:
            store.close()
        opened.append(AdapterStore(tmp_path / "store", reserved_names=["base"], served_base_id=base.base_id))
        return opened[-1]

    yield open_
    for store in opened:
        store.close()


def run(store: AdapterStore, source: Path, base: BaseInfo = OLD) -> list[str]:
    notes: list[str] = []
    preload(store, unproved(store, lambda directory: check_adapter(directory, base, 256)), source, notes.append)
    return notes


def names(store: AdapterStore) -> list[str]:
    return [record.name for record in store.records()]


def test_every_adapter_in_the_directory_is_published_once(
    source: Path, open_store: Callable[[BaseInfo], AdapterStore]
) -> None:
    store = open_store(OLD)
    assert run(store, source) == ["published haiku (rank 4, q_proj)", "published pirate (rank 4, q_proj)"]
    assert names(store) == ["haiku", "pirate"]
    assert run(store, source) == []


def test_a_registered_adapter_keeps_what_was_uploaded_under_its_name(
    source: Path, open_store: Callable[[BaseInfo], AdapterStore]
) -> None:
    store = open_store(OLD)
    run(store, source)
    version = store.record("pirate").version
    write_adapter(source / "pirate", TINY_LINEARS, targets=["q_proj"], rank=4, seed=9)
    assert run(store, source) == []
    assert store.record("pirate").version == version


@pytest.mark.parametrize("changed", [False, True], ids=["the same bytes", "other bytes"])
def test_an_adapter_that_was_checked_against_another_base_is_published_again(
    source: Path, open_store: Callable[[BaseInfo], AdapterStore], changed: bool
) -> None:
    run(open_store(OLD), source)
    if changed:
        write_adapter(source / "pirate", TINY_LINEARS, targets=["q_proj"], rank=4, seed=9)
    store = open_store(NEW)
    assert len(run(store, source, NEW)) == 2
    for name in ("haiku", "pirate"):
        store.acquire(name).release()
    assert run(store, source, NEW) == []


def test_what_cannot_be_served_is_left_out_with_a_note(
    source: Path, open_store: Callable[[BaseInfo], AdapterStore]
) -> None:
    (source / "haiku" / "adapter_config.json").write_text("{")
    shutil.copytree(source / "pirate", source / "pickled")
    (source / "pickled" / "adapter_model.safetensors").rename(source / "pickled" / "adapter_model.bin")
    shutil.copytree(source / "pirate", source / "base")
    shutil.copytree(source / "pirate", source / "a b")
    store = open_store(OLD)
    notes = run(store, source)
    assert names(store) == ["pirate"]
    assert [note.partition(":")[0] for note in notes if note.startswith("left out")] == [
        "left out a b",
        "left out base",
        "left out haiku",
        "left out pickled",
    ]
    assert "adapter_model.bin is a pickle" in notes[-1] or "adapter_model.bin is a pickle" in notes[-2]


def test_a_file_that_cannot_be_read_is_noted_and_the_others_are_published(
    source: Path, open_store: Callable[[BaseInfo], AdapterStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = os.open

    def open_with_permission(path: str | Path, flags: int, *args: Any, **options: Any) -> int:
        if path == "adapter_model.safetensors" and "haiku" in os.readlink(f"/proc/self/fd/{options['dir_fd']}"):
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", open_with_permission)
    store = open_store(OLD)
    notes = run(store, source)
    assert notes[0].startswith("left out haiku: ") and "Permission denied" in notes[0]
    assert names(store) == ["pirate"]


def test_an_adapter_in_a_folder_has_a_name_with_a_slash(
    source: Path, open_store: Callable[[BaseInfo], AdapterStore]
) -> None:
    write_adapter(source / "org" / "riddle", TINY_LINEARS, targets=["q_proj"], rank=4)
    store = open_store(OLD)
    assert "published org/riddle (rank 4, q_proj)" in run(store, source)
    assert names(store) == ["haiku", "org/riddle", "pirate"]


@pytest.mark.parametrize("times", [2, 1000], ids=["for a while", "all the time"])
def test_an_adapter_that_the_engine_is_too_busy_to_try_is_tried_again_for_some_time(
    source: Path, open_store: Callable[[BaseInfo], AdapterStore], times: int
) -> None:
    shutil.rmtree(source / "haiku")
    store, notes, slept = open_store(OLD), list[str](), list[float]()

    def busy(directory: Path) -> Checked:
        if len(slept) < times:
            raise ServerBusy("no time", retry_after=30)
        return check_adapter(directory, OLD, 256)

    preload(store, unproved(store, busy), source, notes.append, sleep=slept.append)
    if times == 2:
        assert notes == ["pirate is tried again in 30 s: no time"] * 2 + ["published pirate (rank 4, q_proj)"]
        assert slept == [30, 30]
    else:
        assert notes[-1] == "left out pirate: no time" and sum(slept) == BUSY_SECONDS


@pytest.mark.parametrize("directory", ["missing", "adapters/README.md"])
def test_a_directory_that_is_none_is_a_wrong_setting(
    source: Path, tmp_path: Path, open_store: Callable[[BaseInfo], AdapterStore], directory: str
) -> None:
    with pytest.raises(ConfigError, match="--preload: cannot read the directory"):
        run(open_store(OLD), tmp_path / directory)


def test_links_of_the_hubs_cache_are_followed_and_links_that_lead_out_are_refused(
    source: Path, tmp_path: Path, open_store: Callable[[BaseInfo], AdapterStore]
) -> None:
    snapshot = as_hub_snapshot(source / "pirate", tmp_path / "models--org--pirate")
    (source / "outside").symlink_to(snapshot)
    (source / "again").symlink_to("haiku")
    store = open_store(OLD)
    notes = run(store, source)
    assert names(store) == ["again", "haiku"]
    assert any("'outside' is a symbolic link to" in note and str(snapshot) in note for note in notes)
    run(store, snapshot.parent)
    assert names(store) == [snapshot.name, "again", "haiku"]
