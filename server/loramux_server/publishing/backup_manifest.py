"""What a backup says of itself: names, versions, what points where, and the size of every file that follows."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loramux_adapters.artifact.format import CONFIG_FILE, KNOWN_FILES, WEIGHTS_FILE
from loramux_adapters.artifact.reading.strict_json import is_int, parse_object
from loramux_adapters.store.records import KeptVersion, UploadRow

MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 64 * 2**20
FORMAT = "loramux backup 1"
_DIGEST = re.compile(r"[0-9a-f]{64}")
_LATER_FIELDS = {"adapted_layers", "base_layers", "notes"}  # of a version: older backups lack them


@dataclass(frozen=True, slots=True)
class BackedUpVersion:
    """A version as one name has it. The other facts are those of `UploadRow`."""

    digest: str
    rank: int
    target_modules: str
    base_id: str | None
    checked_base: str | None
    created: int
    fingerprint: str
    adapted_layers: int | None = None
    base_layers: int | None = None
    notes: str = ""


@dataclass(frozen=True, slots=True)
class BackedUpAdapter:
    """`versions`: that the name keeps, oldest first; `current` is the digest of one of them."""

    name: str
    current: str
    pinned: bool
    created: int
    updated: int
    versions: list[BackedUpVersion]


@dataclass(frozen=True, slots=True)
class Manifest:
    """`files`: digest -> file name -> bytes."""

    format: str
    adapters: list[BackedUpAdapter]
    files: dict[str, dict[str, int]]

    @classmethod
    def of(cls, rows: Sequence[KeptVersion], directory: Path) -> Manifest:
        """`rows` by name, newest first, and the files of their versions; damaged versions are left out.

        A name whose current version is damaged points at its newest sound one; a name without one is left out.
        """
        by_name: dict[str, list[KeptVersion]] = {}
        for row in rows:
            if not row.corrupt:
                by_name.setdefault(row.upload.name, []).insert(0, row)
        adapters = [_adapter(name, kept) for name, kept in by_name.items()]
        digests = sorted({version.digest for adapter in adapters for version in adapter.versions})
        files = {
            digest: {path.name: path.stat().st_size for path in sorted((directory / digest).iterdir())}
            for digest in digests
        }
        return cls(FORMAT, adapters, files)

    @property
    def nbytes(self) -> int:
        """Of all files."""
        return sum(size for _, _, size in self.all_files())

    def all_files(self) -> Iterator[tuple[str, str, int]]:
        """Digest, name and size of each."""
        for digest, files in self.files.items():
            for name, size in files.items():
                yield digest, name, size

    def uploads_of(self, adapter: BackedUpAdapter) -> list[UploadRow]:
        """The versions of an adapter as the store's index has them, oldest first."""
        return [
            UploadRow(
                name=adapter.name,
                digest=kept.digest,
                rank=kept.rank,
                target_modules=kept.target_modules,
                nbytes=sum(self.files[kept.digest].values()),
                base_id=kept.base_id,
                checked_base=kept.checked_base,
                created=kept.created,
                fingerprint=kept.fingerprint,
                adapted_layers=kept.adapted_layers,
                base_layers=kept.base_layers,
                notes=kept.notes,
            )
            for kept in adapter.versions
        ]


def _adapter(name: str, kept: Sequence[KeptVersion]) -> BackedUpAdapter:
    current = next((row for row in kept if row.current), kept[-1])
    return BackedUpAdapter(
        name=name,
        current=current.upload.digest,
        pinned=current.name_pinned,
        created=current.name_created,
        updated=current.name_updated,
        versions=[
            BackedUpVersion(
                digest=row.upload.digest,
                rank=row.upload.rank,
                target_modules=row.upload.target_modules,
                base_id=row.upload.base_id,
                checked_base=row.upload.checked_base,
                created=row.upload.created,
                fingerprint=row.upload.fingerprint,
                adapted_layers=row.upload.adapted_layers,
                base_layers=row.upload.base_layers,
                notes=row.upload.notes,
            )
            for row in kept
        ],
    )


def parse_manifest(raw: bytes) -> Manifest:
    """Raises ValueError for anything that no backup of ours says."""
    value = parse_object(raw, limit=MAX_MANIFEST_BYTES)
    _require(value.keys() == {"format", "adapters", "files"} and value["format"] == FORMAT)
    files: Any = value["files"]
    _require(isinstance(files, dict))
    for digest, sizes in files.items():
        _require(bool(_DIGEST.fullmatch(digest)) and isinstance(sizes, dict))
        _require({CONFIG_FILE, WEIGHTS_FILE} <= sizes.keys() <= set(KNOWN_FILES))
        _require(all(_is_count(size) for size in sizes.values()))
    adapters: Any = value["adapters"]
    _require(isinstance(adapters, list))
    parsed = [_parse_adapter(one, files) for one in adapters]
    _require(len({one.name for one in parsed}) == len(parsed))
    return Manifest(FORMAT, parsed, files)


def _parse_adapter(value: Any, files: dict[str, Any]) -> BackedUpAdapter:
    _require(isinstance(value, dict) and value.keys() == set(BackedUpAdapter.__slots__))
    _require(isinstance(value["name"], str) and isinstance(value["pinned"], bool))
    _require(_is_count(value["created"]) and _is_count(value["updated"]) and isinstance(value["versions"], list))
    versions = [_parse_version(one, files) for one in value["versions"]]
    digests = [one.digest for one in versions]
    _require(len(set(digests)) == len(digests) and value["current"] in digests)
    return BackedUpAdapter(**(value | {"versions": versions}))


def _parse_version(value: Any, files: dict[str, Any]) -> BackedUpVersion:
    _require(isinstance(value, dict))
    fields = set(BackedUpVersion.__slots__)
    _require(fields - _LATER_FIELDS <= value.keys() <= fields)
    _require(all(value.get(key) is None or _is_count(value[key]) for key in ("adapted_layers", "base_layers")))
    _require(isinstance(value.get("notes", ""), str))
    _require(isinstance(value["digest"], str) and value["digest"] in files)
    _require(isinstance(value["fingerprint"], str))
    _require(isinstance(value["target_modules"], str) and _is_count(value["created"]))
    _require(is_int(value["rank"]) and 1 <= value["rank"] <= 2**20)
    _require(all(value[key] is None or isinstance(value[key], str) for key in ("base_id", "checked_base")))
    return BackedUpVersion(**value)


def _is_count(value: object) -> bool:
    return is_int(value) and isinstance(value, int) and 0 <= value < 2**62


def _require(holds: bool) -> None:
    if not holds:
        raise ValueError("its manifest is not one of this format")
