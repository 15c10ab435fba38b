"""The adapter versions that a request leases while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from loramux_adapters.artifact.own_tokens import OwnTokens
from loramux_adapters.errors import AdapterCorrupt, AdapterError
from loramux_server.access.rates import Seat
from loramux_server.api.completions.request.adapter_defaults import RequestDefaults, own_tokens_of
from loramux_server.api.http.model_names import RequestedAdapter
from loramux_server.api.http.visible_store import VisibleStore
from loramux_server.api.http.worker_threads import run_in_thread, run_in_thread_or_undo
from loramux_server.engine.scheduling.sequence import AdapterUse, composed

if TYPE_CHECKING:
    from loramux_adapters.store.store import Lease

BASE_VERSION = "base"  # what a reply without an adapter says of its version


@dataclass(frozen=True, slots=True)
class AdapterLeases:
    """References on adapter versions, in the request's order, each with the factor of its delta. Empty: the bare base.

    While they are held the versions stay usable, whatever is published or deleted meanwhile.

    Attributes:
        listed: the request named them one by one, in `adapters`; otherwise `model` named the only one.
        store: that they are of, as the caller sees it; None for the bare base.
        defaults: for what the request leaves unsaid.
        own_tokens: that they add to the base's tokenizer; None if they add none.
        seat: what its tenant has of the server meanwhile.
    """

    leases: tuple[tuple[Lease, float], ...] = ()
    listed: bool = False
    store: VisibleStore | None = None
    defaults: RequestDefaults = field(default_factory=RequestDefaults)
    own_tokens: OwnTokens | None = None
    seat: Seat = field(default_factory=Seat.free)

    @classmethod
    async def acquire(
        cls, store: VisibleStore, targets: tuple[RequestedAdapter, ...], known: int, *, listed: bool, seat: Seat
    ) -> AdapterLeases:
        """A reference on every target, or on none of them. The seat ends with them. `known`: tokens that the base has
        embeddings of.

        Raises AdapterNotFound, AdapterCorrupt, BaseMismatch, StoreUnavailable; RequestError: they add different tokens.
        """

        def acquire_all() -> AdapterLeases:
            leases: list[tuple[Lease, float]] = []
            try:
                for target in targets:
                    lease = store.acquire(target.adapter, target.version_prefix, shared=target.hub is not None)
                    leases.append((lease, target.scale))
                defaults = RequestDefaults.of(store, [lease for lease, _ in leases])
                own_tokens = own_tokens_of(store, [lease for lease, scale in leases if scale != 0.0], known)
            except BaseException:
                for lease, _ in leases:
                    lease.release()
                raise
            return cls(tuple(leases), listed, store, defaults, own_tokens, seat)

        return await run_in_thread_or_undo(cls._release, acquire_all) if targets else cls(seat=seat)

    async def release(self) -> None:
        """Gives all of them back, once."""
        self.seat.end()
        if self.leases:
            await run_in_thread(self._release)

    async def require_sound(self) -> None:
        """Raises AdapterCorrupt if the store has found the files of one of them damaged since it was leased."""

        def look(store: VisibleStore) -> None:
            for lease, _ in self.leases:
                try:
                    store.acquire(lease.name, lease.version, shared=True).release()
                except AdapterCorrupt:
                    raise
                except AdapterError:
                    continue  # deleted or replaced meanwhile, which ends no request

        if self.store is not None:
            await run_in_thread(look, self.store)

    @property
    def adapter(self) -> str | None:
        """For logs and metrics: the name, several joined by "+" (which no name holds); None for the base."""
        return "+".join(lease.name for lease, _ in self.leases) or None

    @property
    def version(self) -> str:
        """For the client: the version that answers, or `name@version` of each that was listed."""
        if self.listed:
            return ",".join(
                f"{name}@{lease.version}" for name, (lease, _) in zip(self.names(), self.leases, strict=True)
            )
        return self.leases[0][0].version if self.leases else BASE_VERSION

    def names(self) -> list[str]:
        """Of the adapters, in the request's order, as the caller writes them."""
        return [lease.name if self.store is None else self.store.shown(lease.name) for lease, _ in self.leases]

    def directories(self) -> Iterator[tuple[str, Path]]:
        """Name and files of each version; not to be changed."""
        for name, (lease, _) in zip(self.names(), self.leases, strict=True):
            assert self.store is not None
            yield name, self.store.directory(lease.version)

    def cache_group(self, salt: str | None = None) -> str:
        """Whose keys and values its sequences may share: those of the same tenant and salt. Nobody else learns by a
        quick answer what was asked before.
        """
        tenant = "" if self.seat.tenant is None else f"tenant/{self.seat.tenant}/"
        return tenant if salt is None else f"{tenant}salt/{salt}"

    def uses(self) -> tuple[AdapterUse, ...]:
        """What the engine computes with."""
        return composed(AdapterUse(lease.version, lease.rank, lease.nbytes, scale) for lease, scale in self.leases)

    def _release(self) -> None:
        for lease, _ in self.leases:
            lease.release()
