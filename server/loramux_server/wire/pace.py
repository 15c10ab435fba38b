"""How slow the other side of a connection may be, in either direction."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Pace:
    """A body moves at `bytes_per_second` at least, and may be behind that by `seconds`."""

    seconds: float
    bytes_per_second: float

    def credit(self, credit: float, waited: float, moved: int) -> float:
        """Seconds that it may still be behind, after `moved` bytes came in `waited` seconds. Below 0: too slow.

        What goes faster earns no more than `seconds`, so that a body which began well cannot rest for hours.
        """
        return min(self.seconds, credit - waited + moved / self.bytes_per_second)
