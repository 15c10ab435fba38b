"""Makes the index of a store anew, from what each version's directory says of itself."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from loramux_adapters.durable_files import sync
from loramux_adapters.store.directory_records import DirectoryRecords
from loramux_adapters.store.files import VersionFiles
from loramux_adapters.store.index import storage_errors
from loramux_adapters.store.index_file import INDEX_FILE, read_remains
from loramux_adapters.store.index_writer import IndexWriter, build_index
from loramux_adapters.store.quarantine import QUARANTINE
from loramux_adapters.store.records import KeptVersion, UploadRow
from loramux_adapters.store.version_record import Claim, DirectoryRecord, NameFacts, claims_of

_SIDE_FILES = ("", "-wal", "-shm")


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """What became of an index.

    Attributes:
        names: that are in the new one, each with how many versions it keeps.
        damaged: versions of theirs whose files are set aside: they have to be uploaded again.
        doubtful: name -> what of it is not as it was.
        unknown: digest -> why nobody knows whose it is; the next opening sets its files aside.
        lost: names of which only the old index told, as far as it could be read: no version of theirs is there.
        old_index: the directory, below the store, that the old one is kept in; None if there was none.
    """

    names: dict[str, int]
    damaged: dict[str, list[str]]
    doubtful: dict[str, str]
    unknown: dict[str, str]
    lost: list[str]
    old_index: str | None

    @property
    def is_whole(self) -> bool:
        """Whether everything is there that was."""
        return not (self.damaged or self.doubtful or self.unknown or self.lost)

    def lines(self) -> Iterator[str]:
        """What came back and what did not, for the operator."""
        yield f"the index is made anew: {len(self.names)} adapters with {sum(self.names.values())} versions"
        for name, count in self.names.items():
            yield f"  {name}: {count} {'version' if count == 1 else 'versions'}"
        for name, doubt in self.doubtful.items():
            yield f"not as it was: {name}: {doubt}"
        for digest, names in self.damaged.items():
            yield f"damaged: version {digest[:12]} of {', '.join(names)}: upload it again"
        for name in self.lost:
            yield f"not back: {name}: the old index names it, and none of its versions is there"
        for digest, why in self.unknown.items():
            yield f"not back: version {digest[:12]}: {why}; set aside in {QUARANTINE}/"
        if self.old_index is not None:
            yield f"the old index is kept in {self.old_index}/"


@dataclass(frozen=True, slots=True)
class _Name:
    """A name as it will be entered. `claims`: oldest first."""

    claims: list[Claim]
    current: str
    facts: NameFacts
    doubt: str | None


def rebuild_index(root: Path) -> Rebuilt:
    """Nothing is removed: the old index is kept aside. No process may have the store open.

    A version without a record is entered as what can still be read of the old index says.
    Raises `StoreUnavailable`, also if another process owns the store; then nothing was changed.
    """
    with storage_errors("making its index anew"):
        files = VersionFiles(root, owner=True)
        try:
            records = DirectoryRecords(root, files)
            try:
                with records.locked(0.0):
                    return _rebuild(root, files, records)
            finally:
                records.close()
        finally:
            files.close()


def _rebuild(root: Path, files: VersionFiles, records: DirectoryRecords) -> Rebuilt:
    stored = files.stored()
    digests = sorted(stored | set(files.quarantine.of_kept()))
    found, unknown = _read_all(records, digests)
    remains = _remains(root, files)
    for digest in list(unknown):
        if rows := [row for row in remains if row.upload.digest == digest]:
            found.append(DirectoryRecord(digest, 0, claims_of(rows)))
            del unknown[digest]
    generation = max([records.generation() or 0, *(record.generation for record in found)]) + 1
    names = _names(found)
    unsound = {record.digest for record in found} - stored

    def enter(index: IndexWriter) -> None:
        for name in names.values():
            facts = name.facts
            index.restore(
                [claim.upload for claim in name.claims],
                name.current,
                pinned=facts.pinned,
                created=facts.created,
                updated=facts.updated,
            )
        for digest in unsound:
            index.mark_corrupt(digest, True)

    new = root / f"{INDEX_FILE}.new"
    for suffix in _SIDE_FILES:
        Path(f"{new}{suffix}").unlink(missing_ok=True)  # of an attempt that was killed
    build_index(new, generation, enter)
    sync(new)
    old_index = _keep_aside(root)
    os.rename(new, root / INDEX_FILE)
    sync(root)
    return Rebuilt(
        names={name: len(entry.claims) for name, entry in names.items()},
        damaged={
            digest: [name for name, entry in names.items() if digest in {one.upload.digest for one in entry.claims}]
            for digest in sorted(unsound)
        },
        doubtful={name: entry.doubt for name, entry in names.items() if entry.doubt is not None},
        unknown=unknown,
        lost=sorted({row.upload.name for row in remains} - names.keys()),
        old_index=old_index,
    )


def _read_all(records: DirectoryRecords, digests: Iterable[str]) -> tuple[list[DirectoryRecord], dict[str, str]]:
    """The records that can be read, and why of each of the other versions it cannot."""
    found, unknown = [], {}
    for digest in digests:
        try:
            record = records.read(digest)
        except ValueError as error:
            unknown[digest] = f"its record is damaged: {error}"
        else:
            if record is None:
                unknown[digest] = "it has no record"
            else:
                found.append(record)
    return found, unknown


def _remains(root: Path, files: VersionFiles) -> list[KeptVersion]:
    """What can still be read of the old index. A copy is read, since SQLite tidies up what it opens."""
    with files.stage() as staging:
        for suffix in _SIDE_FILES[:2]:
            path = root / f"{INDEX_FILE}{suffix}"
            if path.exists():
                shutil.copyfile(path, staging.directory / path.name)
        return read_remains(staging.directory / INDEX_FILE)


def _names(records: Iterable[DirectoryRecord]) -> dict[str, _Name]:
    """What all records say together of each name. Of two that say what it points at, the later one is right."""
    claims = sorted(
        ((record.generation, claim) for record in records for claim in record.claims),
        key=lambda pair: (pair[1].upload.name, pair[1].order),
    )
    found = {}
    for name, pairs in groupby(claims, key=lambda pair: pair[1].upload.name):
        kept = list(pairs)
        pointing = [pair for pair in kept if pair[1].name is not None]
        uploads = [claim.upload for _, claim in kept]
        if pointing:
            _, current = max(pointing, key=lambda pair: pair[0])
            assert current.name is not None
            entry = _Name([claim for _, claim in kept], current.upload.digest, current.name, None)
        else:
            doubt = "the version it pointed at is not there: it points at its newest now, and is not pinned"
            facts = NameFacts(_oldest(uploads), uploads[-1].created, False)
            entry = _Name([claim for _, claim in kept], uploads[-1].digest, facts, doubt)
        found[name] = entry
    return found


def _oldest(uploads: Iterable[UploadRow]) -> int:
    return min(upload.created for upload in uploads)


def _keep_aside(root: Path) -> str | None:
    """Moves the old index into a directory of its own."""
    there = [root / f"{INDEX_FILE}{suffix}" for suffix in _SIDE_FILES]
    if not any(path.exists() for path in there):
        return None
    stem = f"old-index.{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
    aside, number = root / stem, 1
    while aside.exists():
        aside, number = root / f"{stem}-{number}", number + 1
    aside.mkdir()
    for path in reversed(there):  # the index last: without it, no WAL that stays could be read over another one
        if path.exists():
            os.rename(path, aside / path.name)
    sync(aside)
    return aside.name
