"""Adapters named by a path of this machine, below one directory that the operator allows and nowhere else."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from loramux_adapters.errors import AdapterNotFound, AdapterRejected
from loramux_adapters.lora.verify import Checked
from loramux_adapters.store.store import AdapterStore
from loramux_server.errors import ConfigError, RequestError
from loramux_server.publishing.local_source import LinkInTheWay, copy_adapter, is_complete, look_at
from loramux_server.publishing.preload import publish_files

_MAX_PATH = 1024
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


class LocalAdapters:
    """Any thread may call any method."""

    def __init__(self, store: AdapterStore, root: Path, check: Callable[[Path], Checked], *, limit: int) -> None:
        """`limit`: most bytes of an adapter. Raises ConfigError if there is no directory `root`."""
        if not root.is_dir():
            raise ConfigError(f"--lora-path-root: {root} is not a directory")
        self._store = store
        self._given, self._root = PurePosixPath(root.absolute()), root.resolve()
        self._check = check
        self._limit = limit

    def load(self, name: str, path: str) -> None:
        """Publish the adapter in the directory `path`, absolute or from the root on, under this name.

        Raises RequestError for a path that leads, or could lead, out of the root, or is no path; AdapterNotFound if no
        adapter is there; and what publishing raises.
        """
        parts = self._parts_of(path)

        def fill(target: Path) -> None:
            try:
                look = copy_adapter(self._root, parts, target, limit=self._limit)
                is_same = look_at(self._root, parts) == look
            except LinkInTheWay as error:
                raise RequestError("'lora_path' leads over a symbolic link", param="lora_path") from error
            except OSError as error:
                raise AdapterRejected([f"the adapter cannot be read: {error.strerror}"]) from error
            if not is_complete(look):
                raise AdapterNotFound("No adapter found: 'lora_path' holds no config and safetensors weights of one")
            if not is_same:
                raise AdapterRejected(["the adapter was changed while it was read; call again when it is complete"])

        publish_files(self._store, name, fill, self._check)

    def _parts_of(self, path: str) -> tuple[str, ...]:
        """The way from the root, by name alone; what is on disk is looked at step by step when it is opened."""
        if _SCHEME.match(path):
            raise self._refusal("is a URL; nothing is fetched, it must be a directory")
        if not path or len(path) > _MAX_PATH or not path.isprintable() or "\\" in path:
            raise self._refusal("is not a path")
        way = PurePosixPath(path)
        if ".." in way.parts:
            raise self._refusal("holds '..'")
        if way.is_absolute():
            for root in (self._given, PurePosixPath(self._root)):
                if way.is_relative_to(root):
                    return way.relative_to(root).parts
            raise self._refusal("is not below the directory that this server may load from")
        return way.parts

    def _refusal(self, why: str) -> RequestError:
        return RequestError(f"'lora_path' {why}", param="lora_path", code="invalid_lora_path")
