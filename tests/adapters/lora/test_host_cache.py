from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from loramux_adapters.errors import AdapterCorrupt
from loramux_adapters.lora.host_cache import HostAdapter, HostCache, LoadState


class Disk:
    """A loader whose loads end when the test says so."""

    def __init__(self) -> None:
        self.gate = threading.Semaphore(0)
        self.ended = threading.Semaphore(0)
        self.loads: list[str] = []
        self.failures: dict[str, Exception] = {}
        self.seconds: list[float] = []
        self.evictions = 0

    def load(self, version: str) -> HostAdapter:
        self.gate.acquire()
        self.loads.append(version)
        if version in self.failures:
            raise self.failures.pop(version)
        return HostAdapter(version=version, rank=8, nbytes=100, modules={})

    def loaded(self, seconds: float) -> None:
        self.seconds.append(seconds)

    def evicted(self) -> None:
        self.evictions += 1

    def let_one_load_end(self) -> None:
        self.gate.release()
        assert self.ended.acquire(timeout=5)


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def cache(disk: Disk) -> Iterator[HostCache]:
    cache = HostCache(disk.load, budget_bytes=250, on_ready=disk.ended.release, observer=disk)
    yield cache
    cache.check_integrity()
    disk.gate.release(100)
    cache.close()


def fill(cache: HostCache, disk: Disk, *versions: str) -> None:
    for version in versions:
        assert cache.request(version) is LoadState.LOADING
        disk.let_one_load_end()


def test_a_version_is_loaded_once_however_often_it_is_asked_for(cache: HostCache, disk: Disk) -> None:
    assert cache.request("a") is LoadState.LOADING
    assert cache.request("a") is LoadState.LOADING
    assert cache.get("a") is None and not cache.holds("a")
    disk.let_one_load_end()
    assert cache.request("a") is LoadState.READY
    adapter = cache.get("a")
    assert adapter is not None and adapter.version == "a" and cache.holds("a")
    assert disk.loads == ["a"] and len(disk.seconds) == 1


def test_the_least_recently_used_leaves_when_the_budget_is_full(cache: HostCache, disk: Disk) -> None:
    fill(cache, disk, "a", "b")
    cache.get("a")
    fill(cache, disk, "c")
    assert [version for version in "abc" if cache.holds(version)] == ["a", "c"]
    assert cache.stats().evictions == disk.evictions == 1


def test_asking_where_a_version_is_does_not_count_as_a_use(cache: HostCache, disk: Disk) -> None:
    fill(cache, disk, "a", "b")
    assert cache.holds("a")
    fill(cache, disk, "c")
    assert not cache.holds("a")


def test_a_request_counts_as_a_use(cache: HostCache, disk: Disk) -> None:
    fill(cache, disk, "a", "b")
    assert cache.request("a") is LoadState.READY
    fill(cache, disk, "c")
    assert cache.holds("a") and not cache.holds("b")


def test_a_pinned_version_stays_and_leaves_after_its_last_pin(cache: HostCache, disk: Disk) -> None:
    cache.pin("a")
    cache.pin("a")
    fill(cache, disk, "a", "b", "c")
    assert cache.holds("a") and not cache.holds("b") and cache.holds("c")
    cache.unpin("a")
    fill(cache, disk, "d")
    assert cache.holds("a") and not cache.holds("c")
    cache.unpin("a")
    fill(cache, disk, "e")
    assert not cache.holds("a") and cache.holds("d") and cache.holds("e")


def test_only_pins_take_the_cache_over_its_budget_and_only_until_they_end(cache: HostCache, disk: Disk) -> None:
    for version in "abcd":
        cache.pin(version)
    fill(cache, disk, *"abcd")
    assert cache.stats().nbytes == 400 and cache.stats().pinned == 4
    cache.check_integrity()
    cache.unpin("c")
    assert not cache.holds("c") and cache.stats().nbytes == 300
    fill(cache, disk, "e")
    assert not cache.holds("e")
    cache.unpin("a")
    assert cache.stats().nbytes == 200


def test_a_failure_is_reported_once_with_its_reason_and_then_tried_again(cache: HostCache, disk: Disk) -> None:
    disk.failures["a"] = AdapterCorrupt("the stored files of version a cannot be read")
    cache.pin("a")
    fill(cache, disk, "a")
    assert cache.request("a") is LoadState.FAILED
    assert cache.failure("a") == "the stored files of version a cannot be read"
    assert cache.request("a") is LoadState.LOADING
    assert cache.failure("a") is None
    disk.let_one_load_end()
    assert cache.request("a") is LoadState.READY
    assert cache.stats().failures == 1 and len(disk.seconds) == 1


