"""What a version's directory says of itself, so that an index that is lost can be made anew from the directories.

Each has a file record.json: which names keep the version, with everything that the index knows of that. The index is
what is read in daily use; a record says what the index says of its version, as of the change that wrote it last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, TypeVar

from loramux_adapters.durable_files import sealed, unsealed
from loramux_adapters.store.records import KeptVersion, UploadRow

RECORD_FILE = "record.json"
FORMAT = "loramux version record 1"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class NameFacts:
    """What belongs to a name whatever it points at; times in unix seconds. It stands with the version it points at."""

    created: int
    updated: int
    pinned: bool


@dataclass(frozen=True, slots=True)
class Claim:
    """That a name keeps the version.

    Attributes:
        order: of the versions that a name keeps, the newest has the greatest.
        name: the name points at this version, and this is what belongs to it; None if it points at another.
    """

    upload: UploadRow
    order: int
    name: NameFacts | None

    @classmethod
    def of(cls, row: KeptVersion) -> Claim:
        facts = NameFacts(row.name_created, row.name_updated, row.name_pinned) if row.current else None
        return cls(row.upload, row.order, facts)


@dataclass(frozen=True, slots=True)
class DirectoryRecord:
    """What one directory says.

    Attributes:
        generation: of the change of the store that wrote it.
        unkept: why no name keeps the version any more, where none does: its files wait for their last reader to go.
    """

    digest: str
    generation: int
    claims: tuple[Claim, ...]
    unkept: str | None = None

    def says_the_same(self, rows: Sequence[KeptVersion]) -> bool:
        """Whether these are what the index has for the version."""
        return bool(rows) and self.claims == claims_of(rows)

    def dump(self) -> bytes:
        return sealed({"format": FORMAT, **asdict(self)})


def claims_of(rows: Sequence[KeptVersion]) -> tuple[Claim, ...]:
    """One version's claims, from what the index has for it."""
    return tuple(sorted((Claim.of(row) for row in rows), key=lambda claim: claim.upload.name))


def parse_record(raw: bytes, digest: str) -> DirectoryRecord:
    """What `dump` made, in an older or a later release too: unknown fields are passed over, missing ones by default.

    Raises ValueError for anything else, and for the record of another version than `digest`.
    """
    content = unsealed(raw)
    claims = content.get("claims")
    if content.get("format") != FORMAT or content.get("digest") != digest or not isinstance(claims, list):
        raise ValueError("it is no record of this version")
    parsed = tuple(_parse_claim(claim) for claim in claims)
    if any(claim.upload.digest != digest for claim in parsed):
        raise ValueError("it holds the record of another version")
    return DirectoryRecord(digest, int(content["generation"]), parsed, content.get("unkept"))


def _parse_claim(content: Any) -> Claim:
    if not isinstance(content, dict):
        raise ValueError("it holds no Claim")
    facts = content.get("name")
    upload = _made(UploadRow, content.get("upload"))
    return _made(Claim, content, upload=upload, name=None if facts is None else _made(NameFacts, facts))


def _made(kind: type[T], content: Any, **parts: Any) -> T:
    """An object of a dataclass from what `asdict` made of one, of whichever release."""
    if not isinstance(content, Mapping):
        raise ValueError(f"it holds no {kind.__name__}")
    given: dict[str, Any] = {**content, **parts}
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]  # a dataclass
    missing = [name for name, field in known.items() if name not in given and field.default is MISSING]
    if missing:
        raise ValueError(f"its {kind.__name__} lacks {', '.join(missing)}")
    return kind(**{name: given[name] for name in known if name in given})
