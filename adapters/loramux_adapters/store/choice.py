"""Which of the versions that a name keeps is meant: by a request, or by a rollback."""

from __future__ import annotations

import re
from collections.abc import Sequence

from loramux_adapters.errors import (
    AdapterCorrupt,
    AdapterNotFound,
    BaseMismatch,
    RollbackImpossible,
)
from loramux_adapters.names import is_name
from loramux_adapters.store.records import KeptVersion

_VERSION_PREFIX = re.compile(r"[0-9a-f]{8,64}")


def unknown(name: str) -> AdapterNotFound:
    """The error for a name that nobody has."""
    return AdapterNotFound(f"there is no adapter {name}" if is_name(name) else "no adapter has this name")


def check_prefix(prefix: str) -> None:
    """Raises `AdapterNotFound` for what is no beginning of a digest."""
    if not _VERSION_PREFIX.fullmatch(prefix):
        raise AdapterNotFound("a version is named by the first 8 to 64 characters of its digest, in lower-case hex")


def chosen(name: str, kept: Sequence[KeptVersion], prefix: str | None) -> KeptVersion:
    """The current version, or the kept one whose digest starts with `prefix`; raises `AdapterNotFound`."""
    if not kept:
        raise unknown(name)
    if prefix is None:
        (current,) = (row for row in kept if row.current)
        return current
    check_prefix(prefix)
    found = [row for row in kept if row.upload.digest.startswith(prefix)]
    if len(found) != 1:
        many = "more than one version" if found else "no version"
        raise AdapterNotFound(f"the adapter {name} keeps {many} whose digest starts with {prefix}")
    return found[0]


def previous(name: str, kept: Sequence[KeptVersion]) -> KeptVersion:
    """The version that was current before the current one; `kept` is newest first.

    Raises `AdapterNotFound`, `RollbackImpossible`.
    """
    if not kept:
        raise unknown(name)
    older = kept[[row.current for row in kept].index(True) + 1 :]
    if not older:
        raise RollbackImpossible(
            f"the adapter {name} keeps no version older than the one it points at; name one that it keeps, or upload it"
        )
    return older[0]


def check_servable(row: KeptVersion, served_base_id: str | None) -> None:
    """Raises `AdapterCorrupt`, or `BaseMismatch` if the version was checked against another base than is served."""
    upload = row.upload
    if row.corrupt:
        raise AdapterCorrupt(f"version {upload.digest[:12]} of the adapter {upload.name} is damaged; upload it again")
    if upload.checked_base is not None and served_base_id is not None and upload.checked_base != served_base_id:
        raise BaseMismatch(upload.checked_base, served_base_id)
