"""The adapter store as one caller sees it: a tenant's own adapters and the shared ones, and nobody else's.

A tenant names its adapters as it likes; they are kept as `tenant~name`, and one of its own goes before a shared one of
the same name. So another's adapter cannot be named at all: it is looked for as one that nobody has.
The operator sees all of them as they are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from loramux_adapters.errors import AdapterNotFound
from loramux_adapters.names import TENANT_MARK, of_tenant, tenant_of
from loramux_server.access.tenant import TenantLimits
from loramux_server.api.http.errors import NotAllowed
from loramux_server.errors import QuotaExceeded

if TYPE_CHECKING:
    from loramux_adapters.store.store import AdapterRecord, Lease, Published, Staging
    from loramux_server.api.http.dependencies import StoreLike

Found = TypeVar("Found")
MIB = 2**20


@dataclass(frozen=True, slots=True)
class VisibleStore:
    """Names that come in and go out are the caller's. Raises what the store raises.

    Attributes:
        tenant: whose view it is; None is the operator's.
    """

    store: StoreLike
    tenant: str | None = None

    def acquire(self, name: str, version_prefix: str | None = None, *, shared: bool = False) -> Lease:
        """`shared`: not the tenant's own of that name. A lease names what the store does."""
        if shared:
            return self.store.acquire(name, version_prefix)
        return self._first(name, lambda kept: self.store.acquire(kept, version_prefix))

    def record(self, name: str) -> AdapterRecord:
        return self._shown(self._first(name, self.store.record))

    def records(self) -> list[AdapterRecord]:
        """By name."""
        records = self.store.records()
        if self.tenant is None:
            return list(records)
        seen = {record.name: record for record in records if tenant_of(record.name) is None}
        seen |= {
            self.shown(record.name): self._shown(record) for record in records if tenant_of(record.name) == self.tenant
        }
        return [seen[name] for name in sorted(seen)]

    def delete(self, name: str) -> str:
        """The name that the store knew it by."""
        self.store.delete(kept := self.own(name))
        return kept

    def rollback(self, name: str, version_prefix: str | None = None) -> Published:
        return self.store.rollback(self.own(name), version_prefix)

    def directory(self, version: str) -> Path:
        """Where a version's files are, for reading while it is leased."""
        return self.store.directory(version)

    def stage(self) -> AbstractContextManager[Staging]:
        return self.store.stage()

    def kept_as(self, name: str) -> str:
        """What the store calls an adapter that this caller publishes under the name. Raises AdapterNotFound."""
        if self.tenant is None:
            return name
        if TENANT_MARK in name:
            raise _unknown()
        return of_tenant(self.tenant, name)

    def require_room(self, name: str, limits: TenantLimits, nbytes: int = 0) -> None:
        """Raises QuotaExceeded if the tenant may not publish so many bytes under this name besides what it keeps."""
        if self.tenant is None or (limits.adapters is None and limits.adapter_mib is None):
            return
        own = [record for record in self.store.records() if tenant_of(record.name) == self.tenant]
        others = sum(record.name != self.kept_as(name) for record in own)
        if limits.adapters is not None and others >= limits.adapters:
            raise QuotaExceeded(
                f"this tenant may have {limits.adapters} adapters and has {others} besides this one; delete one first"
            )
        kept = sum(version.nbytes for record in own for version in record.versions)
        if limits.adapter_mib is not None and kept + nbytes > limits.adapter_mib * MIB:
            raise QuotaExceeded(
                f"this tenant may keep {limits.adapter_mib} MiB of adapters, all versions counted, and keeps "
                f"{kept / MIB:.1f}; this one has {nbytes / MIB:.1f}: delete one first"
            )

    def own(self, name: str) -> str:
        """What the store calls an adapter that this caller may change.

        Raises AdapterNotFound, and NotAllowed for one that it shares with others.
        """
        kept = self.kept_as(name)
        try:
            self.store.record(kept)
        except AdapterNotFound:
            if self.tenant is not None:
                self.store.record(name)
                raise NotAllowed(f"the adapter {name} is shared: only the operator changes it") from None
            raise
        return kept

    def shown(self, kept: str) -> str:
        """An adapter's name as this caller writes it."""
        return kept if self.tenant is None else kept.rpartition(TENANT_MARK)[2]

    def _first(self, name: str, found: Callable[[str], Found]) -> Found:
        """The tenant's own, else the shared one."""
        kept = self.kept_as(name)
        try:
            return found(kept)
        except AdapterNotFound:
            if self.tenant is None or self._exists(kept):
                raise
        return found(name)

    def _exists(self, kept: str) -> bool:
        try:
            self.store.record(kept)
        except AdapterNotFound:
            return False
        return True

    def _shown(self, record: AdapterRecord) -> AdapterRecord:
        return record if self.tenant is None else replace(record, name=self.shown(record.name))


def _unknown() -> AdapterNotFound:
    """As of a name that no adapter can have: a tenant writes no prefix, not even its own."""
    return AdapterNotFound("no adapter has this name")
