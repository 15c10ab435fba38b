"""The adapter store: versions on disk under the digest of what they compute, and names that point at them.

A version's files are complete and on disk before the index mentions them, and the index forgets them before they go. So
after a crash at any point the index is right. Each version's directory says by itself what the index says of it
(`directory_records`), so that an index that is lost can be made anew; what neither knows is set aside, never removed.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from loramux_adapters.artifact.coverage import LayerCount
from loramux_adapters.artifact.format import digest_of, read_config
from loramux_adapters.errors import AdapterCorrupt, AdapterRejected, PinRefused, StoreUnavailable, VectorsNotServed
from loramux_adapters.names import check_name
from loramux_adapters.store.choice import check_servable, chosen, previous, unknown
from loramux_adapters.store.files import Staging, VersionFiles
from loramux_adapters.store.index import StoreIndex, storage_errors
from loramux_adapters.store.leases import Lease, VersionLeases
from loramux_adapters.store.quarantine import Quarantined
from loramux_adapters.store.records import (
    AdapterRecord,
    KeptVersion,
    Published,
    StoreChange,
    UploadRow,
    VersionRecord,
    adapter_record,
)
from loramux_adapters.store.snapshot import AdapterCopy, install_copy, link_all
from loramux_adapters.store.upkeep import StoreUpkeep

if TYPE_CHECKING:
    from loramux_adapters.lora.affine import BaseWeights
    from loramux_adapters.lora.host_cache import HostAdapter
    from loramux_adapters.lora.weights import ConvertPairs

__all__ = ["AdapterRecord", "AdapterStore", "Lease", "Published", "Staging", "VersionRecord", "check_store"]

BUSY_SECONDS = 5.0  # to wait for another's change
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)


def check_store(root: Path) -> None:
    """Open a store that is there as its owner, and let it go again: takes a moment, and removes nothing.

    Raises `StoreUnavailable`, also if another process owns it; `IndexLost`.
    """
    if not root.is_dir():
        return
    with storage_errors("opening"):
        files = VersionFiles(root, owner=True)
        with closing(files):
            StoreIndex(root, files, busy_timeout=BUSY_SECONDS).close()


class AdapterStore:
    """Any thread may call any method. Leases live in this object; everything else is on disk."""

    def __init__(
        self,
        root: Path,
        *,
        owner: bool = True,
        reserved_names: Collection[str] = (),
        served_base_id: str | None = None,
        keep_versions: int = 2,
        pin_bytes: int | None = None,
        busy_timeout: float = BUSY_SECONDS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open or create the store, as its owner; raises `StoreUnavailable`, also if another process owns it.

        Raises `IndexLost` if its index is not there, or damaged, or lacks changes, beside versions that it should know.
        The owner leases versions, collects them, and begins by removing what a crash left behind. With `owner` False
        this is a tool's view beside it: to list, publish and delete; what that leaves unkept goes when an owner opens,
        or notices it (`refresh`).
        `reserved_names`: not for adapters; one that has such a name from before is shadowed. `served_base_id`: uploads
        are recorded as checked against it, and versions checked against another are not leased. `keep_versions`: how
        many each name keeps. `pin_bytes`: most that pinned adapters hold; None is no limit. `busy_timeout`: in seconds.
        """
        assert keep_versions >= 1
        self._reserved_names = frozenset(reserved_names)
        self._served_base_id = served_base_id
        self._keep_versions = keep_versions
        self._pin_bytes = pin_bytes
        self._clock = clock
        self._leases = VersionLeases()
        self._listeners: list[Callable[[StoreChange], None]] = []
        with storage_errors("opening"):
            self._files = VersionFiles(root, owner=owner)
        try:
            with storage_errors("opening"):
                self._index = StoreIndex(root, self._files, busy_timeout=busy_timeout)
        except StoreUnavailable:
            self._files.close()
            raise
        self._upkeep = StoreUpkeep(self._index, self._files, self._leases)
        try:
            self._upkeep.open(self._reserved_names)
        except StoreUnavailable:
            self.close()
            raise

    def close(self) -> None:
        """To be called when no other method runs; leases are void afterwards. May be called twice."""
        self._index.close()
        self._files.close()

    def check_name(self, name: str) -> None:
        """Raises `InvalidAdapterName` for a name that an adapter cannot have."""
        check_name(name, self._reserved_names)

    @contextmanager
    def stage(self) -> Iterator[Staging]:
        """A fresh directory for an upload; what is still in it at the end is removed.

        Raises `StoreUnavailable`, also for a full disk while the caller writes into it.
        """
        with ExitStack() as stack:
            with storage_errors("staging an upload"):
                staging = stack.enter_context(self._files.stage())
            try:
                yield staging
            except OSError as error:
                if error.errno not in _DISK_ERRORS:
                    raise  # the caller's own: a client that went away is an OSError too
                raise StoreUnavailable(f"the upload could not be written: {error.strerror}") from error

    def publish(
        self,
        name: str,
        staging: Staging,
        *,
        rank: int,
        base_id: str | None,
        target_modules: list[str],
        proof: str = "none",
        version: str | None = None,
        layers: LayerCount | None = None,
        notes: Sequence[str] = (),
    ) -> Published:
        """Make the files of an upload the current version of `name`, durably and all at once.

        `rank`, `base_id`, `target_modules`, `version`, `layers`, `notes`: as `check_adapter` found; `proof`: how the
        fingerprint replayed.
        A version the name already points at is left as it is, unless its files were damaged: then they are replaced.
        Raises `InvalidAdapterName`, `AdapterRejected`, `StoreUnavailable`; then nothing changed.
        """
        self.check_name(name)
        unkept: set[str] = set()
        with storage_errors("publishing"):
            digest = version or digest_of(read_config(staging.directory), staging.directory)
            upload = UploadRow(
                name=name,
                digest=digest,
                rank=rank,
                target_modules=",".join(target_modules),
                nbytes=self._files.settle(staging),
                base_id=base_id,
                checked_base=self._served_base_id,
                created=int(self._clock()),
                fingerprint=proof,
                adapted_layers=layers and layers.adapted,
                base_layers=layers and layers.of,
                notes="\n".join(notes),
            )
            is_broken = self._files.is_broken(digest)
            with self._index.write() as index:
                before = index.current_digest(name)
                is_repair = is_broken or index.is_corrupt(digest)
                undo = self._files.install(staging, digest, replace=is_broken)
                if undo is not None:
                    index.on_rollback(undo)
                    index.write_record(digest)
                if before == digest:
                    index.confirm(upload)
                else:
                    index.keep(upload)
                    unkept = index.forget_old(name, self._keep_versions)
            if is_repair:
                self._files.quarantine.release(digest, "the version was uploaded again")
        if before == digest:
            published = Published(name, digest, "repaired" if is_repair else "unchanged")
        else:
            published = Published(name, digest, "created" if before is None else "updated")
        self._changed(unkept, StoreChange("published", name, digest, published.outcome))
        return published

    def rollback(self, name: str, version_prefix: str | None = None) -> Published:
        """Point a name at the version before its current one, or at the kept one whose digest starts with the prefix.

        Raises `AdapterNotFound`, `RollbackImpossible`, `AdapterCorrupt`, `BaseMismatch`, `StoreUnavailable`; then
        nothing changed.
        """
        with storage_errors("rolling back"), self._index.write() as index:
            kept = index.kept(name)
            row = previous(name, kept) if version_prefix is None else chosen(name, kept, version_prefix)
            check_servable(row, self._served_base_id)
            if not row.current:
                index.point(name, row.upload.digest, int(self._clock()))
        published = Published(name, row.upload.digest, "unchanged" if row.current else "rolled_back")
        self._changed((), StoreChange("rolled back", name, published.version, published.outcome))
        return published

    def pin(self, name: str) -> None:
        """Mark a name as one to keep in memory, whichever version it points at, until `unpin`.

        Raises `AdapterNotFound`, `PinRefused`, `StoreUnavailable`.
        """
        with storage_errors("pinning"), self._index.write() as index:
            nbytes = chosen(name, index.kept(name), None).upload.nbytes
            pinned = index.pinned_bytes(without=name)
            if self._pin_bytes is not None and pinned + nbytes > self._pin_bytes:
                raise PinRefused(name, nbytes, pinned=pinned, limit=self._pin_bytes)
            index.pin(name, True)
        self._tell(StoreChange("pinned", name))

    def unpin(self, name: str) -> None:
        """Raises `AdapterNotFound`, `StoreUnavailable`."""
        with storage_errors("unpinning"), self._index.write() as index:
            if index.current_digest(name) is None:
                raise unknown(name)
            index.pin(name, False)
        self._tell(StoreChange("unpinned", name))

    def delete(self, name: str) -> None:
        """Unregister a name at once; files that nobody else keeps go with their last lease.

        Raises `AdapterNotFound`, `StoreUnavailable`.
        """
        with storage_errors("deleting"), self._index.write() as index:
            if (version := index.current_digest(name)) is None:
                raise unknown(name)
            unkept = index.remove(name, f"the adapter {name} was deleted")
        self._changed(unkept, StoreChange("deleted", name, version))

    def acquire(self, name: str, version_prefix: str | None = None) -> Lease:
        """Lease the current version of `name`, or the kept one whose digest starts with `version_prefix`.

        Lookup and lease are one step: nothing can be removed in between. Raises `AdapterNotFound`, `AdapterCorrupt`,
        `BaseMismatch` if the version was checked against another base than the served one, `StoreUnavailable`.
        """
        with storage_errors("looking up a name"), self._leases.lock:
            row = chosen(name, self._index.kept(name), version_prefix)
            check_servable(row, self._served_base_id)
            self._leases.add(name, row.upload.digest)
        return Lease(name, row.upload.digest, row.upload.rank, row.upload.nbytes, self._release)

    def record(self, name: str) -> AdapterRecord:
        """Raises `AdapterNotFound`, `StoreUnavailable`."""
        with storage_errors("listing"):
            kept = self._index.kept(name)
        if not kept:
            raise unknown(name)
        return self._record(kept)

    def records(self, *, pinned: bool = False) -> list[AdapterRecord]:
        """All adapters, or all that are pinned, by name. Raises `StoreUnavailable`."""
        with storage_errors("listing"):
            rows = self._index.all_kept(pinned=pinned)
        return [self._record(list(kept)) for _, kept in groupby(rows, key=lambda row: row.upload.name)]

    def directory(self, version: str) -> Path:
        """Where a version's files are: for reading, and while it is kept or leased."""
        return self._files.directory(version)

    def load(
        self, version: str, convert: ConvertPairs | None = None, weights: BaseWeights | None = None
    ) -> HostAdapter:
        """Read a version into host memory, in a loader thread; `convert` and `weights` as in `load_host_adapter`.

        Raises `VectorsNotServed`, and `AdapterCorrupt` if it is not as published; damaged for good, it is set aside
        until it is uploaded again.
        """
        from loramux_adapters.lora.weights import load_host_adapter  # torch: who only lists and publishes is spared it

        directory = self._files.directory(version)
        try:
            adapter = load_host_adapter(directory, convert, weights)
            if adapter.version != version:  # it may be one of before modules that were saved whole counted
                adapter = load_host_adapter(directory, convert, weights, saved=False)
            if adapter.version != version:
                raise AdapterRejected(["they have another digest"])
            return adapter
        except VectorsNotServed:  # nothing is wrong with it
            raise
        except (AdapterRejected, OSError) as error:
            self._upkeep.set_aside(version)
            raise AdapterCorrupt(f"the stored files of version {version[:12]} cannot be read as published") from error

    def tell_retired(self, listener: Callable[[str], None]) -> None:
        """Have `listener` called with each version that can leave the memories: no name points at it, nobody uses it.

        It is called by whichever thread made it so, under no lock, and has to be quick.
        """
        self._upkeep.tell_retired(listener)

    def tell_changed(self, listener: Callable[[StoreChange], None]) -> None:
        """Have `listener` called with each change that this object makes, by the thread that made it, once it is there.

        It raises nothing.
        """
        self._listeners.append(listener)

    def refresh(self) -> bool:
        """Take notice of what other processes changed; to be called every second or so. Returns whether anything did.

        Lookups see them at once, without this; it makes versions leave memory and disk. Raises `StoreUnavailable`.
        """
        return self._upkeep.refresh()

    @contextmanager
    def snapshot(self) -> Iterator[tuple[Path, list[KeptVersion]]]:
        """All that is kept at one moment: a directory <digest>/<files> and the rows, by name, newest first.

        Versions known to be damaged have no directory. What is published or deleted meanwhile changes nothing in it.
        Raises `StoreUnavailable`.
        """
        with self.stage() as staging:
            with storage_errors("taking a snapshot"):
                rows = link_all(self._index, self._files, staging.directory)
            yield staging.directory, rows

    def restore(self, copy: AdapterCopy, *, replace: bool) -> bool:
        """Enter a name with all its versions at once; False if it is there already and not to be replaced.

        Raises `InvalidAdapterName`, `AdapterCorrupt` if files do not have the digest they should have,
        `AdapterRejected`, `StoreUnavailable`; then nothing changed.
        """
        self.check_name(copy.name)
        with storage_errors("restoring"):
            unkept = install_copy(self._index, self._files, copy, replace=replace)
        if unkept is not None:
            self._changed(unkept, StoreChange("restored", copy.name))
        return unkept is not None

    def quarantined(self) -> list[Quarantined]:
        """What was set aside, and why. Raises `StoreUnavailable`."""
        with storage_errors("looking into the quarantine"):
            return self._files.quarantine.all()

    def check_integrity(self) -> None:
        """Assert what must hold between changes; for tests."""
        self._index.check_integrity()

    def _record(self, kept: list[KeptVersion]) -> AdapterRecord:
        references = self._leases.of_name(kept[0].upload.name)
        return adapter_record(kept, served_base_id=self._served_base_id, references=references)

    def _release(self, lease: Lease) -> None:
        ended = self._leases.end(lease.name, lease.version)
        if ended.retired:
            self._upkeep.retired(lease.version)
        if ended.unkept:
            self._upkeep.collect([lease.version])

    def _tell(self, change: StoreChange) -> None:
        for listener in self._listeners:
            listener(change)

    def _changed(self, unkept: Collection[str], change: StoreChange) -> None:
        """The index has changed: these versions are in it no more."""
        self._tell(change)
        self._upkeep.note_change()
        self._upkeep.collect(unkept)
