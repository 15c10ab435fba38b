"""The store's directories: how a version's files come in, stay and go. Knows nothing of names.

<root>/versions/<digest>/   adapter_config.json, adapter_model.safetensors, card.json?, fingerprint.json?, for ever;
                            record.json, which says what names keep the version (`version_record`)
<root>/staging/             uploads on their way in, and versions on their way out
<root>/quarantine/          files that do not belong (`quarantine`)
<root>/lock                 held by the store's owner, the one process that removes what is no longer needed
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from loramux_adapters.artifact.format import KNOWN_FILES, has_digest
from loramux_adapters.artifact.reading.own_files import open_regular
from loramux_adapters.durable_files import sync
from loramux_adapters.errors import AdapterRejected, StoreUnavailable
from loramux_adapters.store.quarantine import Quarantine
from loramux_adapters.store.version_record import RECORD_FILE

logger = logging.getLogger(__name__)

_DIGEST = re.compile(r"[0-9a-f]{64}")
_INCOMING = "incoming-"
_OUTGOING = "outgoing-"
# Of a file that is lost, in contrast to one that cannot be read at this moment (too many open files, say).
_LOST = (errno.ENOENT, errno.EIO, errno.ELOOP, errno.ENOTDIR)


@dataclass(frozen=True, slots=True)
class Staging:
    """A directory for one upload's files, removed when its context ends unless it was published."""

    directory: Path


class VersionFiles:
    """All methods may raise OSError; the caller says what that means. Thread-safe, apart from what `install` says."""

    def __init__(self, root: Path, *, owner: bool) -> None:
        """`owner`: be the one process that collects. Raises `StoreUnavailable` if another one is."""
        self._versions = root / "versions"
        self._staging = root / "staging"
        self._versions.mkdir(parents=True, exist_ok=True)
        self._staging.mkdir(exist_ok=True)
        self.quarantine = Quarantine(root)
        sync(root)
        self._lock = open(root / "lock", "ab")
        self.is_owner = owner
        if owner and not _try_lock(self._lock.fileno()):
            self._lock.close()
            raise StoreUnavailable("another server uses this store; give each its own --adapter-dir")

    def close(self) -> None:
        """Let another process own the store. May be called twice."""
        self._lock.close()

    @contextmanager
    def ownership(self) -> Iterator[bool]:
        """Whether this process owns the store; if nobody does, it does meanwhile."""
        is_guest = not self.is_owner and _try_lock(self._lock.fileno())
        try:
            yield self.is_owner or is_guest
        finally:
            if is_guest:
                fcntl.flock(self._lock, fcntl.LOCK_UN)

    def directory(self, digest: str) -> Path:
        """Where a version's files are, whether or not they are there."""
        assert _DIGEST.fullmatch(digest)
        return self._versions / digest

    @contextmanager
    def stage(self) -> Iterator[Staging]:
        """A fresh directory; its lock tells the next opening that somebody still fills it."""
        directory = self._staging / f"{_INCOMING}{uuid.uuid4().hex}"
        directory.mkdir(mode=0o700)
        lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _try_lock(lock)
            yield Staging(directory)
        finally:
            shutil.rmtree(directory, ignore_errors=True)
            os.close(lock)

    def settle(self, staging: Staging) -> int:
        """Remove what is no part of a version and force the rest to disk; returns its bytes.

        Raises `AdapterRejected` for a part that is not a regular file.
        """
        nbytes = 0
        for path in list(staging.directory.iterdir()):
            if path.name in KNOWN_FILES:
                with open_regular(path) as file:
                    os.fsync(file.fileno())
                    nbytes += os.fstat(file.fileno()).st_size
            elif path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        sync(staging.directory)
        return nbytes

    def exists(self, digest: str) -> bool:
        """Whether anything is where the version's files belong."""
        return self.directory(digest).exists()

    def record_directory(self, digest: str) -> Path | None:
        """Where a version's record is, or belongs: with its files, wherever they are; None if they are gone."""
        places = (self.directory(digest), self.quarantine.damaged(digest))
        return next((directory for directory in places if directory.exists()), None)

    def has_record(self, digest: str) -> bool:
        """Whether there is a record with the version's files."""
        return os.path.exists(self._versions / digest / RECORD_FILE)

    def stored(self) -> set[str]:
        """The digests for which there are files."""
        with os.scandir(self._versions) as entries:
            return {entry.name for entry in entries if _DIGEST.fullmatch(entry.name) and entry.is_dir()}

    def is_broken(self, digest: str) -> bool:
        """Whether the version's files are there but no longer have this digest; reads all of them.

        Raises OSError if that cannot be told now.
        """
        directory = self.directory(digest)
        if not directory.exists():
            return False
        try:
            return not has_digest(directory, digest)
        except (AdapterRejected, OSError) as error:
            cause = error.__cause__ if isinstance(error, AdapterRejected) else error
            if isinstance(cause, OSError) and cause.errno not in _LOST:
                raise cause from None
            return True

    def install(self, staging: Staging, digest: str, *, replace: bool) -> Callable[[], None] | None:
        """Move settled files to where their version belongs; files already there stay unless `replace`: set aside then.

        The record of those that were there is taken over, until the change that this belongs to writes another.
        Returns what takes the move back, None if there was none. To be called with the index's write lock held, as
        nothing else guards two installs of one version.
        """
        target = self.directory(digest)
        is_there = target.exists()
        if is_there and not replace:
            return None
        before = self.record_directory(digest)
        if before is not None and (before / RECORD_FILE).exists():
            shutil.copyfile(before / RECORD_FILE, staging.directory / RECORD_FILE)
            sync(staging.directory / RECORD_FILE)
        if is_there:
            self.quarantine.put_damaged(target, digest, "an upload of the same version found it damaged")

        def undo() -> None:
            os.rename(target, staging.directory)
            if is_there:
                self.quarantine.take_back(digest, target)

        os.rename(staging.directory, target)
        sync(self._versions)
        sync(self._staging)
        return undo

    def withdraw(self, digest: str) -> Path | None:
        """Take a version away from readers at once; returns where its files wait for `erase`, None if it has none."""
        directory = self.directory(digest)
        if not directory.exists():
            return None
        outgoing = self._staging / f"{_OUTGOING}{uuid.uuid4().hex}"
        os.rename(directory, outgoing)
        return outgoing

    def link(self, digest: str, target: Path) -> None:
        """Give a version's files a second name in a new directory: they stay readable if the version goes."""
        target.mkdir()
        for path in self.directory(digest).iterdir():
            if path.name in KNOWN_FILES:
                os.link(path, target / path.name, follow_symlinks=False)

    def erase(self, outgoing: Path) -> None:
        """Free the disk of what was withdrawn; large files take a moment."""
        shutil.rmtree(outgoing)

    def remove_leftovers(self) -> None:
        """Remove staging directories whose process is gone, and what was on its way out; nothing else."""
        for path in list(self._staging.iterdir()):
            if path.name.startswith(_OUTGOING):
                reason = "its removal had begun"
            elif path.name.startswith(_INCOMING) and _is_abandoned(path):
                reason = "an upload that never ended"
            else:
                continue
            shutil.rmtree(path)
            logger.info("%s is removed from the store: %s", path.name, reason)


def _try_lock(descriptor: int) -> bool:
    """Take the lock if nobody has it; it goes when the descriptor is closed or the process ends, however it ends."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_abandoned(staging: Path) -> bool:
    descriptor = os.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return _try_lock(descriptor)
    finally:
        os.close(descriptor)
