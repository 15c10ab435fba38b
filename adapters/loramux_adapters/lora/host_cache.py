"""Adapter versions in host memory, ready to be copied to the device: a byte-bounded LRU that one thread fills."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from queue import SimpleQueue
from typing import TYPE_CHECKING, Protocol

from loramux_adapters.errors import AdapterError

if TYPE_CHECKING:
    import torch

    from loramux_adapters.lora.token_rows import TokenRows

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HostAdapter:
    """One version in host memory.

    Attributes:
        version: its content digest, hex.
        rank: the largest of its modules.
        nbytes: of all tensors.
        modules: module path in the base -> (A [r, in] bf16, Bt [r, out] bf16); Bt is B transposed with the scale in it.
        affine: module path -> [2, out] fp32, gain and shift of the layer's own output (lora/affine.py). Most adapters
            have none.
        tokens: what it has of its own for tokens, in embedding and output head; most adapters have nothing.
    """

    version: str
    rank: int
    nbytes: int
    modules: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    affine: Mapping[str, torch.Tensor] = field(default_factory=dict)
    tokens: TokenRows | None = None


class LoadState(Enum):
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class HostCacheStats:
    """A snapshot. `entries` and `nbytes` are what is held now, `pinned` how many versions have a pin.

    `hits` and `misses`: pins taken on versions that were held, and on versions that were not.
    """

    entries: int
    nbytes: int
    loading: int
    pinned: int
    loads: int
    failures: int
    evictions: int
    hits: int
    misses: int


class HostCacheObserver(Protocol):
    """Told of events, under no lock: `loaded` by the loader thread, `evicted` by whichever thread freed the room."""

    def loaded(self, seconds: float) -> None: ...
    def evicted(self) -> None: ...


class HostCache:
    """Versions in host memory.

    Any thread may call any method; loads run on the one loader thread, which this object owns. What is pinned, kept or
    held stays, over the budget if need be; everything else leaves, least recently used first, until the rest fits.

    An upload brings its version along, so that nothing is read twice: it is here while it is tried out (`holding`), and
    stays from its publication on (`put`) until its room is needed. Then it is loaded like any other.
    """

    def __init__(
        self,
        load: Callable[[str], HostAdapter],
        budget_bytes: int,
        on_ready: Callable[[], None],
        observer: HostCacheObserver | None = None,
    ) -> None:
        """`load` reads one version and may raise; `on_ready` is called after every load, failed or not."""
        self._load = load
        self._budget_bytes = budget_bytes
        self._on_ready = on_ready
        self._observer = observer
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, HostAdapter] = OrderedDict()  # least recently used first
        self._nbytes = 0
        self._pins: Counter[str] = Counter()
        self._kept: frozenset[str] = frozenset()  # stay without a pin
        self._unwanted: set[str] = set()  # not published, or not any more: leave when their load or last pin ends
        self._loading: set[str] = set()
        self._failures: dict[str, str] = {}  # of pinned versions only
        self._unreported: set[str] = set()  # those that `request` has not told anyone of
        self._loads = self._failed = self._evictions = self._hits = self._misses = 0
        self._closed = False
        self._queue: SimpleQueue[str | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="adapter-loader", daemon=True)
        self._thread.start()

    def request(self, version: str) -> LoadState:
        """Say where a version stands, and start its load if nothing is known of it.

        A failed load is reported once, to those who pinned the version before it ended; the request after that, or
        after their last pin, tries again.
        """
        with self._lock:
            if version in self._entries:
                self._entries.move_to_end(version)
                return LoadState.READY
            if version in self._loading:
                return LoadState.LOADING
            if version in self._unreported:
                self._unreported.remove(version)
                return LoadState.FAILED
            self._start_load(version)
            return LoadState.LOADING

    def failure(self, version: str) -> str | None:
        """Why the last load of a pinned version failed, in one sentence for a client; None if it did not."""
        with self._lock:
            return self._failures.get(version)

    def get(self, version: str) -> HostAdapter | None:
        """The version if it is held, which also makes it the most recently used."""
        with self._lock:
            adapter = self._entries.get(version)
            if adapter is not None:
                self._entries.move_to_end(version)
            return adapter

    def holds(self, version: str) -> bool:
        """Whether the version is in host memory; does not count as a use."""
        with self._lock:
            return version in self._entries

    def bytes_beside(self, version: str) -> int:
        """Bytes of a version's rows of tokens, which its slot does not hold; 0 if it is not here."""
        with self._lock:
            adapter = self._entries.get(version)
        return 0 if adapter is None or adapter.tokens is None else adapter.tokens.nbytes

    def pin(self, version: str) -> None:
        """Keep the version from being evicted, now or once it is loaded. Pins are counted."""
        with self._lock:
            self._pins[version] += 1
            if version in self._entries:
                self._hits += 1
            else:
                self._misses += 1

    def unpin(self, version: str) -> None:
        """Take one pin back; the version stays until its room is needed."""
        with self._lock:
            assert self._pins[version] > 0, "unpin without pin"
            self._pins[version] -= 1
            if self._pins[version] == 0:
                del self._pins[version]
                self._failures.pop(version, None)
                self._unreported.discard(version)
                self._drop_unwanted(version)
            evicted = self._make_room()
        self._report_evicted(evicted)

    def keep(self, versions: Collection[str]) -> None:
        """Hold these, and none of those named before, as if each had a pin; what is not there is loaded.

        A load that fails is tried again when somebody asks for the version.
        """
        with self._lock:
            if self._closed:
                return
            added = [version for version in versions if version not in self._kept]
            self._kept = frozenset(versions)
            self._unwanted -= self._kept
            for version in added:
                if version not in self._entries and version not in self._loading:
                    self._start_load(version)
            for version in list(self._unwanted):
                self._drop_unwanted(version)
            evicted = self._make_room()
        self._report_evicted(evicted)

    @contextmanager
    def holding(self, adapter: HostAdapter) -> Iterator[None]:
        """While this lasts the version is here; then it leaves with its last pin.

        It stays if it was here before, or if somebody `put` it meanwhile. Any number of threads may hold one version.
        """
        with self._lock:
            if adapter.version not in self._entries and adapter.version not in self._loading:
                self._unwanted.add(adapter.version)
            self._pins[adapter.version] += 1
            self._enter(adapter)
            evicted = self._make_room()
        self._report_evicted(evicted)
        try:
            yield
        finally:
            self.unpin(adapter.version)

    def put(self, adapter: HostAdapter) -> None:
        """Hold a version that is about to be published as if it had been loaded; `discard` it if it is not."""
        with self._lock:
            self._unwanted.discard(adapter.version)
            self._enter(adapter)
            evicted = self._make_room()
        self._report_evicted(evicted)

    def discard(self, version: str) -> None:
        """No name points at this version any more: it leaves now, or when its load or its last pin ends."""
        with self._lock:
            self._unwanted.add(version)
            self._drop_unwanted(version)

    def stats(self) -> HostCacheStats:
        with self._lock:
            return HostCacheStats(
                entries=len(self._entries),
                nbytes=self._nbytes,
                loading=len(self._loading),
                pinned=len(self._pins),
                loads=self._loads,
                failures=self._failed,
                evictions=self._evictions,
                hits=self._hits,
                misses=self._misses,
            )

    def close(self) -> None:
        """Stop the loader after the load it is in; what is held stays readable. May be called twice."""
        with self._lock:
            self._closed = True
        self._queue.put(None)
        self._thread.join()

    def check_integrity(self) -> None:
        """Assert what must hold between calls; for tests."""
        with self._lock:
            assert self._nbytes == sum(adapter.nbytes for adapter in self._entries.values())
            assert all(count > 0 for count in self._pins.values())
            assert self._unreported <= self._failures.keys() <= self._pins.keys()
            assert self._nbytes <= self._budget_bytes or all(
                version in self._pins or version in self._kept for version in self._entries
            )
            assert not any(self._is_free(version) for version in self._unwanted)

    def _run(self) -> None:
        while (version := self._queue.get()) is not None and not self._closed:
            started = time.monotonic()
            adapter, failure = self._try_load(version)
            with self._lock:
                self._loading.remove(version)
                if adapter is None:
                    self._remember_failure(version, failure)
                    evicted = 0
                else:
                    self._enter(adapter)
                    self._loads += 1
                    evicted = self._make_room()
                self._drop_unwanted(version)
            if self._observer is not None and adapter is not None:
                self._observer.loaded(time.monotonic() - started)
            self._report_evicted(evicted)
            self._on_ready()

    def _try_load(self, version: str) -> tuple[HostAdapter | None, str]:
        try:
            return self._load(version), ""
        except AdapterError as error:
            logger.warning("adapter version %.12s was not loaded: %s", version, error)
            return None, str(error)
        except Exception:  # the loader serves every adapter: one that fails in a new way must not end it
            logger.exception("adapter version %.12s was not loaded", version)
            return None, "the adapter could not be loaded"

    def _enter(self, adapter: HostAdapter) -> None:
        """With the lock held. What is here already stays, and is the most recently used now."""
        self._failures.pop(adapter.version, None)
        self._unreported.discard(adapter.version)
        if adapter.version not in self._entries:
            self._entries[adapter.version] = adapter
            self._nbytes += adapter.nbytes
        self._entries.move_to_end(adapter.version)

    def _remember_failure(self, version: str, failure: str) -> None:
        """For those who wait for it, if they still do: whoever asks later has a load of their own."""
        self._failed += 1
        if version in self._entries:  # an upload holds it, and what is stored under its name is damaged
            self._unwanted.add(version)
        elif version in self._pins:
            self._unreported.add(version)
            self._failures[version] = failure

    def _start_load(self, version: str) -> None:
        """With the lock held."""
        if self._closed:
            raise RuntimeError("the host cache is closed")
        self._failures.pop(version, None)
        self._unreported.discard(version)
        self._loading.add(version)
        self._queue.put(version)

    def _is_free(self, version: str) -> bool:
        return version not in self._pins and version not in self._loading and version not in self._kept

    def _drop_unwanted(self, version: str) -> None:
        """With the lock held."""
        if version in self._unwanted and self._is_free(version):
            self._unwanted.remove(version)
            adapter = self._entries.pop(version, None)
            self._nbytes -= 0 if adapter is None else adapter.nbytes

    def _make_room(self) -> int:
        """Evict unpinned versions until the budget holds; returns how many left. Called with the lock held."""
        victims = []
        nbytes = self._nbytes
        for version, adapter in self._entries.items():
            if nbytes <= self._budget_bytes:
                break
            if version not in self._pins and version not in self._kept:
                victims.append(version)
                nbytes -= adapter.nbytes
        for version in victims:
            del self._entries[version]
        self._nbytes = nbytes
        self._evictions += len(victims)
        return len(victims)

    def _report_evicted(self, count: int) -> None:
        if self._observer is not None:
            for _ in range(count):
                self._observer.evicted()
