"""The connections that are open: how many may be, which of them make room for others, and why some were cut."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

PARTS = 10  # that the connections are looked at in, so that ten thousand do not hold the event loop at once
RESERVE = 16  # connections beside the cap: half for managing adapters too, all for health and metrics


class Purpose(Enum):
    """What a request is for: what is left when the server is full goes to the more important one."""

    USE = 0
    MANAGEMENT = RESERVE // 2
    OPERATION = RESERVE


class Cut(Enum):
    """Why the server ended a connection, or refused what came over it."""

    HEADER_TOO_SLOW = "header_too_slow"
    BODY_TOO_SLOW = "body_too_slow"
    BODY_UNREAD = "body_unread"  # the request has its answer, and the client goes on sending
    READER_TOO_SLOW = "reader_too_slow"
    IDLE = "idle_made_room"
    LAGGING = "slow_reader_made_room"
    FULL = "full"


@dataclass(frozen=True, slots=True)
class ConnectionReadings:
    """Connections at one moment.

    Attributes:
        busy: of the open ones, those with a request.
        cap: most that may have an ordinary request; None is no cap.
        cuts: how often each has happened since the start.
    """

    open: int
    busy: int
    cap: int | None
    cuts: Mapping[Cut, int]


class Connection(Protocol):
    """What is known of one here."""

    def make_room(self) -> None:
        """Close: it can be spared, and another client waits."""

    def check(self, now: float) -> None:
        """Close if a deadline has passed."""


class Connections:
    """Owner: the event loop; `readings` may be called by any thread.

    A connection without a request is closed when a new one needs its place, the longest idle first, so connections
    that only stay open never keep anybody out. Where there is none, one goes whose client does not take its reply. The
    cap counts those with a request.
    """

    def __init__(self, cap: int | None = None) -> None:
        self.cap = cap
        self.when_room: Callable[[], None] = lambda: None
        """Called whenever there may be a place for one more."""
        self._open: tuple[set[Connection], ...] = tuple(set() for _ in range(PARTS))
        self._busy: set[Connection] = set()
        self._idle: dict[Connection, None] = {}  # the longest idle first
        self._lagging: dict[Connection, None] = {}  # the longest first
        self._cuts: Counter[Cut] = Counter()

    def entered(self, connection: Connection) -> None:
        """It was accepted."""
        self._part_of(connection).add(connection)

    def is_idle(self, connection: Connection) -> None:
        """It has no request, from now on."""
        self._busy.discard(connection)
        self._idle.pop(connection, None)
        self._idle[connection] = None

    def is_busy(self, connection: Connection) -> None:
        """It has a request, from now on."""
        self._idle.pop(connection, None)
        self._busy.add(connection)

    def lags(self, connection: Connection) -> None:
        """Its client leaves a reply untaken, from now on."""
        if connection not in self._lagging:
            self._lagging[connection] = None
            self.when_room()

    def keeps_up(self, connection: Connection) -> None:
        self._lagging.pop(connection, None)

    def left(self, connection: Connection) -> None:
        self._part_of(connection).discard(connection)
        self._busy.discard(connection)
        self._idle.pop(connection, None)
        self._lagging.pop(connection, None)
        self.when_room()

    def admit(self, purpose: Purpose) -> bool:
        """False, and counted, where the request that has just begun is one too many for its purpose."""
        if self.cap is None or purpose is Purpose.OPERATION or len(self._busy) <= self.cap + purpose.value:
            return True
        self.count(Cut.FULL)
        return False

    @property
    def open_count(self) -> int:
        return sum(map(len, self._open))

    @property
    def can_accept(self) -> bool:
        return self.cap is None or bool(self._idle or self._lagging) or self.open_count < self.cap + RESERVE

    def make_room(self) -> None:
        """Closes the most dispensable connection if there are more than there may be."""
        if self.cap is not None and self.open_count > self.cap + RESERVE:
            self.close_one()

    def close_one(self) -> None:
        """The longest idle one, else the one that lags longest; does nothing where all are busy and keep up."""
        for candidates, cut in ((self._idle, Cut.IDLE), (self._lagging, Cut.LAGGING)):
            if candidates:
                longest = next(iter(candidates))
                self._idle.pop(longest, None)
                self._lagging.pop(longest, None)
                self.count(cut)
                longest.make_room()
                return

    def check(self, now: float, turn: int) -> None:
        """Looks at the deadlines of one part; to be called `PARTS` times a second, with a number that counts up."""
        for connection in list(self._open[turn % PARTS]):
            connection.check(now)

    def count(self, cut: Cut) -> None:
        self._cuts[cut] += 1

    def _part_of(self, connection: Connection) -> set[Connection]:
        return self._open[hash((connection,)) % PARTS]  # a tuple's hash is mixed; an object's is its address

    def readings(self) -> ConnectionReadings:
        return ConnectionReadings(self.open_count, len(self._busy), self.cap, {cut: self._cuts[cut] for cut in Cut})
