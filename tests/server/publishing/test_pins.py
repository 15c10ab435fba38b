"""Which versions the memories are told to keep."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import pytest

from loramux_adapters.artifact.format import WEIGHTS_FILE
from loramux_adapters.errors import AdapterNotFound
from loramux_adapters.store.store import AdapterStore
from loramux_server.publishing.pins import Pins
from support.adapter_files import TINY_LINEARS, write_adapter


class Memories:
    def __init__(self) -> None:
        self.host: list[Collection[str]] = []
        self.device: list[frozenset[str]] = []


def upload(store: AdapterStore, name: str, seed: int, rank: int = 8) -> str:
    with store.stage() as staging:
        write_adapter(staging.directory, TINY_LINEARS, targets=["q_proj"], rank=rank, seed=seed)
        return store.publish(name, staging, rank=rank, base_id=None, target_modules=["q_proj"]).version


@pytest.fixture
def memories() -> Memories:
    return Memories()


@pytest.fixture
def make(tmp_path: Path, memories: Memories) -> Iterator[Callable[..., tuple[AdapterStore, Pins]]]:
    opened: list[AdapterStore] = []

    def make(host_bytes: int = 2**30, device_rows: int = 64) -> tuple[AdapterStore, Pins]:
        store = AdapterStore(tmp_path / "store")
        opened.append(store)
        return store, Pins(
            store,
            host=memories.host.append,
            device=memories.device.append,
            host_bytes=host_bytes,
            device_rows=device_rows,
        )

    yield make
    for store in opened:
        store.close()


Make = Callable[..., tuple[AdapterStore, Pins]]


def test_a_pin_follows_its_name_from_version_to_version(make: Make, memories: Memories) -> None:
    store, pins = make()
    old = upload(store, "a", 0)
    pins.pin("a")
    new = upload(store, "a", 1)
    pins.apply()
    pins.apply()  # told once
    pins.unpin("a")
    assert memories.host == memories.device == [{old}, {new}, set()]
    with pytest.raises(AdapterNotFound):
        pins.pin("b")


def test_pins_that_were_there_before_the_start_count_from_the_first_look_on(make: Make, memories: Memories) -> None:
    store, pins = make()
    version = upload(store, "a", 0)
    store.pin("a")
    pins.apply()
    assert memories.host == [{version}]


def test_each_memory_keeps_what_its_share_allows_in_order_of_names(
    make: Make, memories: Memories, caplog: pytest.LogCaptureFixture
) -> None:
    store, pins = make(host_bytes=2 * 10**5, device_rows=16)
    a, b, c = upload(store, "a", 0, rank=9), upload(store, "b", 1, rank=64), upload(store, "c", 2, rank=4)
    for name in "abc":
        pins.pin(name)
    assert memories.device[-1] == {a}  # 16 rows; neither 64 nor 8 more fit
    assert set(memories.host[-1]) == {a, b, c} - ({b} if store.record("b").nbytes > 10**5 else set())
    too_large = upload(store, "a", 3, rank=256)
    pins.apply()
    assert too_large not in memories.host[-1] and c in memories.device[-1]
    assert "beyond their share" in caplog.text


def test_a_damaged_version_is_not_kept(make: Make, memories: Memories) -> None:
    store, pins = make()
    version = upload(store, "a", 0)
    pins.pin("a")
    (store.directory(version) / WEIGHTS_FILE).unlink()
    with pytest.raises(Exception, match="cannot be read"):
        store.load(version)
    pins.apply()
    assert memories.host[-1] == set()
