"""Versions that are not published yet, but have to be in memory already: those that are being tried out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from loramux_adapters.errors import AdapterCorrupt, AdapterRejected

if TYPE_CHECKING:
    from loramux_adapters.lora.host_cache import HostAdapter
    from loramux_adapters.lora.weights import ConvertPairs


class StagedVersions:
    """Where the host cache reads a version from: its staging directory while there is one, else the store.

    A version is the digest of what it computes, so it does not matter which of them it comes from. Any thread may call
    any method.
    """

    def __init__(self, load: Callable[[str], HostAdapter], convert: ConvertPairs | None = None) -> None:
        """`load` reads a published version, `convert` the numbers of one that is not."""
        self._load = load
        self._convert = convert
        self._lock = threading.Lock()
        self._directories: dict[str, list[Path]] = {}  # one for each upload of the version

    @contextmanager
    def holding(self, version: str, directory: Path) -> Iterator[None]:
        """While this lasts the version can be loaded from `directory`, whose files have been checked."""
        with self._lock:
            self._directories.setdefault(version, []).append(directory)
        try:
            yield
        finally:
            with self._lock:
                self._directories[version].remove(directory)
                if not self._directories[version]:
                    del self._directories[version]

    def load(self, version: str) -> HostAdapter:
        """In a loader thread. Raises AdapterCorrupt if the version cannot be read, or is neither here nor there."""
        from loramux_adapters.lora.weights import load_host_adapter  # torch: whoever only stages is spared it

        with self._lock:
            directories = self._directories.get(version)
            directory = directories[0] if directories else None
        if directory is None:
            return self._load(version)
        try:
            return load_host_adapter(directory, version, self._convert)
        except (AdapterRejected, OSError) as error:
            raise AdapterCorrupt(f"the staged files of version {version[:12]} cannot be read") from error
