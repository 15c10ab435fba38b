"""A figure of both checkouts, measured in turns: who begins changes, and each round gives one ratio."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ..report import table

T = TypeVar("T")
Say = Callable[[str], None]


@dataclass(slots=True)
class Pair:
    """One figure, round by round.

    Attributes:
        aim: lowest and highest median ratio that is wanted; a lowest of 0 sets no limit there.
    """

    label: str
    unit: str
    aim: tuple[float, float]
    before: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        """After over before, of each round."""
        return [new / old for old, new in zip(self.before, self.after, strict=True)]

    @property
    def reached(self) -> bool:
        return self.aim[0] <= statistics.median(self.ratios) <= self.aim[1]

    def add(self, values: dict[str, float]) -> None:
        """One round: "before" and "after"."""
        self.before.append(values["before"])
        self.after.append(values["after"])

    def document(self) -> dict[str, Any]:
        """As it is written to the JSON file."""
        values = {"before": self.before, "after": self.after, "ratios": self.ratios}
        medians = {name: statistics.median(numbers) for name, numbers in values.items()}
        return {"unit": self.unit, **values, "medians": medians, "aim": self.aim, "reached": self.reached}


def in_turn(sides: Sequence[T], number: int) -> list[T]:
    """The two sides in the order of a round: before, after, after, before, ..."""
    return list(sides if number % 2 == 0 else reversed(sides))


def rounds(count: int, deadline: float, say: Say, clock: Callable[[], float] = time.monotonic) -> Iterator[int]:
    """0, 1, ... up to `count`; at least one, and then none that would end behind the deadline."""
    longest = 0.0
    for number in range(count):
        began = clock()
        if number and began + longest > deadline:
            say(f"{count - number} of {count} rounds are left out, the time is up")
            return
        yield number
        longest = max(longest, clock() - began)


def show(pairs: Sequence[Pair]) -> str:
    """A table with one line for each figure."""
    rows = [["median", "before", "after", "unit", "after / before by round (lowest .. highest)", "aim", "reached"]]
    for it in pairs:
        ratios, (lowest, highest) = it.ratios, it.aim
        rows.append(
            [
                it.label,
                f"{statistics.median(it.before):.2f}",
                f"{statistics.median(it.after):.2f}",
                it.unit,
                f"{statistics.median(ratios):.3f} ({min(ratios):.3f} .. {max(ratios):.3f})",
                f"{lowest} to {highest}" if lowest else f"at most {highest}",
                "yes" if it.reached else "NO",
            ]
        )
    return table(rows)
