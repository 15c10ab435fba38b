"""Requests and tokens a minute, and requests at once, counted by tenant.

A minute begins with the first that is counted, and ends 60 seconds later with everything forgotten (a fixed window of
the library `limits`), so that when to come back is known to the second. Tokens of a prompt are counted when its request
begins, those of a reply as they come: what a reply takes beyond the limit holds back the next request, never itself.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import dataclass

from limits import RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import FixedWindowRateLimiter

from loramux_server.access.caller import Caller
from loramux_server.access.tenant import TenantLimits
from loramux_server.errors import RateLimited

_MINUTE = RateLimitItemPerMinute(10**15)  # one count for each tenant, whatever its limit is and becomes


@dataclass(frozen=True, slots=True)
class Remaining:
    """What is left of a limit: so many, and all of them again in `seconds`."""

    limit: int
    left: int
    seconds: float


class Rates:
    """Owner: the event loop."""

    def __init__(self) -> None:
        self._limiter = FixedWindowRateLimiter(MemoryStorage())
        self._running: Counter[str] = Counter()

    async def begin(self, caller: Caller) -> Seat:
        """A request begins. Raises RateLimited, and then nothing was counted."""
        tenant, limits = caller.tenant, caller.limits
        if tenant is None:
            return Seat.free()
        at_once = limits.requests_at_once
        if at_once is not None and self._running[tenant] >= at_once:
            raise RateLimited(
                f"{at_once} requests of this tenant are running, which is its limit; try again when one has ended",
                kind="requests",
            )
        self._running[tenant] += 1
        seat = Seat(self, tenant, limits)
        try:
            await self._take(tenant, "tokens", limits.tokens_per_minute, 1, counted=False)
            await self._take(tenant, "requests", limits.requests_per_minute, 1)
        except BaseException:
            seat.end()
            raise
        return seat

    def leave(self, tenant: str) -> None:
        """One of its requests is over."""
        self._running[tenant] -= 1
        if not self._running[tenant]:
            del self._running[tenant]

    async def read(self, tenant: str, limits: TenantLimits, tokens: int) -> None:
        """Raises RateLimited, and then they are not counted."""
        await self._take(tenant, "tokens", limits.tokens_per_minute, tokens)

    async def write(self, tenant: str, limits: TenantLimits, tokens: int) -> None:
        """Counted, whether or not there were so many left."""
        if limits.tokens_per_minute is not None and tokens:
            await self._limiter.hit(_MINUTE, tenant, "tokens", cost=tokens)

    async def remaining(self, tenant: str, limits: TenantLimits) -> dict[str, Remaining]:
        """Of the limits that there are: `requests`, `tokens`."""
        found = {}
        for kind, limit in (("requests", limits.requests_per_minute), ("tokens", limits.tokens_per_minute)):
            if limit is not None:
                found[kind] = await self._left(tenant, kind, limit)
        return found

    async def _take(self, tenant: str, kind: str, limit: int | None, cost: int, *, counted: bool = True) -> None:
        """Raises RateLimited."""
        if limit is None:
            return
        if cost > limit:
            raise RateLimited(
                f"the request has {cost} {kind}, and this tenant has {limit} a minute; send less", kind=kind
            )
        now = await self._left(tenant, kind, limit)
        if cost > now.left:
            seconds = max(1, math.ceil(now.seconds))
            raise RateLimited(
                f"this tenant has {limit} {kind} a minute and {now.left} of them are left; "
                f"all are there again in {seconds} s",
                kind=kind,
                retry_after=seconds,
            )
        if counted:
            await self._limiter.hit(_MINUTE, tenant, kind, cost=cost)

    async def _left(self, tenant: str, kind: str, limit: int) -> Remaining:
        stats = await self._limiter.get_window_stats(_MINUTE, tenant, kind)
        used = _MINUTE.amount - stats.remaining
        return Remaining(limit, max(0, limit - used), max(0.0, stats.reset_time - time.time()))


class Seat:
    """What a request's tenant has of the server until the request is over. The operator's counts nothing."""

    def __init__(self, rates: Rates | None, tenant: str | None, limits: TenantLimits) -> None:
        """`tenant`: None is the operator."""
        self.tenant, self.limits = tenant, limits
        self._rates = rates
        self._is_over = False

    @classmethod
    def free(cls) -> Seat:
        """One that nothing is counted for."""
        return cls(None, None, TenantLimits())

    async def read(self, tokens: int) -> None:
        """The request brings a prompt of so many tokens. Raises RateLimited, and then they are not counted."""
        if self._rates is not None and self.tenant is not None:
            await self._rates.read(self.tenant, self.limits, tokens)

    async def write(self, tokens: int) -> int:
        """A reply has got so many more. Returns how many are to be counted yet: none."""
        if self._rates is not None and self.tenant is not None:
            await self._rates.write(self.tenant, self.limits, tokens)
        return 0

    async def remaining(self) -> dict[str, Remaining]:
        """Of the limits that its tenant has: `requests`, `tokens`."""
        if self._rates is None or self.tenant is None:
            return {}
        return await self._rates.remaining(self.tenant, self.limits)

    def end(self) -> None:
        """The request is over, however it ended. A second call does nothing."""
        if not self._is_over and self._rates is not None and self.tenant is not None:
            self._rates.leave(self.tenant)
        self._is_over = True


def rate_headers(remaining: dict[str, Remaining]) -> dict[str, str]:
    """As OpenAI sends them."""
    headers = {}
    for kind, one in remaining.items():
        headers[f"x-ratelimit-limit-{kind}"] = str(one.limit)
        headers[f"x-ratelimit-remaining-{kind}"] = str(one.left)
        headers[f"x-ratelimit-reset-{kind}"] = f"{math.ceil(one.seconds)}s"
    return headers
