"""The adapter versions that a request leases while it runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from loramux_adapters.artifact.own_tokens import OwnTokens
from loramux_adapters.errors import AdapterCorrupt, AdapterError
from loramux_server.api.completions.request.adapter_defaults import RequestDefaults, own_tokens_of
from loramux_server.api.http.dependencies import StoreLike
from loramux_server.api.http.model_names import RequestedAdapter
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
        store: that they are of; None for the bare base.
        defaults: for what the request leaves unsaid.
        own_tokens: that they add to the base's tokenizer; None if they add none.
    """

    leases: tuple[tuple[Lease, float], ...] = ()
    listed: bool = False
    store: StoreLike | None = None
    defaults: RequestDefaults = field(default_factory=RequestDefaults)
    own_tokens: OwnTokens | None = None

    @classmethod
    async def acquire(
        cls, store: StoreLike, targets: tuple[RequestedAdapter, ...], known: int, *, listed: bool
    ) -> AdapterLeases:
        """A reference on every target, or on none of them. `known`: tokens that the base has embeddings of.

        Raises AdapterNotFound, AdapterCorrupt, BaseMismatch, StoreUnavailable; RequestError: they add different tokens.
        """

        def acquire_all() -> AdapterLeases:
            leases: list[tuple[Lease, float]] = []
            try:
                for target in targets:
                    leases.append((store.acquire(target.adapter, target.version_prefix), target.scale))
                defaults = RequestDefaults.of(store, [lease for lease, _ in leases])
                own_tokens = own_tokens_of(store, [lease for lease, scale in leases if scale != 0.0], known)
            except BaseException:
                for lease, _ in leases:
                    lease.release()
                raise
            return cls(tuple(leases), listed, store, defaults, own_tokens)

        return await run_in_thread_or_undo(cls._release, acquire_all) if targets else cls()

    async def release(self) -> None:
        """Gives all of them back, once."""
        if self.leases:
            await run_in_thread(self._release)

    async def require_sound(self) -> None:
        """Raises AdapterCorrupt if the store has found the files of one of them damaged since it was leased."""

        def look(store: StoreLike) -> None:
            for lease, _ in self.leases:
                try:
                    store.acquire(lease.name, lease.version).release()
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
            return ",".join(f"{lease.name}@{lease.version}" for lease, _ in self.leases)
        return self.leases[0][0].version if self.leases else BASE_VERSION

    def uses(self) -> tuple[AdapterUse, ...]:
        """What the engine computes with."""
        return composed(AdapterUse(lease.version, lease.rank, lease.nbytes, scale) for lease, scale in self.leases)

    def _release(self) -> None:
        for lease, _ in self.leases:
            lease.release()
