"""The watched directory, poll by poll, into a real store."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from loramux_adapters.artifact.format import WEIGHTS_FILE
from loramux_adapters.base_info import BaseInfo
from loramux_adapters.lora.verify import Checked, check_adapter
from loramux_adapters.store.store import AdapterStore
from loramux_server.errors import ServerBusy
from loramux_server.publishing.watch import DirectoryWatch
from support.adapter_files import TINY_LINEARS, as_hub_snapshot, write_adapter
from support.publishing import unproved

BASE = BaseInfo("aa" * 32, TINY_LINEARS)


class Scene:
    """A store, a watched directory, and what the watch did."""

    def __init__(self, tmp_path: Path) -> None:
        self.directory = tmp_path / "watched"
        self.directory.mkdir()
        self.store = AdapterStore(tmp_path / "store", served_base_id=BASE.base_id)
        self.checks = self.failures = 0
        self.on_check = lambda: None
        self.start()

    def start(self) -> None:
        self.watch = DirectoryWatch(
            self.store, unproved(self.store, self.check), self.directory, limit=2**18, failed=self.fail
        )

    def check(self, directory: Path) -> Checked:
        self.checks += 1
        self.on_check()
        return check_adapter(directory, BASE, 64)

    def fail(self) -> None:
        self.failures += 1

    def write(self, name: str, seed: int = 0) -> Path:
        return write_adapter(self.directory / name, TINY_LINEARS, targets=["q_proj"], rank=4, seed=seed)

    def poll(self, times: int = 1) -> Scene:
        for _ in range(times):
            self.watch.poll()
        return self

    @property
    def names(self) -> list[str]:
        return [record.name for record in self.store.records()]

    def version(self, name: str) -> str:
        return self.store.record(name).version


@pytest.fixture
def scene(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Iterator[Scene]:
    caplog.set_level(logging.INFO)
    scene = Scene(tmp_path)
    yield scene
    scene.store.close()


def test_an_adapter_is_published_when_it_looks_the_same_twice_and_again_when_it_changed(scene: Scene) -> None:
    scene.write("pirate")
    assert scene.poll().names == []
    assert scene.poll().names == ["pirate"]
    first = scene.version("pirate")
    assert scene.poll(3).checks == 1
    scene.write("pirate", seed=1)
    scene.poll()
    assert scene.version("pirate") == first
    scene.poll()
    assert scene.version("pirate") != first and scene.checks == 2 and scene.failures == 0


def test_an_adapter_that_is_still_being_written_is_left_alone(scene: Scene) -> None:
    path = scene.write("pirate") / WEIGHTS_FILE
    whole = path.read_bytes()
    for size in range(0, len(whole), len(whole) // 6):
        path.write_bytes(whole[:size])
        scene.poll()
    assert scene.names == [] and scene.checks == 0
    path.write_bytes(whole)
    assert scene.poll(2).names == ["pirate"] and scene.failures == 0


def test_an_incomplete_directory_is_waited_for(scene: Scene) -> None:
    path = scene.write("pirate")
    shutil.move(path / WEIGHTS_FILE, scene.directory / "kept")
    assert scene.poll(3).names == [] and scene.failures == 0
    shutil.move(scene.directory / "kept", path / WEIGHTS_FILE)
    assert scene.poll(2).names == ["pirate"]


def test_a_change_while_it_is_copied_is_not_half_read(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    from loramux_server.publishing import watch

    scene.write("pirate")
    scene.poll()
    copy = watch.copy_adapter

    def copy_and_change(root: Path, parts: list[str], target: Path, *, limit: int) -> object:
        look = copy(root, parts, target, limit=limit)
        (root / "pirate" / WEIGHTS_FILE).write_bytes(b"half")
        return look

    with monkeypatch.context() as patch:
        patch.setattr(watch, "copy_adapter", copy_and_change)
        scene.poll()
    assert scene.names == [] and scene.checks == 0 and scene.failures == 0
    scene.write("pirate", seed=2)
    assert scene.poll(2).names == ["pirate"]


def test_a_failure_is_logged_with_its_reasons_once_for_each_change(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    path = scene.write("pirate")
    (path / "adapter_config.json").write_text("{")
    write_adapter(scene.directory / "big", TINY_LINEARS, rank=64, dtype="F32")
    scene.write("not a name")
    scene.poll(5)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert scene.failures == len(warnings) == 3
    assert any("pirate" in line and "JSON" in line for line in warnings)
    scene.write("pirate")
    assert scene.poll(2).names == ["pirate"] and scene.failures == 3
    (path / "adapter_config.json").write_text("{{")
    scene.poll(4)
    assert scene.failures == 4 and scene.names == ["pirate"]


def test_links_are_refused_and_files_and_hidden_directories_are_nobodys_adapters(
    scene: Scene, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outside = write_adapter(tmp_path / "outside", TINY_LINEARS, targets=["q_proj"], rank=4)
    (scene.directory / "linked").symlink_to(outside)
    scene.write(".incoming")
    (scene.directory / "README.md").write_text("x")
    path = scene.write("pirate")
    (path / WEIGHTS_FILE).unlink()
    (path / WEIGHTS_FILE).symlink_to(outside / WEIGHTS_FILE)
    os.mkfifo(scene.write("fifo") / "card.json")
    scene.poll(4)
    assert scene.names == [] and scene.failures == 3 and "symbolic link" in caplog.text


def test_a_pickle_instead_of_the_weights_is_said_once_and_the_weights_are_still_waited_for(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    path = scene.write("pirate")
    (path / WEIGHTS_FILE).rename(path / "adapter_model.bin")
    scene.poll(5)
    assert scene.failures == 1 and "adapter_model.bin is a pickle" in caplog.text
    (path / "adapter_model.bin").rename(path / WEIGHTS_FILE)
    assert scene.poll(2).names == ["pirate"]


def test_snapshots_of_the_hubs_cache_are_published(scene: Scene, tmp_path: Path) -> None:
    snapshot = as_hub_snapshot(scene.write("pirate"), tmp_path / "models--org--pirate")
    scene.directory = snapshot.parent
    scene.start()
    assert scene.poll(2).names == [snapshot.name] and scene.failures == 0


def test_a_directory_that_disappears_unregisters_nothing_and_says_so(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    path = scene.write("pirate")
    scene.poll(2)
    shutil.rmtree(path)
    assert scene.poll(3).names == ["pirate"]
    assert "pirate is gone from the watched directory; the adapter stays registered" in caplog.text
    scene.write("pirate", seed=1)
    assert scene.poll(2).version("pirate") is not None and scene.checks == 2


def test_what_was_rolled_back_or_deleted_stays_so_until_the_directory_changes_even_after_a_start(scene: Scene) -> None:
    scene.write("pirate")
    scene.poll(2)
    first = scene.version("pirate")
    scene.write("pirate", seed=1)
    scene.poll(2)
    scene.store.rollback("pirate")
    scene.poll(3)
    assert scene.version("pirate") == first
    scene.start()
    scene.poll(4)
    assert scene.version("pirate") == first and scene.checks == 3, "the check tells which version it is"
    scene.write("pirate", seed=2)
    scene.poll(2)
    assert scene.version("pirate") != first
    scene.store.delete("pirate")
    assert scene.poll(3).names == []


def test_a_start_publishes_what_changed_while_nobody_looked_and_heals_what_is_damaged(scene: Scene) -> None:
    scene.write("pirate")
    scene.write("haiku", seed=5)
    scene.poll(2)
    scene.write("pirate", seed=1)
    haiku = scene.version("haiku")
    (scene.store.directory(haiku) / WEIGHTS_FILE).unlink()
    with pytest.raises(Exception, match="cannot be read"):
        scene.store.load(haiku)
    before = scene.version("pirate")
    scene.start()
    scene.poll(2)
    assert scene.version("pirate") != before
    assert not scene.store.record("haiku").corrupt and scene.store.load(haiku).version == haiku


def test_a_directory_that_cannot_be_read_is_said_once_and_taken_up_again(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    scene.write("pirate")
    away = scene.directory.with_name("away")
    scene.directory.rename(away)
    scene.poll(3)
    assert scene.failures == 1 and "cannot be read: No such file" in caplog.text
    away.rename(scene.directory)
    assert scene.poll(2).names == ["pirate"]


def test_an_adapter_that_the_engine_is_too_busy_to_prove_is_taken_later(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    def busy() -> None:
        raise ServerBusy("the queue is full")

    scene.write("pirate")
    scene.on_check = busy
    assert scene.poll(3).names == [] and scene.checks == 2 and scene.failures == 0
    assert caplog.text.count("pirate from the watched directory is tried again at every look: the queue is full") == 1
    scene.on_check = lambda: None
    assert scene.poll().names == ["pirate"]


def test_an_adapter_in_a_folder_has_a_name_with_a_slash(scene: Scene) -> None:
    scene.write("org/pirate")
    scene.write("org/.incoming")
    scene.write("org/checkpoint-100")
    scene.write("haiku/nested")
    scene.write("haiku")
    assert scene.poll(2).names == ["haiku", "org/pirate"] and scene.failures == 0
    before = scene.version("org/pirate")
    scene.write("org/pirate", seed=1)
    assert scene.poll(2).version("org/pirate") != before


def test_a_folder_is_not_gone_into_over_a_link(scene: Scene, tmp_path: Path) -> None:
    write_adapter(tmp_path / "outside" / "pirate", TINY_LINEARS, targets=["q_proj"], rank=4)
    (scene.directory / "org").symlink_to(tmp_path / "outside")
    (scene.directory / "mine").mkdir()
    (scene.directory / "mine" / "pirate").symlink_to(tmp_path / "outside" / "pirate")
    assert scene.poll(3).names == [] and scene.failures == 2
