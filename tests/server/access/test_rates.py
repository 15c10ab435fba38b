"""What tenants may take a minute and at once, and that the time to come back is true."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from loramux_server.access.caller import Caller
from loramux_server.access.rates import Rates, rate_headers
from loramux_server.access.tenant import TenantLimits
from loramux_server.errors import ConfigError, RateLimited

pytestmark = pytest.mark.anyio


class Clock:
    now = 1_800_000_000.5

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr("limits.aio.storage.memory.time", clock)
    monkeypatch.setattr("loramux_server.access.rates.time", clock)
    yield clock


def of(tenant: str | None = "acme", **limits: int) -> Caller:
    return Caller("key", tenant, frozenset(), TenantLimits(**limits))


async def test_requests_a_minute_and_when_there_are_some_again(clock: Clock) -> None:
    rates, caller = Rates(), of(requests_per_minute=2)
    await rates.begin(caller)
    clock.now += 20
    await rates.begin(caller)
    with pytest.raises(
        RateLimited, match="2 requests a minute and 0 of them are left; all are there again in 40 s"
    ) as it:
        await rates.begin(caller)
    assert (it.value.retry_after, it.value.kind) == (40, "requests")
    clock.now += 39.9
    with pytest.raises(RateLimited) as it:
        await rates.begin(caller)
    assert it.value.retry_after == 1
    clock.now += it.value.retry_after
    await rates.begin(caller)


async def test_a_refused_request_counts_nothing(clock: Clock) -> None:
    rates, caller = Rates(), of(requests_per_minute=1, requests_at_once=1, tokens_per_minute=10)
    seat = await rates.begin(caller)
    for _ in range(3):
        with pytest.raises(RateLimited, match="requests of this tenant are running") as it:
            await rates.begin(caller)
        assert it.value.retry_after is None, "nobody knows when one ends"
    seat.end()
    seat.end()
    for _ in range(3):
        with pytest.raises(RateLimited, match="a minute"):
            await rates.begin(caller)
    clock.now += 60
    second = await rates.begin(caller)
    with pytest.raises(RateLimited, match="has 11 tokens, and this tenant has 10 a minute; send less") as it:
        await second.read(11)
    assert it.value.retry_after is None, "it never fits"
    await second.read(10)


async def test_prompts_count_and_replies_count_beyond_the_limit(clock: Clock) -> None:
    rates, caller = Rates(), of(tokens_per_minute=100)
    seat = await rates.begin(caller)
    await seat.read(60)
    with pytest.raises(RateLimited, match="40 of them are left"):
        await seat.read(41)
    await seat.write(90)
    assert (await seat.remaining())["tokens"].left == 0
    with pytest.raises(RateLimited) as it:
        await rates.begin(caller)
    assert it.value.kind == "tokens"
    clock.now += it.value.retry_after or 0
    again = await rates.begin(caller)
    await again.read(100)


async def test_tenants_do_not_count_for_each_other_and_the_operator_counts_nothing(clock: Clock) -> None:
    rates = Rates()
    await rates.begin(of(requests_per_minute=1))
    await rates.begin(of("other", requests_per_minute=1))
    for _ in range(5):
        seat = await rates.begin(of(None, requests_per_minute=1, requests_at_once=1))
        await seat.read(10**9)
        await seat.write(10**9)
        assert await seat.remaining() == {}


async def test_headers_are_openais(clock: Clock) -> None:
    rates, caller = Rates(), of(requests_per_minute=5, tokens_per_minute=100)
    seat = await rates.begin(caller)
    await seat.read(30)
    clock.now += 10
    assert rate_headers(await seat.remaining()) == {
        "x-ratelimit-limit-requests": "5",
        "x-ratelimit-remaining-requests": "4",
        "x-ratelimit-reset-requests": "50s",
        "x-ratelimit-limit-tokens": "100",
        "x-ratelimit-remaining-tokens": "70",
        "x-ratelimit-reset-tokens": "50s",
    }


async def test_a_limit_that_changes_holds_for_what_was_counted_before(clock: Clock) -> None:
    rates = Rates()
    for _ in range(3):
        await rates.begin(of(requests_per_minute=100))
    with pytest.raises(RateLimited):
        await rates.begin(of(requests_per_minute=2))


@pytest.mark.parametrize(
    "values",
    [{"weight": 0}, {"weight": None}, {"weight": 1.5}, {"priority": 11}, {"adapters": -1}, {"requests_at_once": True}],
)
def test_what_is_no_limit(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        TenantLimits().changed(values)


def test_an_unknown_limit_is_named() -> None:
    with pytest.raises(ConfigError, match="no limit 'tokens_per_minut'; did you mean tokens_per_minute"):
        TenantLimits().changed({"tokens_per_minut": 1})
