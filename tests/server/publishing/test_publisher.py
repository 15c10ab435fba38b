"""From checked files to a version in store and host cache, both real; no engine."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loramux_adapters.base_info import BaseInfo
from loramux_adapters.errors import AdapterNotFound, AdapterRejected, InvalidAdapterName, StoreUnavailable
from loramux_adapters.lora.host_cache import HostAdapter, HostCache
from loramux_adapters.lora.verify import Checked, check_adapter
from loramux_adapters.store.store import AdapterStore, Published, Staging
from loramux_server.fingerprint.replay import ReplayOutcome
from loramux_server.publishing.publisher import Publication, Publisher
from support.adapter_files import TINY_LINEARS, write_adapter

BASE = BaseInfo("aa" * 32, TINY_LINEARS)


class Scene:
    """`tried` is told of each adapter while it is tried out, and may raise."""

    def __init__(self, root: Path, budget_bytes: int = 1 << 20) -> None:
        self.root = root
        self.loads: list[str] = []
        self.tried: Callable[[HostAdapter], None] = lambda adapter: None
        self.store = AdapterStore(root / "store", served_base_id=BASE.base_id)
        self.host = HostCache(self.load, budget_bytes, on_ready=lambda: None)
        self.store.tell_retired(self.host.discard)
        self.publisher = Publisher(self.store, self.host, self.check, self.prove)

    def load(self, version: str) -> HostAdapter:
        self.loads.append(version)
        return self.store.load(version)

    def check(self, directory: Path) -> Checked:
        return check_adapter(directory, BASE, 64)

    def prove(self, directory: Path, checked: Checked) -> ReplayOutcome:
        with self.host.holding(checked.adapter):
            assert self.host.get(checked.version) is not None
            self.tried(checked.adapter)
        return "exact"

    def publish(self, name: str, seed: int = 0) -> Publication:
        return self.publisher.publish_files(
            name, lambda target: write_adapter(target, TINY_LINEARS, targets=["q_proj"], rank=4, seed=seed)
        )

    def wait_for_loads(self) -> None:
        deadline = time.monotonic() + 10
        while self.host.stats().loading:
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def assert_nothing_is_left(self) -> None:
        self.host.check_integrity()
        stats = self.host.stats()
        assert (stats.entries, stats.nbytes, stats.pinned, stats.loading) == (0, 0, 0, 0)
        assert self.loads == [] and list((self.root / "store" / "staging").iterdir()) == []


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(tmp_path)
    yield scene
    scene.host.close()
    scene.store.close()


def test_the_adapter_that_was_checked_is_the_one_that_is_tried_out_and_kept(scene: Scene) -> None:
    tried: list[HostAdapter] = []
    scene.tried = tried.append
    done = scene.publish("pirate")
    assert tried == [done.checked.adapter] and scene.host.get(done.stored.version) is tried[0]
    assert (done.stored.outcome, done.proof) == ("created", "exact")
    (kept,) = scene.store.record("pirate").versions
    assert (kept.version, kept.fingerprint, kept.rank) == (done.checked.version, "exact", 4)
    assert scene.loads == []


def test_what_does_not_fit_is_published_and_loaded_when_it_is_asked_for(tmp_path: Path) -> None:
    scene = Scene(tmp_path, budget_bytes=1)
    version = scene.publish("pirate").stored.version
    scene.assert_nothing_is_left()
    scene.host.pin(version)
    scene.host.request(version)
    scene.wait_for_loads()
    assert scene.host.holds(version) and scene.loads == [version]
    scene.host.close()
    scene.store.close()


@pytest.mark.parametrize("failure", [AdapterRejected(["no effect"]), RuntimeError("the client left")])
def test_an_upload_that_is_refused_or_withdrawn_while_it_is_tried_out_leaves_nothing(
    scene: Scene, failure: Exception
) -> None:
    def tried(adapter: HostAdapter) -> None:
        raise failure

    scene.tried = tried
    with pytest.raises(type(failure)):
        scene.publish("pirate")
    scene.assert_nothing_is_left()
    assert scene.store.records() == []


def test_an_upload_that_cannot_be_stored_leaves_nothing(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> Published:
        raise StoreUnavailable("the disk is full")

    monkeypatch.setattr(scene.store, "publish", fail)
    with pytest.raises(StoreUnavailable):
        scene.publish("pirate")
    scene.assert_nothing_is_left()


def test_a_name_that_none_can_have_is_refused_before_anything_is_read(scene: Scene) -> None:
    def fill(target: Path) -> None:
        raise AssertionError("nobody may get here")

    with pytest.raises(InvalidAdapterName):
        scene.publisher.publish_files("a b", fill)


def test_a_name_that_is_deleted_right_after_its_publication_leaves_nothing(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = scene.store.publish

    def publish_and_delete(name: str, staging: Staging, **facts: object) -> Published:
        published = publish(name, staging, **facts)  # type: ignore[arg-type]
        scene.store.delete(name)
        return published

    monkeypatch.setattr(scene.store, "publish", publish_and_delete)
    scene.publish("pirate")
    scene.assert_nothing_is_left()


@pytest.mark.parametrize("is_refused", [True, False])
def test_a_name_that_is_deleted_while_its_version_is_tried_out_again(scene: Scene, is_refused: bool) -> None:
    def tried(adapter: HostAdapter) -> None:
        scene.store.delete("pirate")
        if is_refused:
            raise AdapterRejected(["no effect"])

    version = scene.publish("pirate").stored.version
    scene.tried = tried
    if is_refused:
        with pytest.raises(AdapterRejected):
            scene.publish("pirate")
        scene.assert_nothing_is_left()
    else:
        assert scene.publish("pirate").stored.outcome == "created" and scene.host.holds(version)
    scene.host.check_integrity()


def test_one_version_under_two_names_leaves_with_the_last_of_them(scene: Scene) -> None:
    version = scene.publish("pirate").stored.version
    assert scene.publish("corsair").stored.version == version
    scene.store.delete("pirate")
    assert scene.host.holds(version)
    scene.store.delete("corsair")
    scene.assert_nothing_is_left()


def test_whatever_uploads_and_deletions_do_at_once_only_published_versions_stay(scene: Scene) -> None:
    """Few versions and many threads, so that they meet: some uploads are refused, and requests load what they miss."""
    versions = [scene.publish(f"warm{seed}", seed).stored.version for seed in range(2)]
    errors: list[BaseException] = []

    def tried(adapter: HostAdapter) -> None:
        scene.host.pin(adapter.version)  # as the engine does
        scene.host.request(adapter.version)
        scene.host.unpin(adapter.version)
        if random.random() < 0.3:
            raise AdapterRejected(["no effect"])

    def work(seed: int) -> None:
        choice = random.Random(seed)
        for _ in range(25):
            name = f"a{choice.randrange(3)}"
            try:
                match choice.randrange(4):
                    case 0 | 1:
                        scene.publish(name, choice.randrange(2))
                    case 2:
                        scene.store.delete(name)
                    case 3:
                        with scene.store.acquire(name) as lease:
                            scene.host.pin(lease.version)
                            scene.host.request(lease.version)
                            scene.host.unpin(lease.version)
            except (AdapterNotFound, AdapterRejected):
                pass
            except BaseException as error:
                errors.append(error)
                raise

    for seed in range(2):
        scene.store.delete(f"warm{seed}")
    scene.tried = tried
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    scene.wait_for_loads()
    assert not errors
    scene.host.check_integrity()
    current = {record.version for record in scene.store.records()}
    assert {version for version in versions if scene.host.holds(version)} <= current
    for record in scene.store.records():
        scene.store.delete(record.name)
    stats = scene.host.stats()
    assert (stats.entries, stats.nbytes, stats.pinned) == (0, 0, 0)
