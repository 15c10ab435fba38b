"""What leaves the store and when: versions that nobody keeps or uses, damaged files, changes that others made."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
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
        self._listener: Callable[[str], None] | None = None
        self._news_lock = threading.Lock()
        self._known = Digests(frozenset(), frozenset())  # as of the last `retire`
        self._mark = -1  # of the index, as of the last `refresh`

    def open(self, reserved_names: Collection[str]) -> None:
        """What an owner does first: note damage, and look at what should not be there. Raises `StoreUnavailable`."""
        if self._files.is_owner:
            with storage_errors("looking for leftovers"), self._index.write() as index:
                kept, stored = index.digests(), self._files.stored()
                for version in kept - stored:
                    if not index.is_corrupt(version):
                        logger.error(
                            "the files of version %.12s (%s) are gone", version, ", ".join(index.names_of(version))
                        )
                    index.mark_corrupt(version, True)
                for version in index.corrupt_digests() & stored:  # killed while it was uploaded again
                    index.mark_corrupt(version, self._files.is_broken(version))
                for version in sorted(kept & stored):
                    if not self._files.has_record(version):
                        logger.warning("the record of version %.12s is gone: it is written anew", version)
                        index.write_record(version)
                for version in sorted(stored - kept):
                    outgoing = self._take_out(version)
                    if outgoing is not None:
                        self._files.erase(outgoing)
                self._tidy_quarantine(kept, index.corrupt_digests())
                self._files.remove_leftovers()
        with storage_errors("listing"):
            shadowed = [name for name in sorted(reserved_names) if self._index.kept(name)]
        for name in shadowed:
            logger.warning("the adapter %s is shadowed by the base model, which is now served under its name", name)

    def _tidy_quarantine(self, kept: Collection[str], corrupt: Collection[str]) -> None:
        """Damaged files stay as long as some name keeps their version, damaged as it is."""
        quarantine = self._files.quarantine
        for version in sorted(set(quarantine.of_kept()) - set(corrupt)):
            if version in kept:
                quarantine.release(version, "the version was uploaded again")
            elif (why := self._why_unkept(version)) is not None:
                quarantine.release(version, why)
            else:
                quarantine.put_unknown(quarantine.damaged(version), version, "it is damaged, and no name keeps it")

    def tell_retired(self, listener: Callable[[str], None]) -> None:
        """Have `listener` called, under no lock, with each version that no name points at any more and nobody uses."""
        with storage_errors("listing"):
            self._known = self._index.digests()
        self._listener = listener

    def retire(self) -> None:
        """See which versions lost their last name, and tell of those that nobody uses; others follow when they end."""
        if self._listener is None:
            return  # a command holds nothing in memory
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
        if self._listener is not None:
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
        """Take out the versions that no name keeps and nobody leases; what is leased goes with its last lease.

        Removed is what says by itself that no name keeps it any more; the rest is set aside. What cannot be removed now
        is left to the next opening.
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
                if not self._files.is_owner or not index.is_kept(version) or not is_damaged:
                    return
                names = ", ".join(index.names_of(version))
                aside = self._files.quarantine.damaged(version)
                if self._files.exists(version):
                    directory = self._files.directory(version)
                    aside = self._files.quarantine.put_damaged(directory, version, "its files are damaged")
                index.mark_corrupt(version, True)
        except StoreUnavailable as error:
            logger.warning("version %.12s is damaged and stays where it is: %s", version, error)
            return
        logger.error("version %.12s (%s) is damaged: set aside in %s; upload it again", version, names, aside)

    def _withdraw(self, version: str) -> Path | None:
        with self._index.write() as index, self._leases.lock:
            if index.is_kept(version) or not self._files.is_owner:
                self._leases.is_kept_again(version)
                return None
            if self._leases.wait_to_collect(version):
                return None
            return self._take_out(version)

    def _take_out(self, version: str) -> Path | None:
        """Withdraw a version that no name keeps, and return where its files are if they are to be erased.

        With the index's write lock held.
        """
        why = self._why_unkept(version)
        if why is not None:
            self._files.quarantine.release(version, why)
            logger.info("version %.12s is removed: %s", version, why)
            return self._files.withdraw(version)
        if self._files.exists(version):
            aside = self._files.quarantine.put_unknown(self._files.directory(version), version, self._unknown(version))
            logger.warning("version %.12s is not in the index: set aside in %s", version, aside)
        return None

    def _why_unkept(self, version: str) -> str | None:
        """What the version's own record says, if it says that no name keeps it."""
        with suppress(ValueError):
            record = self._index.records.read(version)
            if record is not None and not record.claims:
                return record.unkept or "no name keeps it"
        return None

    def _unknown(self, version: str) -> str:
        """Of a version that no name keeps, and whose record does not say so."""
        try:
            record = self._index.records.read(version)
        except ValueError as error:
            return f"it is not in the index, and its record is damaged: {error}"
        if record is None:
            return (
                "it is not in the index and has no record: the rest of an upload that never ended, or put here by hand"
            )
        names = ", ".join(claim.upload.name for claim in record.claims)
        return f"it is not in the index; its own record says that it was kept by {names}"
