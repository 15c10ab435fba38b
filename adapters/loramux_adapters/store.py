"""The adapter store: versions on disk under the digest of what they compute, and names that point at them.

A version's files are complete and on disk before the index mentions them, and the index forgets them before they go. So
after a crash at any point the index is right, and what it does not mention is litter that the next opening removes.
"""

from __future__ import annotations

import errno
import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from loramux_adapters.errors import (
    AdapterCorrupt,
    AdapterNotFound,
    AdapterRejected,
    BaseMismatch,
    InvalidAdapterName,
    StoreUnavailable,
)
from loramux_adapters.format import digest_of, read_config
from loramux_adapters.store_files import Staging, VersionFiles
from loramux_adapters.store_index import KeptVersion, StoreIndex, Upload, storage_errors
from loramux_adapters.store_records import AdapterRecord, Lease, Published, VersionRecord, adapter_record

if TYPE_CHECKING:
    from loramux_adapters.host_cache import HostAdapter

__all__ = ["NAME_PATTERN", "AdapterRecord", "AdapterStore", "Lease", "Published", "Staging", "VersionRecord"]

logger = logging.getLogger(__name__)

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
_VERSION_PREFIX = re.compile(r"[0-9a-f]{8,64}")


class AdapterStore:
    """Any thread may call any method. Leases live in this object; everything else is on disk.

    Locks are taken in one order: the index's write lock, then `_lease_lock`, then the index's read lock.
    """

    def __init__(
        self,
        root: Path,
        *,
        owner: bool = True,
        reserved_names: Collection[str] = (),
        served_base_id: str | None = None,
        keep_versions: int = 2,
        busy_timeout: float = 5.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open or create the store, as its owner; raises `StoreUnavailable`, also if another process owns it.

        The owner leases versions, collects them, and begins by removing what a crash left behind. With `owner` False
        this is a tool's view beside it: to list, publish and delete; what that leaves unkept goes when an owner opens.
        `reserved_names`: not for adapters; one that has such a name from before is shadowed. `served_base_id`: uploads
        are recorded as checked against it, and versions checked against another are not leased. `keep_versions`: how
        many each name keeps. `busy_timeout`: seconds to wait for another process's write.
        """
        assert keep_versions >= 1
        self._reserved_names = frozenset(reserved_names)
        self._served_base_id = served_base_id
        self._keep_versions = keep_versions
        self._clock = clock
        self._lease_lock = threading.Lock()
        self._leases: Counter[str] = Counter()  # by version
        self._leases_by_name: Counter[str] = Counter()
        self._unkept: set[str] = set()  # versions that no name keeps, whose files stay for the sake of a lease
        with storage_errors("opening"):
            self._files = VersionFiles(root, owner=owner)
        try:
            with storage_errors("opening"):
                self._index = StoreIndex(root / "index.sqlite", busy_timeout=busy_timeout)
        except StoreUnavailable:
            self._files.close()
            raise
        try:
            self._remove_leftovers()
            self._warn_of_reserved_names()
        except StoreUnavailable:
            self.close()
            raise

    def close(self) -> None:
        """To be called when no other method runs; leases are void afterwards. May be called twice."""
        self._index.close()
        self._files.close()

    def check_name(self, name: str) -> None:
        """Raises `InvalidAdapterName` for a name that an adapter cannot have."""
        if not NAME_PATTERN.fullmatch(name):
            raise InvalidAdapterName(
                "an adapter's name is 1 to 63 characters of A-Z a-z 0-9 . _ - and starts with a letter or a digit"
            )
        if name in self._reserved_names:
            raise InvalidAdapterName(f"the name {name} belongs to the base model")

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
        self, name: str, staging: Staging, *, rank: int, base_id: str | None, target_modules: list[str]
    ) -> Published:
        """Make the staged files the current version of `name`, durably and all at once.

        `rank`, `base_id` and `target_modules` are what `verify.check_adapter` found. A version the name already points
        at is left as it is. Raises `InvalidAdapterName`, `AdapterRejected`, `StoreUnavailable`; then nothing changed.
        """
        self.check_name(name)
        with storage_errors("publishing"):
            digest = digest_of(read_config(staging.directory), staging.directory)
            upload = Upload(
                name=name,
                digest=digest,
                rank=rank,
                target_modules=",".join(target_modules),
                nbytes=self._files.settle(staging),
                base_id=base_id,
                checked_base=self._served_base_id,
                created=int(self._clock()),
            )
            is_broken = self._files.is_broken(digest)
            with self._index.write() as index:
                previous = index.current_digest(name)
                self._files.install(staging, digest, replace=is_broken)
                if previous == digest:
                    index.confirm(name, digest, base_id, self._served_base_id)
                    return Published(name, digest, "unchanged")
                index.keep(upload)
                unkept = index.forget_old(name, self._keep_versions)
        self._collect(unkept)
        return Published(name, digest, "created" if previous is None else "updated")

    def delete(self, name: str) -> None:
        """Unregister a name at once; files that nobody else keeps go with their last lease.

        Raises `AdapterNotFound`, `StoreUnavailable`.
        """
        with storage_errors("deleting"), self._index.write() as index:
            if index.current_digest(name) is None:
                raise _unknown(name)
            unkept = index.remove(name)
        self._collect(unkept)

    def acquire(self, name: str, version_prefix: str | None = None) -> Lease:
        """Lease the current version of `name`, or the kept one whose digest starts with `version_prefix`.

        Lookup and lease are one step: nothing can be removed in between. Raises `AdapterNotFound`, `BaseMismatch` if
        the version was checked against another base than the served one, `StoreUnavailable`.
        """
        if version_prefix is not None and not _VERSION_PREFIX.fullmatch(version_prefix):
            raise AdapterNotFound("a version is named by the first 8 to 64 characters of its digest, in lower-case hex")
        with storage_errors("looking up a name"), self._lease_lock:
            upload = self._find(name, version_prefix)
            self._leases[upload.digest] += 1
            self._leases_by_name[name] += 1
        return Lease(name, upload.digest, upload.rank, upload.nbytes, self._release)

    def record(self, name: str) -> AdapterRecord:
        """Raises `AdapterNotFound`, `StoreUnavailable`."""
        with storage_errors("listing"):
            kept = self._index.kept(name)
        if not kept:
            raise _unknown(name)
        return self._record(kept)

    def records(self) -> list[AdapterRecord]:
        """All adapters, by name. Raises `StoreUnavailable`."""
        with storage_errors("listing"):
            rows = self._index.all_kept()
        by_name: dict[str, list[KeptVersion]] = {}
        for row in rows:
            by_name.setdefault(row.upload.name, []).append(row)
        return [self._record(kept) for kept in by_name.values()]

    def directory(self, version: str) -> Path:
        """Where a version's files are: for reading, and while it is kept or leased."""
        return self._files.directory(version)

    def load(self, version: str) -> HostAdapter:
        """Read a version into host memory, in a loader thread. Raises `AdapterCorrupt` if it is not as published."""
        from loramux_adapters.weights import load_host_adapter  # torch: who only lists and publishes is spared it

        directory = self._files.directory(version)
        try:
            if digest_of(read_config(directory), directory) != version:
                raise AdapterCorrupt(f"the stored files of version {version[:12]} are not those that were published")
            return load_host_adapter(directory, version)
        except (AdapterRejected, OSError) as error:
            raise AdapterCorrupt(f"the stored files of version {version[:12]} cannot be read") from error

    def _find(self, name: str, version_prefix: str | None) -> Upload:
        kept = self._index.kept(name)
        if not kept:
            raise _unknown(name)
        if version_prefix is None:
            found = [row.upload for row in kept if row.current]
        else:
            found = [row.upload for row in kept if row.upload.digest.startswith(version_prefix)]
        if len(found) != 1:
            many = "more than one version" if found else "no version"
            raise AdapterNotFound(f"the adapter {name} keeps {many} whose digest starts with {version_prefix}")
        checked, served = found[0].checked_base, self._served_base_id
        if checked is not None and served is not None and checked != served:
            raise BaseMismatch(checked, served)
        return found[0]

    def _record(self, kept: list[KeptVersion]) -> AdapterRecord:
        with self._lease_lock:
            references = self._leases_by_name[kept[0].upload.name]
        return adapter_record(kept, served_base_id=self._served_base_id, references=references)

    def _release(self, lease: Lease) -> None:
        with self._lease_lock:
            for counter, key in ((self._leases, lease.version), (self._leases_by_name, lease.name)):
                counter[key] -= 1
                if counter[key] == 0:
                    del counter[key]
            is_last = lease.version in self._unkept and lease.version not in self._leases
        if is_last:
            self._collect([lease.version])

    def _collect(self, versions: Iterable[str]) -> None:
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

    def _withdraw(self, version: str) -> Path | None:
        with self._index.write() as index, self._lease_lock:
            self._unkept.discard(version)
            if version in index.digests() or not self._files.is_owner:
                return None
            if version in self._leases:
                self._unkept.add(version)
                return None
            return self._files.withdraw(version)

    def _warn_of_reserved_names(self) -> None:
        with storage_errors("listing"):
            shadowed = [name for name in sorted(self._reserved_names) if self._index.kept(name)]
        for name in shadowed:
            logger.warning("the adapter %s is shadowed by the base model, which is now served under its name", name)

    def _remove_leftovers(self) -> None:
        if self._files.is_owner:
            with storage_errors("removing leftovers"), self._index.write() as index:
                self._files.remove_leftovers(keep=index.digests())


def _unknown(name: str) -> AdapterNotFound:
    return AdapterNotFound(
        f"there is no adapter {name}" if NAME_PATTERN.fullmatch(name) else "no adapter has this name"
    )
