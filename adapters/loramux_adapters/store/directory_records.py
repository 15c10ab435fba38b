"""The records of all versions beside the index, and the number of the last change that they hold.

A change of the store goes to disk in this order, under a lock that holds between processes:

1. the records it changes, beside those they will replace, and a new version's files;
2. the index's transaction;
3. the records take their places, those first by which a name is found again;
4. the number of the change is written to the file `generation`;
5. whoever asked for the change is told that it is done.

So a crash before 2 leaves the store as it was, and one after 2 an index whose number is greater than the file's: the
records are then written again from the index, by whoever opens or changes the store next. An index whose number is
less than the file's has lost changes, and is not served.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from loramux_adapters.durable_files import drop_beside, put_in_place, sealed, sync, unsealed, write_beside
from loramux_adapters.errors import StoreUnavailable
from loramux_adapters.store.files import VersionFiles
from loramux_adapters.store.records import KeptVersion
from loramux_adapters.store.version_record import RECORD_FILE, DirectoryRecord, claims_of, parse_record

GENERATION_FILE = "generation"
_POLL_SECONDS = 0.01
_GENERATION_BYTES = 256  # more than it takes
MANY = 64  # from so many on, records are forced to disk together rather than one by one


@dataclass(frozen=True, slots=True)
class Change:
    """The records that one transaction changes, in the order in which they take their places."""

    generation: int
    records: Sequence[DirectoryRecord]


class DirectoryRecords:
    """May raise OSError. All but `locked` and `read` are to be called with the lock held."""

    def __init__(self, root: Path, files: VersionFiles) -> None:
        self._files = files
        self._generation_file = root / GENERATION_FILE
        self._lock = open(root / "changes.lock", "ab")

    def close(self) -> None:
        self._lock.close()

    @contextmanager
    def locked(self, timeout: float) -> Iterator[None]:
        """No other process changes the store meanwhile; nor must another thread that uses this object.

        Raises `StoreUnavailable` if another process holds the lock for so many seconds.
        """
        deadline = time.monotonic() + timeout
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise StoreUnavailable("another process keeps the adapter store locked") from None
                time.sleep(_POLL_SECONDS)
        try:
            yield
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_UN)

    def generation(self) -> int | None:
        """The number of the last change that all records hold; None if that is not known."""
        try:
            number = unsealed(self._generation_file.read_bytes())["generation"]
        except (FileNotFoundError, KeyError, ValueError):
            return None
        return number if isinstance(number, int) else None

    def read(self, digest: str) -> DirectoryRecord | None:
        """What the version's directory says of itself; None if it has no record. Raises ValueError if it is damaged."""
        directory = self._files.record_directory(digest)
        try:
            return None if directory is None else parse_record((directory / RECORD_FILE).read_bytes(), digest)
        except FileNotFoundError:
            return None
        except IsADirectoryError as error:
            raise ValueError("it is a directory") from error

    def newest(self, digests: Collection[str]) -> int:
        """The greatest number that any record has; 0 if none can be read."""
        newest = 0
        for digest in digests:
            with suppress(ValueError):
                record = self.read(digest)
                newest = max(newest, record.generation if record is not None else 0)
        return newest

    def prepare(self, change: Change) -> None:
        """Step 1."""
        for path, record in self._paths(change):
            write_beside(path, record.dump())

    def drop(self, change: Change) -> None:
        """Instead of `enter`, for a transaction that was rolled back."""
        for path, _ in self._paths(change):
            drop_beside(path)

    def enter(self, change: Change) -> None:
        """Steps 3 and 4."""
        for path, _ in self._paths(change):
            put_in_place(path)
        self._write_generation(change.generation)

    def complete(self, generation: int, kept: Mapping[str, Sequence[KeptVersion]]) -> int:
        """Make the records say what the index says; returns how many did not. `kept`: all rows, by digest."""
        stale = [digest for digest, rows in kept.items() if not self._is_as(digest, rows)]
        change = Change(
            generation, [DirectoryRecord(digest, generation, claims_of(kept[digest])) for digest in sorted(stale)]
        )
        if len(stale) < MANY:
            self.prepare(change)
            self.enter(change)
        else:
            for path, record in self._paths(change):
                beside = path.with_name(f".{path.name}.many")
                beside.write_bytes(record.dump())
                os.replace(beside, path)
            os.sync()
            self._write_generation(generation)
        return len(stale)

    def _is_as(self, digest: str, rows: Sequence[KeptVersion]) -> bool:
        if self._files.record_directory(digest) is None:
            return True  # its files are gone, and nothing is left to say it
        try:
            record = self.read(digest)
        except ValueError:
            return False
        return record is not None and record.says_the_same(rows)

    def _paths(self, change: Change) -> Iterator[tuple[Path, DirectoryRecord]]:
        for record in change.records:
            directory = self._files.record_directory(record.digest)
            if directory is not None:  # None: the version's files are gone
                yield directory / RECORD_FILE, record

    def _write_generation(self, generation: int) -> None:
        """In place, as it is done with each change: a file that was cut short is as good as none (see `generation`)."""
        is_new = not self._generation_file.exists()
        descriptor = os.open(self._generation_file, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.write(descriptor, sealed({"generation": generation}).ljust(_GENERATION_BYTES))
            os.ftruncate(descriptor, _GENERATION_BYTES)  # it may have been damaged, and longer
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if is_new:
            sync(self._generation_file.parent)
