"""The store's index: which names there are, and which versions each has had. One SQLite file, any number of processes.

WAL, so that a lookup never waits for a write; synchronous=FULL, so that what was committed survives a power cut. The
WAL is emptied after each change, so that an old one is never read over a newer index.
"""

from __future__ import annotations

import logging
import shlex
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from loramux_adapters.errors import IndexLost, StoreUnavailable
from loramux_adapters.store.directory_records import MANY, Change, DirectoryRecords
from loramux_adapters.store.files import VersionFiles
from loramux_adapters.store.index_file import (
    FIRST_WITH_STATE,
    INDEX_FILE,
    SCHEMA_VERSION,
    IndexFault,
    check_pages,
    connect,
    content_of,
    is_damage,
    kept_by_digest,
    kept_rows,
    migrate,
    read_state,
)
from loramux_adapters.store.index_writer import IndexWriter
from loramux_adapters.store.records import Digests, KeptVersion

logger = logging.getLogger(__name__)


@contextmanager
def storage_errors(doing: str) -> Iterator[None]:
    """Turn what the disk and SQLite raise into `StoreUnavailable`, which names no path."""
    try:
        yield
    except OSError as error:
        raise StoreUnavailable(
            f"the adapter store failed while {doing}: {error.strerror or type(error).__name__}"
        ) from error
    except sqlite3.Error as error:
        raise StoreUnavailable(f"the adapter store failed while {doing}: {error}") from error


