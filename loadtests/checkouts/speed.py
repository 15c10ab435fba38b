"""Tokens a second of both checkouts under the same loads; the one whose turn it is not is frozen.

Two processes of the same code can differ by some percent for as long as they live. So ratios come from several pairs of
processes, and loads are short.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from ..client import run_clients
from ..peers.servers import Side
from ..report import summarize
from ..workload import Request, Workload
from .pairs import Pair, in_turn

AIM = (0.97, 1.03)
ROUNDS = 2  # for each pair of processes: each of them begins once
SECONDS = 60.0  # most of one load; what is still open then is an error


@dataclass(frozen=True, slots=True)
class Load:
    """`adapters`: they are asked in turn; otherwise all ask the base."""

    label: str
    adapters: bool
    clients: int
    requests: int


LOADS = (
    Load("base, 1 client", False, 1, 4),
    Load("base, 32 clients", False, 32, 32),
    Load("16 adapters, 32 clients", True, 32, 32),
)


class Speed:
    """Measures it, on one pair of servers after the other.

    Attributes:
        errors: one sentence for each kind of failure.
    """

    def __init__(self, adapters: Sequence[str]) -> None:
        self._adapters = tuple(adapters)
        self.pairs = [Pair(load.label, "tokens/s", AIM) for load in LOADS]
        self.errors: list[str] = []

    def measure(self, sides: Sequence[Side], number: int) -> None:
        """ROUNDS rounds of all loads on the `number`-th pair of servers."""
        first = number * (ROUNDS + 1)
        self._round(sides, first)  # afterwards the adapters are in their slots; it does not count
        for place in range(first + 1, first + 1 + ROUNDS):
            for pair, rates in zip(self.pairs, self._round(sides, place), strict=True):
                pair.add(rates)

    def _round(self, sides: Sequence[Side], number: int) -> list[dict[str, float]]:
        """Load by load: side -> tokens a second."""
        figures = []
        for place, load in enumerate(LOADS):
            # No prompt comes twice on one server: the prefix cache would know it.
            adapters = self._adapters if load.adapters else ()
            requests = Workload(adapters=adapters, seed=number * len(LOADS) + place).requests(load.requests)
            figures.append({side.name: self._rate(side, load, requests) for side in in_turn(sides, number)})
        return figures

    def _rate(self, side: Side, load: Load, requests: Sequence[Request]) -> float:
        with side.turn() as target:
            run = asyncio.run(run_clients(target, requests, clients=load.clients, seconds=SECONDS))
        summary = summarize(load.label, run)
        failures = {**summary.errors, f"not done after {SECONDS:.0f} s": run.cut}
        self.errors += [f"{side.name}, {load.label}: {times} x {error}" for error, times in failures.items() if times]
        return summary.tokens_per_second
