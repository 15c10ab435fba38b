"""The adapters of one request: which versions they are, and the references that keep them usable until it ends."""

from __future__ import annotations

from dataclasses import dataclass

from loramux_server.api.http.model_names import Target
from loramux_server.api.http.ports import LeasePort, StorePort
from loramux_server.api.http.worker_threads import offload, offload_or_undo
from loramux_server.engine.sequence import AdapterUse, composed

BASE_VERSION = "base"  # what a reply without an adapter says of its version


@dataclass(frozen=True, slots=True)
class Leases:
    """References in the request's order, each with the factor of its delta. None of them: the bare base.

    Attributes:
        listed: the request named them one by one, in `adapters`; otherwise `model` named the only one.
    """

    leases: tuple[tuple[LeasePort, float], ...] = ()
    listed: bool = False

    @classmethod
    async def acquire(cls, store: StorePort, targets: tuple[Target, ...], *, listed: bool) -> Leases:
        """A reference on every target, or on none of them.

        Raises AdapterNotFound, BaseMismatch, StoreUnavailable.
        """

        def acquire_all() -> Leases:
            leases: list[tuple[LeasePort, float]] = []
            try:
                for target in targets:
                    leases.append((store.acquire(target.adapter, target.version_prefix), target.scale))
            except BaseException:
                for lease, _ in leases:
                    lease.release()
                raise
            return cls(tuple(leases), listed)

        return await offload_or_undo(cls._release, acquire_all) if targets else cls()

    async def release(self) -> None:
        """Gives all of them back, once."""
        if self.leases:
            await offload(self._release)

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