class StoreIndex:
    """Reads share one connection under a short lock; writes have their own, and one change runs at a time."""

    def __init__(self, root: Path, files: VersionFiles, *, busy_timeout: float) -> None:
        """Open or create the index, and see that it is whole. `busy_timeout`: seconds to wait for another's change.

        Raises `IndexLost` if it is not, and `StoreUnavailable` if it cannot be used now; then nothing was changed.
        """
        self._root = root
        self._files = files
        self._busy_timeout = busy_timeout
        self._read_lock = threading.Lock()
        self._write_lock = threading.Lock()
        self.records = DirectoryRecords(root, files)
        try:
            with storage_errors("opening its index"), self.records.locked(busy_timeout), self._faults():
                self._refuse_if_gone()
                self._writer = connect(root / INDEX_FILE, busy_timeout)
                try:
                    self._catch_up(wholly=self._prepare())
                    self._reader = connect(root / INDEX_FILE, busy_timeout)
                except BaseException:
                    self._writer.close()
                    raise
        except BaseException:
            self.records.close()
            raise

    def close(self) -> None:
        with self._write_lock, self._read_lock:
            self._reader.close()
            self._writer.close()
            self.records.close()

    @contextmanager
    def write(self) -> Iterator[IndexWriter]:
        """One change: all of the block is on disk when this ends, index and records, or, if it raises, none of it.

        The write lock is held from the start, against other processes too. `directory_records` says what happens in
        which order.
        """
        with self._write_lock, self.records.locked(self._busy_timeout):
            with self._faults():
                self._catch_up()
            self._writer.execute("BEGIN IMMEDIATE")
            writer, change = IndexWriter(self._writer), None
            try:
                yield writer
                change = writer.settle()
                if change is not None:
                    self.records.prepare(change)
                self._writer.execute("COMMIT")
            except BaseException:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                    self._take_back(writer, change)
                raise
            if change is not None:
                self.records.enter(change)
                with suppress(sqlite3.Error):  # it is made; the WAL is emptied after the next one, then
                    self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def kept(self, name: str) -> list[KeptVersion]:
        """The versions the name keeps, newest first; empty for an unknown name."""
        return self._select("WHERE h.name = ? ORDER BY h.id DESC", (name,))

    def all_kept(self, *, pinned: bool = False) -> list[KeptVersion]:
        """The versions of all names, or of pinned names alone, by name, newest first."""
        return self._select(("WHERE a.pinned " if pinned else "") + "ORDER BY h.name, h.id DESC", ())

    def digests(self) -> Digests:
        """All versions, as of one moment."""
        with self._read_lock:
            rows = self._reader.execute(
                "SELECT digest, digest IN (SELECT digest FROM adapters) FROM versions"
            ).fetchall()
        return Digests(
            frozenset(digest for digest, current in rows if current), frozenset(digest for digest, _ in rows)
        )

    def change_mark(self) -> int:
        """A number that is another one after any commit, in this process or in another."""
        with self._read_lock:
            (mark,) = self._reader.execute("PRAGMA data_version").fetchone()
        return int(mark)

    def check_integrity(self) -> None:
        """Assert what must hold between changes: the sum is that of what is read, and the records say the same."""
        with self.write():
            check_pages(self._writer)
            assert read_state(self._writer)[:2] == (self.records.generation(), content_of(self._writer))
            for digest, rows in kept_by_digest(self._writer).items():
                record = self.records.read(digest)
                assert record.says_the_same(rows) if record else self._files.record_directory(digest) is None

    def _select(self, rest: str, values: tuple[str, ...]) -> list[KeptVersion]:
        with self._read_lock:
            return kept_rows(self._reader, rest, values)

    def _take_back(self, writer: IndexWriter, change: Change | None) -> None:
        """After a transaction that was rolled back; what cannot be taken back now is set aside by the next opening."""
        try:
            if change is not None:
                self.records.drop(change)
            writer.undo()
        except OSError as error:
            logger.warning("what a change that failed had put into the store stays there for now: %s", error.strerror)

    def _refuse_if_gone(self) -> None:
        """An index that is not there is made, but not beside versions."""
        path = self._root / INDEX_FILE
        if (not path.exists() or path.stat().st_size == 0) and self._files.stored():
            raise IndexFault("it is empty" if path.exists() else "it is not there")

    def _prepare(self) -> bool:
        """Bring the index to this release's schema, and see that it is whole; returns whether it was of another."""
        check_pages(self._writer)
        (found,) = self._writer.execute("PRAGMA user_version").fetchone()
        if found > SCHEMA_VERSION:
            raise StoreUnavailable(
                f"the adapter store has schema {found} and this release reads up to {SCHEMA_VERSION}:"
                " use the release that wrote it"
            )
        if found < SCHEMA_VERSION:
            with self._files.ownership() as is_owner:
                if not is_owner:
                    raise StoreUnavailable(
                        "the server that runs on this store is of an older release: start it anew with this one first"
                    )
                if found == 0 and self._files.stored():
                    raise IndexFault("it holds nothing")
                has_state = found >= FIRST_WITH_STATE
                generation = read_state(self._writer).generation if has_state else self.records.generation() or 0
                migrate(self._writer, found, generation)
        elif read_state(self._writer).content != content_of(self._writer):
            raise IndexFault("it is damaged (what it says is not what was written)")
        return bool(found < SCHEMA_VERSION)

    def _catch_up(self, *, wholly: bool = False) -> None:
        """See that index and records are of one generation; records that a crash kept from that are written now.

        `wholly`: look at every record.
        """
        written, (generation, _, last_records) = self.records.generation(), read_state(self._writer)
        if written == generation and not wholly:
            return
        newest = self.records.newest(self._files.stored()) if written is None else written
        if newest > generation:
            raise IndexFault(f"it lacks the last {newest - generation} changes that were made")
        if written == generation - 1 and len(last_records) < MANY and not wholly:
            last = IndexWriter(self._writer).last_change()
            self.records.prepare(last)
            self.records.enter(last)
        else:
            self.records.complete(generation, kept_by_digest(self._writer))

    @contextmanager
    def _faults(self) -> Iterator[None]:
        """What shows that the index is lost, as `IndexLost`."""
        try:
            yield
        except (IndexFault, UnicodeError, sqlite3.Error) as error:  # SQLite quotes what it finds in the file
            if isinstance(error, sqlite3.Error) and not is_damage(error, self._root / INDEX_FILE):
                raise
            fault = str(error) if isinstance(error, IndexFault) else f"it is damaged ({error})"
            raise IndexLost(fault, len(self._files.stored()), shlex.quote(str(self._root))) from error
