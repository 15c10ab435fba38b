"""Tokens a second of both checkouts under the same loads; the one whose turn it is not is frozen."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from ..client import run_clients
from ..peers.servers import Side
from ..report import summarize
from ..workload import Workload
from .pairs import Pair, Say, in_turn, rounds

AIM = (0.97, 1.03)
SECONDS = 60.0  # most of one load; what is still open then is an error


@dataclass(frozen=True, slots=True)
class Load:
    """`adapters`: they are asked in turn; otherwise all ask the base."""

    label: str
    adapters: bool
    clients: int
    requests: int


LOADS = (
    Load("base, 1 client", False, 1, 6),
    Load("base, 32 clients", False, 32, 96),
    Load("16 adapters, 32 clients", True, 32, 96),
)


def measure(
    sides: Sequence[Side], adapters: Sequence[str], count: int, deadline: float, say: Say
) -> tuple[list[Pair], list[str]]:
    """At most `count` rounds of every load; the figures, and one sentence for each request that failed."""
    pairs, errors = [Pair(load.label, "tokens/s", AIM) for load in LOADS], list[str]()
    _round(sides, adapters, -1, errors)  # afterwards the adapters are in their slots
    for number in rounds(count, deadline, say):
        for pair, values in zip(pairs, _round(sides, adapters, number, errors), strict=True):
            pair.add(values)
        say(f"round {number + 1}/{count}: " + "; ".join(f"{it.label} {it.ratios[-1]:.3f}" for it in pairs))
    return pairs, errors


def _round(sides: Sequence[Side], adapters: Sequence[str], number: int, errors: list[str]) -> list[dict[str, float]]:
    """Each load once on each side: side -> tokens a second, load by load. Round -1 is short."""
    figures = []
    for place, load in enumerate(LOADS):
        # No prompt comes twice on one server: the prefix cache would know it.
        seed = 1 + (number + 1) * len(LOADS) + place
        workload = Workload(adapters=tuple(adapters) if load.adapters else (), seed=seed)
        requests = workload.requests(load.clients if number < 0 else load.requests)
        rates = {}
        for side in in_turn(sides, number):
            with side.turn() as target:
                run = asyncio.run(run_clients(target, requests, clients=load.clients, seconds=SECONDS))
            summary = summarize(load.label, run)
            rates[side.name] = summary.tokens_per_second
            errors += [f"{side.name}, {load.label}: {times} x {error}" for error, times in summary.errors.items()]
            errors += [f"{side.name}, {load.label}: {run.cut} not done after {SECONDS:.0f} s"] if run.cut else []
        figures.append(rates)
    return figures
