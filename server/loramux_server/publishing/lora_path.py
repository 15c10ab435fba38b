"""Publishes what the `lora_path` of vLLM's calls names: an adapter below the one directory that the operator allows."""

from __future__ import annotations

import logging
import re
from pathlib import Path, PurePosixPath

from loramux_adapters.artifact.reading.own_files import LinkInTheWay
from loramux_adapters.errors import AdapterNotFound, AdapterRejected
from loramux_server.errors import ConfigError, RequestError
from loramux_server.publishing.adapter_files import copy_adapter, is_complete, look_at, unread_weights
from loramux_server.publishing.publisher import Publisher

logger = logging.getLogger(__name__)

_MAX_PATH = 1024
_MAX_NAME = 255  # bytes of a part of it, on most file systems
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


class LoraPathRoot:
    """Any thread may call any method."""

    def __init__(self, publisher: Publisher, root: Path, *, limit: int) -> None:
        """`limit`: most bytes of an adapter. Raises ConfigError if there is no directory `root`."""
        if not root.is_dir():
            raise ConfigError(f"--lora-path-root: {root} is not a directory")
        self._publisher = publisher
        self._given, self._root = PurePosixPath(root.absolute()), root.resolve()
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
                unread = None if is_complete(look) else unread_weights(self._root, parts)
            except LinkInTheWay as error:
                raise RequestError(f"'lora_path': {error}", param="lora_path") from error
            except OSError as error:
                raise AdapterRejected([f"the adapter cannot be read: {error.strerror}"]) from error
            if unread is not None:
                raise AdapterRejected([unread])
            if not is_complete(look):
                raise AdapterNotFound("No adapter found: 'lora_path' holds no config and safetensors weights of one")
            if not is_same:
                raise AdapterRejected(["the adapter was changed while it was read; call again when it is complete"])

        for note in self._publisher.publish_files(name, fill).checked.notes:
            logger.info("%s from 'lora_path': %s", name, note)

    def _parts_of(self, path: str) -> tuple[str, ...]:
        """The way from the root, by name alone; what is on disk is looked at step by step when it is opened."""
        if _SCHEME.match(path):
            raise self._refusal("is a URL; nothing is fetched, it must be a directory")
        if not path or len(path) > _MAX_PATH or not path.isprintable() or "\\" in path:
            raise self._refusal("is not a path")
        if any(len(part.encode()) > _MAX_NAME for part in path.split("/")):
            raise self._refusal(f"holds a name of more than {_MAX_NAME} bytes")
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
