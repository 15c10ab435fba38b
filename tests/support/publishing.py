"""The way into a store without an engine: checked and published, not tried out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from loramux_adapters.lora.host_cache import HostAdapter
from loramux_adapters.lora.verify import Checked
from loramux_adapters.store.store import AdapterStore
from loramux_server.publishing.publisher import Publisher


class FakeHostMemory:
    """Remembers what was put into it; `held` is what it still holds, by version."""

    def __init__(self) -> None:
        self.held: dict[str, HostAdapter] = {}

    def put(self, adapter: HostAdapter) -> None:
        self.held[adapter.version] = adapter

    def discard(self, version: str) -> None:
        self.held.pop(version, None)


def unproved(store: AdapterStore, check: Callable[[Path], Checked]) -> Publisher:
    return Publisher(store, FakeHostMemory(), check, lambda directory, checked: "none")
