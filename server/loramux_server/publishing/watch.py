"""The watched directory: what `adapter_names` finds in it is published under these names, whenever it has changed.

An adapter is taken when it is complete and looks the same in two polls and after it was copied, so it is never half
read. What was uploaded, rolled back or deleted by other ways stays so until the directory changes, and a directory
that disappears unregisters nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from loramux_adapters.errors import AdapterError, AdapterNotFound, AdapterRejected
from loramux_adapters.store.store import AdapterStore
from loramux_server.errors import LoramuxError, ServerBusy
from loramux_server.publishing.adapter_files import Look, copy_adapter, is_complete, look_at, unread_weights
from loramux_server.publishing.directory_names import adapter_names
from loramux_server.publishing.publisher import Publisher, is_usable

logger = logging.getLogger(__name__)


class _Changed(Exception):
    """The files were changed while they were copied: their turn comes again."""


class _KeptAlready(Exception):
    """The store has this version under this name."""


@dataclass(slots=True)
class _Adapter:
    """What is known of one subdirectory.

    Attributes:
        seen: at the last poll; a str is why it could not be looked at.
        done: what was last published or refused; None if nothing was yet.
        waits: the server was too busy for it, which was said.
    """

    seen: Look | str
    done: Look | str | None = None
    waits: bool = False


class DirectoryWatch:
    """Owner: the thread that polls."""

    def __init__(
        self,
        store: AdapterStore,
        publisher: Publisher,
        directory: Path,
        *,
        limit: int,
        failed: Callable[[], None] = lambda: None,
    ) -> None:
        """`limit`: most bytes of an adapter. `failed` is called for each change that could not be published."""
        self._store = store
        self._publisher = publisher
        self._directory = directory
        self._limit = limit
        self._failed = failed
        self._adapters: dict[str, _Adapter] = {}
        self._is_readable = True

    def poll(self) -> None:
        """Look at everything once, and publish what has changed and come to rest."""
        names = self._names()
        if names is None:
            return
        for name in self._adapters.keys() - set(names):
            if self._adapters.pop(name).done is not None:
                logger.info("%s is gone from the watched directory; the adapter stays registered", name)
        for name in names:
            look = self._look(name)
            adapter = self._adapters.get(name)
            if adapter is None:
                self._adapters[name] = _Adapter(look)
                continue
            is_at_rest, adapter.seen = look == adapter.seen, look
            if is_at_rest and look != adapter.done:
                self._take(name, adapter, look)

    def _names(self) -> list[str] | None:
        try:
            names = adapter_names(self._directory)
        except OSError as error:
            if self._is_readable:
                logger.warning("the watched directory cannot be read: %s", error.strerror)
                self._failed()
            self._is_readable = False
            return None
        self._is_readable = True
        return names

    def _look(self, name: str) -> Look | str:
        try:
            return look_at(self._directory, name.split("/"))
        except AdapterRejected as error:
            return str(error)
        except OSError as error:
            return f"it cannot be read: {error.strerror}"

    def _take(self, name: str, adapter: _Adapter, look: Look | str) -> None:
        is_first = adapter.done is None
        if isinstance(look, str):
            self._refuse(name, look)
        elif not is_complete(look):
            reason = self._why_incomplete(name)
            if reason is None:
                return
            self._refuse(name, reason)
        else:
            try:
                done = self._publisher.publish_files(
                    name,
                    lambda target: self._copy(name, look, target),
                    lambda version: self._leave_kept(name, version, is_first),
                )
                logger.info("%s from the watched directory: %s, %.12s", name, done.stored.outcome, done.stored.version)
                for note in done.checked.notes:
                    logger.info("%s from the watched directory: %s", name, note)
            except _Changed:
                return  # its turn comes again
            except ServerBusy as error:
                if not adapter.waits:
                    logger.info("%s from the watched directory is tried again at every look: %s", name, error)
                adapter.waits = True
                return
            except _KeptAlready:
                logger.info("%s in the watched directory is a version that is kept already", name)
            except (AdapterError, LoramuxError) as error:
                self._refuse(name, str(error))
            except OSError as error:
                self._refuse(name, f"it cannot be copied: {error.strerror}")
        adapter.done, adapter.waits = look, False

    def _why_incomplete(self, name: str) -> str | None:
        """What will not change by waiting; None as long as the files may still come."""
        try:
            return unread_weights(self._directory, name.split("/"))
        except (AdapterRejected, OSError):
            return None  # the next look says so

    def _copy(self, name: str, look: Look, target: Path) -> None:
        copied = copy_adapter(self._directory, name.split("/"), target, limit=self._limit)
        if copied != look or look_at(self._directory, name.split("/")) != look:
            raise _Changed

    def _leave_kept(self, name: str, version: str, is_first: bool) -> None:
        """After a start, a directory that nobody changed must not undo a rollback or a newer upload."""
        if is_first and is_usable(self._store, name) and self._keeps(name, version):
            raise _KeptAlready

    def _keeps(self, name: str, version: str) -> bool:
        try:
            return version in {kept.version for kept in self._store.record(name).versions}
        except AdapterNotFound:
            return False

    def _refuse(self, name: str, reason: str) -> None:
        self._failed()
        logger.warning("%s in the watched directory is not published: %s", name, reason)
