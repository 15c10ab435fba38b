"""What a server would take on a card that nobody has rented yet, and what to change where it does not fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loramux_adapters.device.defaults import CARD_SIZES
from loramux_adapters.lora.slots import bucket_of
from loramux_server.config.sizes import AsksForSizes
from loramux_server.errors import ConfigError
from loramux_server.kernels.attention.kv_cache import BLOCK_SIZE
from loramux_server.serving.cards import GIB, KEPT_BY_THE_DRIVER, Card
from loramux_server.serving.device_sizes import MIB, SHORT_CONTEXT, Room, Sizes, needed_bytes, sizes_of
from loramux_server.serving.planned_base import PlannedBase

# What makes a server smaller, first what costs least. Each goes beyond the one before.
_SMALLER: tuple[dict[str, int], ...] = (
    {"max_batch_tokens": 512, "max_num_seqs": 64},
    {"max_batch_tokens": 128, "max_num_seqs": 32},
    {"max_batch_tokens": 128, "max_num_seqs": 32, "graph_memory_mib": 64},
)


@dataclass(frozen=True, slots=True)
class ServePlan:
    """A server on a card.

    Attributes:
        sizes: what it takes; None where it does not fit.
        short: bytes that are missing then.
        change: what makes it fit, or helps; "" where it fits.
    """

    card: Card
    sizes: Sizes | None
    short: int = 0
    change: str = ""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a server is wanted for.

    Attributes:
        asked: its settings.
        adapters: to lie on the card at the same time; None: as many as their share holds.
        rank: of each.
    """

    base: PlannedBase
    asked: AsksForSizes
    adapters: int | None
    rank: int

    @property
    def adapter_bytes(self) -> int:
        """Of one, on every layer."""
        return bucket_of(self.rank) * self.base.sizes.row_bytes

    @property
    def context(self) -> int:
        """Tokens that one request needs room for, at least."""
        return min(self.asked.max_model_len or SHORT_CONTEXT, self.base.sizes.context)

    def settings(self, **changes: Any) -> AsksForSizes:
        """A server's, with memory for the adapters."""
        asked = self.asked.model_copy(update=changes)
        if self.adapters is None or asked.adapter_memory_mib is not None:
            return asked
        return asked.model_copy(update={"adapter_memory_mib": -(-self.adapters * self.adapter_bytes // MIB)})

    def with_adapters(self, adapters: int) -> Wanted:
        return Wanted(self.base, self.asked, adapters, self.rank)


def plan_on(card: Card, wanted: Wanted) -> ServePlan:
    """Raises ConfigError: settings that go together on no card."""
    _check(wanted)
    sizes = _fits(card, wanted, {})
    if sizes is not None:
        return ServePlan(card, sizes)
    room = _room(card, wanted.base)
    short = needed_bytes(wanted.settings(), wanted.base.sizes, room, wanted.context) - (card.free - wanted.base.nbytes)
    return ServePlan(card, None, max(short, 1), _change(card, wanted))


def _check(wanted: Wanted) -> None:
    given, adapters = wanted.asked.adapter_memory_mib, wanted.adapters
    if given is None or adapters is None or adapters * wanted.adapter_bytes <= given * MIB:
        return
    raise ConfigError(
        f"--adapter-memory-mib {given} holds {given * MIB // wanted.adapter_bytes} adapters of rank {wanted.rank}, and "
        f"the {adapters} of --adapters take {-(-adapters * wanted.adapter_bytes // MIB)} MiB: raise the one, lower the "
        "other, or leave --adapter-memory-mib out"
    )


def _room(card: Card, base: PlannedBase) -> Room:
    return Room(card.total, max(0, card.free - base.nbytes), CARD_SIZES)


def _fits(card: Card, wanted: Wanted, changes: dict[str, Any]) -> Sizes | None:
    try:
        sizes = sizes_of(wanted.settings(**changes), wanted.base.sizes, _room(card, wanted.base))
    except ConfigError:
        return None
    is_enough = sizes.context >= wanted.context and sizes.arena >= (wanted.adapters or 0) * wanted.adapter_bytes
    return sizes if is_enough else None


def _change(card: Card, wanted: Wanted) -> str:
    """What makes it fit, as flags of the server."""
    changes: dict[str, Any] = {}
    for smaller in _SMALLER:
        changes = {name: value for name, value in smaller.items() if _is_less(value, getattr(wanted.asked, name))}
        if changes and _fits(card, wanted, changes):
            return _flags(wanted, changes)
    for name in ("device_memory_mib", "adapter_memory_mib"):
        if getattr(wanted.asked, name) is not None:
            changes[name] = None
            if _fits(card, wanted, changes):
                return _told(wanted, changes)
    if wanted.adapters is not None:
        fewer, tried = _most_adapters(card, wanted, {}), dict[str, Any]()
        with_less = _most_adapters(card, wanted, changes)
        if 2 * fewer < with_less:  # smaller steps cost speed
            fewer, tried = with_less, changes
        if fewer:
            everything = -(-wanted.adapters * wanted.adapter_bytes // MIB)
            return (
                f"{_told(wanted.with_adapters(fewer), tried)}; {fewer} adapters at a time leave a KV cache for one "
                f"request of {wanted.context:,} tokens; the others wait in host memory with --host-cache-mib "
                f"{everything}"
            )
    if wanted.asked.max_model_len is not None:
        for tried in ({}, changes):  # smaller steps cost speed and give little length, so first without them
            shorter = _most(
                wanted.context // BLOCK_SIZE,
                lambda blocks, tried=tried: _shorter(card, wanted, tried, blocks * BLOCK_SIZE),
            )
            if shorter * BLOCK_SIZE >= SHORT_CONTEXT:
                return f"{_told(wanted, tried)} --context {shorter * BLOCK_SIZE}".strip()
    needed = needed_bytes(wanted.settings(**changes), wanted.base.sizes, _room(card, wanted.base), wanted.context)
    total = (needed + wanted.base.nbytes + card.libraries) / (1 - KEPT_BY_THE_DRIVER)
    return f"a card of {total / GIB:.1f} GiB with {_flags(wanted, changes) or 'these settings'}, or a smaller base"


def _most_adapters(card: Card, wanted: Wanted, changes: dict[str, Any]) -> int:
    assert wanted.adapters is not None
    return _most(wanted.adapters, lambda count: _fits(card, wanted.with_adapters(count), changes) is not None)


def _shorter(card: Card, wanted: Wanted, changes: dict[str, Any], context: int) -> bool:
    asked = wanted.asked.model_copy(update={"max_model_len": context})
    return _fits(card, Wanted(wanted.base, asked, wanted.adapters, wanted.rank), changes) is not None


def _is_less(value: int, asked: int | None) -> bool:
    return asked is None or value < asked


def _told(wanted: Wanted, changes: dict[str, Any]) -> str:
    """Flags to give, after those to leave out."""
    flags = _flags(wanted, changes)
    gone = [name for name, value in changes.items() if value is None and f"{_flag(name)} " not in flags]
    return f"leave {' and '.join(map(_flag, gone))} out, {flags}".removesuffix(", ") if gone else flags


def _flags(wanted: Wanted, changes: dict[str, Any]) -> str:
    """For `loramux serve`, which has no --adapters: their memory is named."""
    given, memory = dict(changes), wanted.settings(**changes).adapter_memory_mib
    if memory != wanted.asked.adapter_memory_mib:
        given["adapter_memory_mib"] = memory
    return " ".join(f"{_flag(name)} {value}" for name, value in given.items() if value is not None)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _most(count: int, holds: Any) -> int:
    """The largest number below `count` for which it holds, if it holds for all that are smaller; 0: for none."""
    low, high = 0, count
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
