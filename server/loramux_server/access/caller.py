"""Who calls, as every route sees it: for which tenant, and what that caller may do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from loramux_adapters.names import is_tenant
from loramux_server.access.tenant import TenantLimits
from loramux_server.did_you_mean import suggest
from loramux_server.errors import ConfigError

TENANT_FORM = "1 to 63 of a-z 0-9 . _ -, the first a letter or a digit"


class Scope(StrEnum):
    """What a key may be allowed to do."""

    INFER = "infer"  # generate, embed, tokenize
    UPLOAD = "upload"  # publish, roll back, pin, delete and download the adapters of its tenant
    TRAIN = "train"  # publish and download them: what a training run needs
    METRICS = "metrics"  # scrape; only for keys without a tenant, since it shows everybody's
    ADMIN = "admin"  # all of these, and the keys and limits of its tenant; without a tenant, of all


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request.

    Attributes:
        who: for the audit log; never a secret.
        tenant: whose adapters it sees beside the shared ones; None for the operator, who sees all.
        scopes: what it may do.
        limits: what its tenant may take.
    """

    who: str
    tenant: str | None
    scopes: frozenset[Scope]
    limits: TenantLimits = TenantLimits()

    def may(self, wanted: Iterable[Scope]) -> bool:
        """Whether it has one of these scopes. Measurements are of all tenants, so that no tenant's key has them."""
        has = frozenset(Scope) if Scope.ADMIN in self.scopes else self.scopes
        if self.tenant is not None:
            has -= {Scope.METRICS}
        return not has.isdisjoint(wanted)

    @property
    def is_operator(self) -> bool:
        """It belongs to no tenant."""
        return self.tenant is None


def check_tenant(name: str) -> str:
    """The name itself. Raises ConfigError for one that no tenant can have."""
    if not is_tenant(name):
        raise ConfigError(f"a tenant's name is {TENANT_FORM}; not {name[:80]!r}")
    return name


def scopes_of(words: Iterable[str]) -> frozenset[Scope]:
    """Scopes by their names. Raises ConfigError for none at all, and for what is no scope."""
    found = set()
    for word in words:
        try:
            found.add(Scope(word))
        except ValueError:
            raise ConfigError(
                f"there is no scope {word[:80]!r}{suggest(word, list(Scope))}; scopes are {', '.join(Scope)}"
            ) from None
    if not found:
        raise ConfigError(f"a key needs a scope at least, of {', '.join(Scope)}")
    return frozenset(found)
