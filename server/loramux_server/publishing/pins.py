"""Pinned adapters: which versions that means now, and telling the memories to keep them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from loramux_adapters.lora.slots import bucket_of
from loramux_adapters.store.store import AdapterRecord

logger = logging.getLogger(__name__)


class PinStore(Protocol):
    """The store, as far as pins go."""

    def pin(self, name: str) -> None: ...

    def unpin(self, name: str) -> None: ...

    def records(self, *, pinned: bool = False) -> Sequence[AdapterRecord]: ...


class Pins:
    """A pin belongs to a name and is kept in the store; what stays in memory is the version the name points at.

    Each memory keeps as many of them, in order of names, as its share allows. The store refuses a pin beyond the share
    of host memory, but a pinned name may get a larger version later. Any thread may call any method.
    """

    def __init__(
        self,
        store: PinStore,
        *,
        host: Callable[[Collection[str]], None],
        device: Callable[[frozenset[str]], None],
        host_bytes: int,
        device_rows: int,
    ) -> None:
        """`host` and `device` are told which versions to keep; at most so many bytes there, and rank rows here."""
        self._store = store
        self._host, self._device = host, device
        self._host_bytes, self._device_rows = host_bytes, device_rows
        self._lock = threading.Lock()
        self._told: tuple[frozenset[str], frozenset[str]] | None = None
        self._left_out: frozenset[str] = frozenset()

    def pin(self, name: str) -> None:
        """Raises AdapterNotFound, PinRefused, StoreUnavailable."""
        self._store.pin(name)
        self.apply()

    def unpin(self, name: str) -> None:
        """Raises AdapterNotFound, StoreUnavailable."""
        self._store.unpin(name)
        self.apply()

    def apply(self) -> None:
        """Tell the memories what to keep, if that has changed. Raises StoreUnavailable."""
        with self._lock:
            records = [record for record in self._store.records(pinned=True) if not record.corrupt]
            host = _within(self._host_bytes, {record.version: record.nbytes for record in records})
            device = _within(self._device_rows, {record.version: bucket_of(record.rank) for record in records})
            left_out = frozenset(record.name for record in records if record.version not in host)
            if left_out - self._left_out:
                names = ", ".join(sorted(left_out))
                logger.warning("pinned, but beyond their share of --host-cache-mib and so not kept: %s", names)
            self._left_out = left_out
            if self._told != (host, device):
                self._told = host, device
                self._host(host)
                self._device(device)


def _within(limit: int, sizes: dict[str, int]) -> frozenset[str]:
    """Those that fit into `limit` together, taken in order; one that does not fit is passed over."""
    taken = set()
    for version, size in sizes.items():
        if size <= limit:
            taken.add(version)
            limit -= size
    return frozenset(taken)
