"""What an adapter on a hub is called: `owner/name`, or `owner/name@revision`; and which of them may be fetched."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from loramux_adapters.names import is_name

PREFIX = "hub:"  # of a model in a request, and of what `adapters push` is given
STORED_BELOW = "hub"  # first part of the names under which a server keeps what it fetched
HUB_FORM = "owner/name, or owner/name@revision, where the revision is a branch, a tag or a commit"
_PART = "[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_REPOSITORY = re.compile(f"{_PART}/{_PART}")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(?:/[A-Za-z0-9_][A-Za-z0-9._-]*)*")
_MAX_REVISION = 100
_PATTERN = re.compile(r"[A-Za-z0-9._*-]{1,96}/[A-Za-z0-9._*-]{1,96}")


@dataclass(frozen=True, slots=True)
class HubName:
    """A repository and which state of it; no revision is its main branch."""

    repository: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubName:
        """Of a name without `PREFIX`; raises ValueError, which says what is allowed."""
        repository, at, revision = text.partition("@")
        is_fine = bool(_REPOSITORY.fullmatch(repository)) and ".." not in text and "--" not in repository
        if at:
            is_fine = is_fine and len(revision) <= _MAX_REVISION and bool(_REVISION.fullmatch(revision))
        name = cls(repository, revision if at else None)
        if not is_fine or not is_name(name.stored_as):
            raise ValueError(f"an adapter on a hub is named {HUB_FORM}")
        return name

    @property
    def stored_as(self) -> str:
        """The name under which a server keeps it: below one of its own, so that it takes nobody else's place."""
        revision = () if self.revision is None else (self.revision,)
        return "/".join((STORED_BELOW, self.repository, *revision))

    def __str__(self) -> str:
        return self.repository if self.revision is None else f"{self.repository}@{self.revision}"


def is_pattern(text: str) -> bool:
    """Whether this may stand in a list of what may be fetched: owner/name, either with * for any characters."""
    return _PATTERN.fullmatch(text) is not None


def is_allowed(name: HubName, patterns: Iterable[str]) -> bool:
    """A * stands for any characters but a slash."""
    owner, _, rest = name.repository.partition("/")
    return any(
        fnmatchcase(owner, of_owner) and fnmatchcase(rest, of_rest)
        for of_owner, _, of_rest in (pattern.partition("/") for pattern in patterns)
    )
