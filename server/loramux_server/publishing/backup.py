"""A whole adapter store in one tar.gz, and back.

manifest.json                      names, versions, what points where, sizes of all files; always the first member
versions/<digest>/<file>           each version's files once, cards and fingerprints among them

Both directions work on the store's directory, also beside a server that runs on it: a backup is one moment's state,
and a restored adapter is served from the next request on.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, BinaryIO, cast

from loramux_adapters.artifact.tar_reader import TarRefused, tar_files
from loramux_adapters.errors import AdapterError
from loramux_adapters.store.records import KeptVersion
from loramux_adapters.store.snapshot import AdapterCopy
from loramux_adapters.store.store import AdapterStore
from loramux_server.errors import CommandFailed
from loramux_server.publishing.backup_manifest import MANIFEST, MAX_MANIFEST_BYTES, Manifest, parse_manifest

_LEVEL = 1  # weights hardly shrink
_COPY = 2**20
_MAX_RATIO = 100  # of what comes out to what is read; weights of an adapter that was trained stay far below
_MAX_ENTRIES = 2**20


@dataclass(slots=True)
class BackupOutcome:
    """What became of the adapters of a backup, by name. `refused` says why."""

    done: list[str] = field(default_factory=list)
    there_already: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)


def write_backup(store: AdapterStore, target: Path) -> BackupOutcome:
    """Write all adapters to a new file; versions that are damaged are left out and said to be `refused`.

    Raises CommandFailed, StoreUnavailable; then there is no file.
    """
    if target.exists():
        raise CommandFailed(f"{target} exists; name a new file")
    part = target.with_name(target.name + ".part")
    try:
        with store.snapshot() as (directory, rows), part.open("xb") as file:
            manifest = Manifest.of(rows, directory)
            with gzip.GzipFile(fileobj=file, mode="wb", compresslevel=_LEVEL) as zipped:
                _write_tar(cast(BinaryIO, zipped), manifest, directory)
            file.flush()
            os.fsync(file.fileno())
        os.rename(part, target)
    except OSError as error:
        raise CommandFailed(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)
    return BackupOutcome(done=[adapter.name for adapter in manifest.adapters], refused=_damaged(rows))


def _damaged(rows: Sequence[KeptVersion]) -> dict[str, str]:
    return {
        f"{row.upload.name}@{row.upload.digest[:12]}": "its stored files are damaged" for row in rows if row.corrupt
    }


def _write_tar(out: BinaryIO, manifest: Manifest, directory: Path) -> None:
    with tarfile.open(fileobj=out, mode="w|", format=tarfile.USTAR_FORMAT) as tar:
        text = json.dumps(asdict(manifest), indent=1).encode()
        entry = tarfile.TarInfo(MANIFEST)
        entry.size = len(text)
        tar.addfile(entry, io.BytesIO(text))
        for digest, files in manifest.files.items():
            for name, size in files.items():
                with (directory / digest / name).open("rb") as file:
                    entry = tarfile.TarInfo(f"versions/{digest}/{name}")
                    entry.size = size
                    tar.addfile(entry, file)


def restore_backup(store: AdapterStore, source: Path, *, replace: bool) -> BackupOutcome:
    """Enter the adapters of a backup into a store, each one whole or not at all.

    A name that the store has stays as it is, unless `replace`: then it becomes what it is in the backup. An adapter
    whose files are not what the manifest says is refused, and the others are restored.
    Raises CommandFailed for a file that is damaged or no backup, StoreUnavailable; then nothing was restored.
    """
    outcome = BackupOutcome()
    with store.stage() as staging, _unpacked(source, staging.directory) as manifest:
        for adapter in manifest.adapters:
            copy = AdapterCopy(
                name=adapter.name,
                uploads=manifest.uploads_of(adapter),
                files={
                    kept.digest: staging.directory / kept.digest
                    for kept in adapter.versions
                    if (staging.directory / kept.digest).exists()  # or it came in with another adapter
                },
                current=adapter.current,
                pinned=adapter.pinned,
                created=adapter.created,
                updated=adapter.updated,
            )
            try:
                is_done = store.restore(copy, replace=replace)
            except AdapterError as error:
                outcome.refused[adapter.name] = str(error)
            else:
                (outcome.done if is_done else outcome.there_already).append(adapter.name)
    return outcome


@contextmanager
def _unpacked(source: Path, target: Path) -> Iterator[Manifest]:
    """The backup's files below `target`, in a directory for each version."""
    try:
        with source.open("rb") as file:
            manifest = _unpack(file, target)
    except OSError as error:
        if isinstance(error, gzip.BadGzipFile):
            raise CommandFailed(f"{source} is damaged, or no backup: {error}") from error
        raise CommandFailed(f"cannot read {source}: {error.strerror or error}") from error
    except (TarRefused, EOFError, zlib.error, ValueError) as error:
        raise CommandFailed(f"{source} is damaged, or no backup: {error}") from error
    yield manifest


def _unpack(file: IO[bytes], target: Path) -> Manifest:
    with gzip.GzipFile(fileobj=file, mode="rb") as zipped:
        stream = _UnpackedStream(cast(BinaryIO, zipped), file)
        members = tar_files(cast(BinaryIO, stream), max_entries=_MAX_ENTRIES)
        first = next(members, None)
        if first is None or first.name != MANIFEST or first.size > MAX_MANIFEST_BYTES:
            raise TarRefused("it does not begin with a manifest")
        manifest = parse_manifest(stream.exactly(first.size))
        room = shutil.disk_usage(target).free
        if manifest.nbytes > room:
            raise CommandFailed(f"the backup holds {manifest.nbytes} bytes and the disk has room for {room}")
        missing = {f"versions/{digest}/{name}": size for digest, name, size in manifest.all_files()}
        for member in members:
            if missing.pop(member.name, None) != member.size:
                raise TarRefused("it holds a file that its manifest does not name, or of another size, or twice")
            _, digest, name = member.name.split("/")
            (target / digest).mkdir(exist_ok=True)
            with (target / digest / name).open("xb") as copy:
                left = member.size
                while left:
                    data = stream.exactly(min(left, _COPY))
                    copy.write(data)
                    left -= len(data)
        if missing:
            raise TarRefused("files are missing that its manifest names")
    return manifest


class _UnpackedStream:
    """What comes out of a compressed file, as long as it is in proportion to what went in."""

    def __init__(self, zipped: BinaryIO, raw: IO[bytes]) -> None:
        self._zipped, self._raw = zipped, raw
        self._position = 0

    def read(self, size: int) -> bytes:
        data = self._zipped.read(size)
        self._position += len(data)
        if self._position > _MAX_RATIO * (self._raw.tell() + 2**16):
            raise TarRefused("it unpacks to far more than weights would")
        return data

    def exactly(self, size: int) -> bytes:
        data = self.read(size)
        while len(data) < size:
            more = self.read(size - len(data))
            if not more:
                raise EOFError("it ends in the middle")
            data += more
        return data

    def tell(self) -> int:
        return self._position


def describe(outcome: BackupOutcome, verb: str) -> Iterator[str]:
    """Lines that tell an operator what happened; `verb` is what was done with the adapters that went well."""
    yield f"{len(outcome.done)} adapters {verb}"
    if outcome.there_already:
        yield f"left as they are, since the store has them (--replace changes that): {', '.join(outcome.there_already)}"
    for name, reason in outcome.refused.items():
        yield f"not {verb}: {name}: {reason}"
