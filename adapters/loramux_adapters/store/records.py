"""What the store says of adapters and their versions: rows as its index has them, and the records that it hands out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from loramux_adapters.artifact.coverage import LayerCount


@dataclass(frozen=True, slots=True)
class UploadRow:
    """A version as one name got it.

    Attributes:
        target_modules: names joined by commas.
        nbytes: of all files of the version.
        base_id: that the upload named; None if it named none.
        checked_base: that the upload was checked against; None if the store was not told.
        created: unix seconds.
        fingerprint: how the one it came with was replayed; "none" if nobody has.
        adapted_layers, base_layers: how many of how many layers of the base carry weights; None if nobody counted.
        notes: lines that the check had to say of it.
    """

    name: str
    digest: str
    rank: int
    target_modules: str
    nbytes: int
    base_id: str | None
    checked_base: str | None
    created: int
    fingerprint: str = "none"
    adapted_layers: int | None = None
    base_layers: int | None = None
    notes: str = ""

    @property
    def layers(self) -> LayerCount | None:
        if self.adapted_layers is None or self.base_layers is None:
            return None
        return LayerCount(self.adapted_layers, self.base_layers)


@dataclass(frozen=True, slots=True)
class KeptVersion:
    """An upload that its name still keeps.

    Attributes:
        current: the name points at it.
        corrupt: its files were found damaged and are set aside.
        name_created, name_updated: the name's own times, unix seconds.
        name_pinned: the name is to stay in memory.
        order: of the versions that a name keeps, the newest has the greatest.
    """

    upload: UploadRow
    current: bool
    corrupt: bool
    name_created: int
    name_updated: int
    name_pinned: bool
    order: int


@dataclass(frozen=True, slots=True)
class Digests:
    """Versions that some name points at, and versions that some name keeps."""

    current: frozenset[str]
    kept: frozenset[str]


@dataclass(frozen=True, slots=True)
class Published:
    """What a name points at now.

    `outcome`: "unchanged" if it already did; "repaired" if, besides, the version's stored files had been damaged.
    """

    name: str
    version: str
    outcome: Literal["created", "updated", "unchanged", "repaired", "rolled_back"]


@dataclass(frozen=True, slots=True)
class StoreChange:
    """What was changed of a name, durably.

    Attributes:
        action: "published", "rolled back", "deleted", "pinned", "unpinned", "restored".
        version: that it points at now, or did before it was deleted; None where that does not matter.
        outcome: of `Published`, or nothing.
    """

    action: str
    name: str
    version: str | None = None
    outcome: str = ""


@dataclass(frozen=True, slots=True)
class VersionRecord:
    """A version that a name keeps. `created`: when the name got it, unix seconds; `nbytes`: of its files;
    `corrupt`: they were found damaged, and the version cannot be used until it is uploaded again; `fingerprint`: how
    the one it came with was replayed, "none" if nobody has; `layers`: how many carry weights, None if nobody counted;
    `notes`: what the check had to say of it.
    """

    version: str
    rank: int
    target_modules: list[str]
    nbytes: int
    created: int
    base_verified: bool
    corrupt: bool
    fingerprint: str = "none"
    layers: LayerCount | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """A name, the version it points at, and those it keeps.

    Attributes:
        version, rank, target_modules, nbytes, base_verified, corrupt, fingerprint, layers, notes: of the current
            version.
        created, updated: of the name, unix seconds.
        pinned: it is to stay in memory.
        versions: newest first, the current one among them.
        references: leases that are open under this name, on whichever version.
    """

    name: str
    version: str
    rank: int
    target_modules: list[str]
    nbytes: int
    created: int
    updated: int
    base_verified: bool
    corrupt: bool
    pinned: bool
    versions: list[VersionRecord]
    references: int
    fingerprint: str = "none"
    layers: LayerCount | None = None
    notes: list[str] = field(default_factory=list)


def adapter_record(kept: Sequence[KeptVersion], *, served_base_id: str | None, references: int) -> AdapterRecord:
    """The record of one name from the versions it keeps, newest first."""
    versions = [_version_record(row, served_base_id) for row in kept]
    ((current, shown),) = ((row, record) for row, record in zip(kept, versions, strict=True) if row.current)
    return AdapterRecord(
        name=current.upload.name,
        version=shown.version,
        rank=shown.rank,
        target_modules=shown.target_modules,
        nbytes=shown.nbytes,
        created=current.name_created,
        updated=current.name_updated,
        base_verified=shown.base_verified,
        corrupt=shown.corrupt,
        pinned=current.name_pinned,
        versions=versions,
        references=references,
        fingerprint=shown.fingerprint,
        layers=shown.layers,
        notes=shown.notes,
    )


def _version_record(row: KeptVersion, served_base_id: str | None) -> VersionRecord:
    upload = row.upload
    return VersionRecord(
        version=upload.digest,
        rank=upload.rank,
        target_modules=upload.target_modules.split(","),
        nbytes=upload.nbytes,
        created=upload.created,
        base_verified=upload.base_id is not None and upload.base_id == (served_base_id or upload.base_id),
        corrupt=row.corrupt,
        fingerprint=upload.fingerprint,
        layers=upload.layers,
        notes=upload.notes.splitlines(),
    )
