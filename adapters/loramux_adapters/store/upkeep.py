"""What leaves the store and when: versions that nobody keeps or uses, damaged files, changes that others made."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from loramux_adapters.errors import StoreUnavailable
from loramux_adapters.store.files import VersionFiles
from loramux_adapters.store.index import StoreIndex, storage_errors
from loramux_adapters.store.leases import VersionLeases
from loramux_adapters.store.records import Digests

logger = logging.getLogger(__name__)


class StoreUpkeep:
    """Any thread may call any method. Only the store's owner removes anything from disk.

    Locks are taken in one order: `_news_lock`, the index's write lock, the leases' lock, the index's read lock.
    """

    def __init__(self, index: StoreIndex, files: VersionFiles, leases: VersionLeases) -> None:
        self._index = index
        self._files = files
        self._leases = leases
        self._listener: Callable[[str], None] = lambda version: None
        self._news_lock = threading.Lock()
        self._known = Digests(frozenset(), frozenset())  # as of the last `retire`
        self._mark = -1  # of the index, as of the last `refresh`

    def open(self, reserved_names: Collection[str]) -> None:
        """What an owner does first: note damage and remove what a crash left behind. Raises `StoreUnavailable`."""
        if self._files.is_owner:
            with storage_errors("removing leftovers"), self._index.write() as index:
                kept = index.digests()
                for version in kept - self._files.stored():
                    logger.error(
                        "the files of version %.12s (%s) are gone", version, ", ".join(index.names_of(version))
                    )
                    index.mark_corrupt(version, True)
                for version in index.corrupt_digests() & self._files.stored():  # killed while it was uploaded again
                    index.mark_corrupt(version, self._files.is_broken(version))
                self._files.remove_leftovers(kept, index.corrupt_digests())
        with storage_errors("listing"):
            self._known = self._index.digests()
            shadowed = [name for name in sorted(reserved_names) if self._index.kept(name)]
        for name in shadowed:
            logger.warning("the adapter %s is shadowed by the base model, which is now served under its name", name)

    def tell_retired(self, listener: Callable[[str], None]) -> None:
        """Have `listener` called, under no lock, with each version that no name points at any more and nobody uses."""
        self._listener = listener

    def retire(self) -> None:
        """See which versions lost their last name, and tell of those that nobody uses; others follow when they end."""
        with self._leases.lock:
            digests = self._index.digests()
            gone = (self._known.current - digests.current) | (self._known.kept - digests.kept)
            self._known = digests
            free = self._leases.retire(gone, digests.current)
        for version in free:
            self._listener(version)

    def note_change(self) -> None:
        """`retire` after a change that is committed: what cannot be told now is told by the next `refresh`."""
        try:
            with storage_errors("looking for versions to retire"):
                self.retire()
        except StoreUnavailable as error:
            logger.warning("%s", error)

    def retired(self, version: str) -> None:
        """The last lease of a version ended that no name points at any more."""
        self._listener(version)

    def refresh(self) -> bool:
        """Take notice of what other processes published and deleted; returns whether there was any change at all."""
        with self._news_lock, storage_errors("looking for changes"):
            mark = self._index.change_mark()
            if mark == self._mark:
                return False
            self._mark = mark
            self.retire()
            strays = self._files.stored() - self._index.digests().kept if self._files.is_owner else set()
        self.collect(strays)
        return True

    def collect(self, versions: Iterable[str]) -> None:
        """Remove the files of versions that no name keeps and nobody leases; what is leased goes with its last lease.

        What cannot be removed now is left to the next opening.
        """
        for version in versions:
            try:
                with storage_errors("removing a version"):
                    outgoing = self._withdraw(version)
                    if outgoing is not None:
                        self._files.erase(outgoing)
            except StoreUnavailable as error:
                logger.warning("version %.12s stays on disk: %s", version, error)

    def set_aside(self, version: str) -> None:
        """Quarantine a kept version whose files turn out to be damaged or gone. Never raises."""
        try:
            with storage_errors("setting a version aside"), self._index.write() as index:
                # Looked at again, now that nobody can delete it or upload it meanwhile.
                is_damaged = not self._files.exists(version) or self._files.is_broken(version)
                if not self._files.is_owner or version not in index.digests() or not is_damaged:
                    return
                names = ", ".join(index.names_of(version))
                aside = self._files.quarantine(version)
                index.mark_corrupt(version, True)
        except StoreUnavailable as error:
            logger.warning("version %.12s is damaged and stays where it is: %s", version, error)
            return
        logger.error("version %.12s (%s) is damaged: set aside in %s; upload it again", version, names, aside)

    def _withdraw(self, version: str) -> Path | None:
        with self._index.write() as index, self._leases.lock:
            if version in index.digests() or not self._files.is_owner:
                self._leases.is_kept_again(version)
                return None
            if self._leases.wait_to_collect(version):
                return None
            self._files.release_quarantine(version)
            return self._files.withdraw(version)