def test_an_unexpected_error_names_no_detail_and_does_not_end_the_loader(
    cache: HostCache, disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    disk.failures["a"] = OSError(5, "Input/output error", "/secret/path")
    cache.pin("a")
    fill(cache, disk, "a")
    assert cache.request("a") is LoadState.FAILED
    assert cache.failure("a") == "the adapter could not be loaded"
    assert "Input/output error" in caplog.text
    fill(cache, disk, "b")
    assert cache.holds("b")


@pytest.mark.parametrize("leaves", ["before its load ends", "after it"])
def test_a_failure_is_not_charged_to_who_asks_after_its_requester_has_left(
    cache: HostCache, disk: Disk, leaves: str
) -> None:
    """An adapter is deleted while it loads and its only requester leaves; then the same bytes are uploaded again."""
    disk.failures["a"] = AdapterCorrupt("the stored files of version a cannot be read")
    cache.pin("a")
    assert cache.request("a") is LoadState.LOADING
    if leaves == "before its load ends":
        cache.unpin("a")
    disk.let_one_load_end()
    if leaves == "after it":
        cache.unpin("a")
    assert cache.failure("a") is None
    cache.pin("a")
    assert cache.request("a") is LoadState.LOADING
    disk.let_one_load_end()
    assert cache.request("a") is LoadState.READY


def test_closing_ends_the_loader_and_keeps_what_is_held(disk: Disk) -> None:
    cache = HostCache(disk.load, budget_bytes=250, on_ready=disk.ended.release)
    fill(cache, disk, "a")
    cache.close()
    cache.close()
    assert cache.request("a") is LoadState.READY
    with pytest.raises(RuntimeError, match="closed"):
        cache.request("b")
    assert not any(thread.name == "adapter-loader" for thread in threading.enumerate())


def test_what_is_kept_is_loaded_and_stays_over_the_budget_until_it_is_kept_no_more(
    cache: HostCache, disk: Disk
) -> None:
    cache.keep({"a", "b"})
    for _ in "ab":
        disk.let_one_load_end()
    fill(cache, disk, "c", "d")  # room for two
    assert [version for version in "abcd" if cache.holds(version)] == ["a", "b"]
    cache.keep({"b", "a"})
    assert len(disk.loads) == 4, "nothing is loaded twice"
    cache.keep({"b"})
    fill(cache, disk, "c", "d")
    assert [version for version in "abcd" if cache.holds(version)] == ["b", "d"]


def test_a_kept_version_whose_load_failed_is_tried_again_when_it_is_asked_for(cache: HostCache, disk: Disk) -> None:
    disk.failures["a"] = AdapterCorrupt("no")
    cache.keep({"a"})
    disk.let_one_load_end()
    cache.pin("a")
    assert cache.request("a") is LoadState.LOADING
    disk.let_one_load_end()
    assert cache.request("a") is LoadState.READY


@pytest.mark.parametrize("until", ["now", "its load ends", "its last pin ends", "it is kept no more"])
def test_a_discarded_version_leaves_as_soon_as_nothing_holds_it(cache: HostCache, disk: Disk, until: str) -> None:
    if until == "its load ends":
        cache.request("a")
        cache.discard("a")
        disk.let_one_load_end()
    else:
        fill(cache, disk, "a")
        if until == "its last pin ends":
            cache.pin("a")
        elif until == "it is kept no more":
            cache.keep({"a"})
        cache.discard("a")
        if until != "now":
            assert cache.holds("a")
        if until == "its last pin ends":
            cache.unpin("a")
        elif until == "it is kept no more":
            cache.keep(())
    assert not cache.holds("a") and cache.stats().nbytes == 0 and cache.stats().evictions == 0


def test_a_discarded_version_that_is_asked_for_again_is_loaded_again_once_nobody_holds_it(
    cache: HostCache, disk: Disk
) -> None:
    fill(cache, disk, "a")
    cache.pin("a")
    cache.discard("a")
    assert cache.request("a") is LoadState.READY
    cache.unpin("a")
    assert not cache.holds("a")
    fill(cache, disk, "a")
    assert cache.holds("a")


def adapter(version: str) -> HostAdapter:
    return HostAdapter(version=version, rank=8, nbytes=100, modules={})


def test_what_an_upload_brings_is_found_without_a_load_and_leaves_with_it(cache: HostCache, disk: Disk) -> None:
    brought = adapter("a")
    with cache.holding(brought):
        assert cache.request("a") is LoadState.READY and cache.get("a") is brought
        cache.check_integrity()
    assert not cache.holds("a") and cache.stats().nbytes == 0 and cache.stats().pinned == 0 and not disk.loads


def test_an_upload_stays_over_the_budget_while_it_is_tried_out(cache: HostCache, disk: Disk) -> None:
    cache.keep({"p", "q"})
    for _ in "pq":
        disk.let_one_load_end()
    with cache.holding(adapter("a")):
        fill(cache, disk, "b")
        assert cache.holds("a") and not cache.holds("b") and cache.stats().nbytes == 300
        cache.check_integrity()
    assert cache.stats().nbytes == 200


def test_what_is_published_stays_until_its_room_is_needed_and_is_then_loaded_as_any_version_is(
    cache: HostCache, disk: Disk
) -> None:
    brought = adapter("a")
    with cache.holding(brought):
        pass
    cache.put(brought)
    assert cache.get("a") is brought
    fill(cache, disk, "b", "c")
    assert not cache.holds("a")
    fill(cache, disk, "a")
    assert cache.holds("a") and disk.loads == ["b", "c", "a"]


def test_what_is_published_beside_kept_versions_that_fill_the_budget_is_not_held(cache: HostCache, disk: Disk) -> None:
    cache.keep({"p", "q"})
    for _ in "pq":
        disk.let_one_load_end()
    cache.put(adapter("a"))
    assert not cache.holds("a") and cache.stats().nbytes == 200


@pytest.mark.parametrize("first_to_end", [0, 1])
@pytest.mark.parametrize("published", [0, 1, None])
def test_of_two_uploads_of_one_version_the_one_that_is_published_decides(
    cache: HostCache, first_to_end: int, published: int | None
) -> None:
    brought = [adapter("a"), adapter("a")]
    uploads = [cache.holding(one) for one in brought]
    for upload in uploads:
        upload.__enter__()
    for index in (first_to_end, 1 - first_to_end):
        uploads[index].__exit__(None, None, None)
        if index == published:
            cache.put(brought[index])
        cache.check_integrity()
    assert cache.holds("a") == (published is not None)
    assert cache.stats().nbytes == (100 if published is not None else 0)


def test_an_upload_of_a_version_that_is_held_already_leaves_it_there(cache: HostCache, disk: Disk) -> None:
    fill(cache, disk, "a")
    held = cache.get("a")
    with cache.holding(adapter("a")):
        assert cache.get("a") is held
    assert cache.get("a") is held and cache.stats().nbytes == 100


@pytest.mark.parametrize("ends", ["load", "upload"])
@pytest.mark.parametrize("fails", [False, True])
def test_an_upload_of_a_version_that_is_just_loaded_counts_once_and_stays_only_if_it_is_stored(
    cache: HostCache, disk: Disk, ends: str, fails: bool
) -> None:
    if fails:
        disk.failures["a"] = AdapterCorrupt("damaged")
    assert cache.request("a") is LoadState.LOADING
    upload = cache.holding(adapter("a"))
    upload.__enter__()
    assert cache.request("a") is LoadState.READY
    if ends == "load":
        disk.let_one_load_end()
        cache.check_integrity()
        upload.__exit__(None, None, None)
    else:
        upload.__exit__(None, None, None)
        assert cache.holds("a")
        disk.let_one_load_end()
    assert cache.holds("a") != fails and cache.stats().nbytes == (0 if fails else 100)


def test_a_deletion_while_a_published_version_is_tried_out_again_takes_it_out_at_the_end(cache: HostCache) -> None:
    cache.put(adapter("a"))
    with cache.holding(adapter("a")):
        cache.discard("a")
        assert cache.request("a") is LoadState.READY
    assert not cache.holds("a") and cache.stats().nbytes == 0


def test_a_sequence_that_outlives_its_upload_keeps_the_version_no_longer_than_it_runs(cache: HostCache) -> None:
    """Its client left: the engine hears of it only after its current step."""
    with cache.holding(adapter("a")):
        cache.pin("a")
    assert cache.request("a") is LoadState.READY
    cache.unpin("a")
    assert not cache.holds("a")


def test_pins_on_what_is_held_are_hits_and_others_are_misses(cache: HostCache, disk: Disk) -> None:
    cache.pin("a")
    fill(cache, disk, "a")
    cache.pin("a")
    cache.pin("a")
    assert (cache.stats().hits, cache.stats().misses) == (2, 1)


def test_a_kept_version_is_loaded_again_and_its_last_failure_forgotten(cache: HostCache, disk: Disk) -> None:
    disk.failures["a"] = AdapterCorrupt("a", "0" * 64)
    cache.pin("a")
    fill(cache, disk, "a")

    cache.keep({"a"})
    cache.check_integrity()
    assert cache.request("a") is LoadState.LOADING
    disk.let_one_load_end()

    assert cache.request("a") is LoadState.READY
    cache.unpin("a")
