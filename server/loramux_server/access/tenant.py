"""A tenant and what it may take of the server."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from loramux_server.did_you_mean import suggest
from loramux_server.errors import ConfigError

_MOST = 10**12


@dataclass(frozen=True, slots=True)
class TenantLimits:
    """What a tenant may take. None is no limit.

    Attributes:
        requests_per_minute: that are begun.
        tokens_per_minute: of prompts and replies together, also of replies that their client left.
        requests_at_once: that have not ended; a stream counts until its end.
        adapters: names it may have published.
        adapter_mib: of all files of all versions that these keep.
        weight: of its share of the engine beside other tenants': one of weight 2 gets twice what one of 1 gets.
        priority: who waits with a higher one goes before all that wait with lower ones, however long these wait.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    requests_at_once: int | None = None
    adapters: int | None = None
    adapter_mib: int | None = None
    weight: int = 1
    priority: int = 0

    def changed(self, values: dict[str, Any]) -> TenantLimits:
        """With these values in place of its own. Raises ConfigError, which names what is wrong."""
        for name, value in values.items():
            if name not in BOUNDS:
                raise ConfigError(f"there is no limit {name[:80]!r}{suggest(name, list(BOUNDS))}; limits are {_NAMES}")
            least, most = BOUNDS[name]
            if value is None and name in _OPTIONAL:
                continue
            if type(value) is not int or not least <= value <= most:
                none = ", or none" if name in _OPTIONAL else ""
                raise ConfigError(f"{name} is a whole number from {least} to {most}{none}; not {str(value)[:40]}")
        return TenantLimits(**(asdict(self) | values))

    def as_text(self) -> str:
        """For the file."""
        return json.dumps(asdict(self))

    @classmethod
    def of_text(cls, text: str) -> TenantLimits:
        """From the file."""
        return cls(**json.loads(text))


@dataclass(frozen=True, slots=True)
class Tenant:
    """Whose keys and adapters these are. `created`: unix seconds."""

    name: str
    created: int
    limits: TenantLimits

    def told(self) -> dict[str, Any]:
        """As the API and lists show it."""
        return {"id": self.name, "object": "tenant", "created": self.created, **asdict(self.limits)}


BOUNDS = {
    "requests_per_minute": (1, _MOST),
    "tokens_per_minute": (1, _MOST),
    "requests_at_once": (1, _MOST),
    "adapters": (0, _MOST),
    "adapter_mib": (0, _MOST),
    "weight": (1, 100),
    "priority": (-10, 10),
}
_OPTIONAL = frozenset(field.name for field in fields(TenantLimits) if field.default is None)
_NAMES = ", ".join(BOUNDS)
