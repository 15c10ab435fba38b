"""Whole adapters out of a store at one moment, and into one, with all their versions: what a backup is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loramux_adapters.artifact.format import has_digest
from loramux_adapters.errors import AdapterCorrupt
from loramux_adapters.store.files import Staging, VersionFiles
from loramux_adapters.store.index import StoreIndex
from loramux_adapters.store.records import KeptVersion, UploadRow


@dataclass(frozen=True, slots=True)
class AdapterCopy:
    """A name to enter into a store.

    Attributes:
        uploads: the versions it keeps, oldest first, all under this name.
        files: digest -> directory of the version's files, below one that `AdapterStore.stage` gave. It is moved.
            A version may be missing here if some name of the store keeps it.
        current: the digest that the name points at.
        created, updated: the name's own times, unix seconds.
    """

    name: str
    uploads: Sequence[UploadRow]
    files: Mapping[str, Path]
    current: str
    pinned: bool
    created: int
    updated: int


def link_all(index: StoreIndex, files: VersionFiles, target: Path) -> list[KeptVersion]:
    """Give all that is kept at this moment a second name below `target`, which is on the store's own disk.

    Returns the rows, by name, newest first; damaged versions have no files. May raise OSError, sqlite3.Error.
    """
    with index.write() as changes:  # so nothing comes or goes meanwhile
        rows = changes.all_kept()
        for digest in {row.upload.digest for row in rows if not row.corrupt}:
            files.link(digest, target / digest)
    return rows


def install_copy(index: StoreIndex, files: VersionFiles, copy: AdapterCopy, *, replace: bool) -> set[str] | None:
    """Enter the name, all at once; returns the versions that no name keeps any more, None if it is there already.

    Raises `AdapterCorrupt`, `AdapterRejected`, OSError, sqlite3.Error; then nothing changed.
    """
    for digest, directory in copy.files.items():
        if not has_digest(directory, digest):
            raise AdapterCorrupt(f"version {digest[:12]} of {copy.name} is not what it is said to be")
        files.settle(Staging(directory))
    broken = {digest for digest in copy.files if files.is_broken(digest)}
    repaired: set[str] = set()
    with index.write() as changes:
        is_there = changes.current_digest(copy.name) is not None
        if is_there and not replace:
            return None
        for digest in {upload.digest for upload in copy.uploads} - copy.files.keys():
            if not changes.is_kept(digest) or changes.is_corrupt(digest):
                raise AdapterCorrupt(f"the files of version {digest[:12]} of {copy.name} are missing")
        repaired = {digest for digest in copy.files if digest in broken or changes.is_corrupt(digest)}
        unkept = changes.remove(copy.name, f"the adapter {copy.name} was restored from a backup, which has others")
        for digest, directory in copy.files.items():
            undo = files.install(Staging(directory), digest, replace=digest in broken)
            if undo is not None:
                changes.on_rollback(undo)
                changes.write_record(digest)
        changes.restore([*copy.uploads], copy.current, pinned=copy.pinned, created=copy.created, updated=copy.updated)
    for digest in repaired:
        files.quarantine.release(digest, "the version was restored from a backup")
    return unkept
