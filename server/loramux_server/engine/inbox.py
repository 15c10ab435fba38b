"""What other threads may say to the engine thread: take this sequence, abort that one, drop a version, finish up.

How many may wait is bounded, and the bound is shared: all flows of one share may hold at most FLOW_SHARE times the
places that are still free ("dynamic thresholds", Choudhury and Hahne, 1998). So one share by itself fills four fifths
of them, and one of which nobody waits finds a place as long as there is any. A share is what an adapter's flows have in
common, and around it what a tenant's have.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from loramux_server.engine.scheduling.sequence import Flow, Sequence
from loramux_server.errors import EngineDead, RequestError, ServerBusy, ServerDraining


class EngineState(Enum):
    """Life of an engine, in this order; RUNNING may be skipped."""

    STARTING = "starting"  # takes sequences, warms up
    RUNNING = "running"
    DRAINING = "draining"  # takes no new sequences, finishes those it has
    STOPPED = "stopped"  # ended as asked
    DEAD = "dead"  # ended by a failure


ENDED = (EngineState.STOPPED, EngineState.DEAD)
FLOW_SHARE = 4
LONGEST_RETRY = 600  # seconds


class Backlog(NamedTuple):
    """What waits of one share: how many sequences, and how long the engine would work for them alone."""

    waiting: int
    seconds: float


@dataclass(slots=True)
class Mail:
    """All that was said since the last `take`.

    Attributes:
        retired: versions that nobody will ask for again.
        kept: versions to keep on the device where that is possible; None: as before.
    """

    sequences: list[Sequence] = field(default_factory=list)
    aborted: set[str] = field(default_factory=set)
    retired: set[str] = field(default_factory=set)
    kept: frozenset[str] | None = None


def shares_of(flow: Flow) -> tuple[Flow, ...]:
    """Those that a flow counts for, from the outside in. What belongs to no tenant has no outer one."""
    return (flow[:1], flow[:2]) if flow[0] else (flow[:2],)


class Inbox:
    """Bounded, thread-safe. It knows which ids the engine holds, so that an id is never used twice at a time."""

    def __init__(self, max_waiting: int) -> None:
        """`max_waiting`: sequences that may be in the inbox or in the scheduler's lines together."""
        self._max_waiting = max_waiting
        self._lock = threading.Lock()
        self._news = threading.Event()
        self._state = EngineState.STARTING
        self._mail = Mail()
        self._live: set[str] = set()  # ids handed in and not yet `forget`-ed
        self._num_waiting = 0  # in the inbox or in the scheduler's lines
        self._waiting: Counter[Flow] = Counter()  # the same, by share
        self._backlog: Mapping[Flow, Backlog] = {}  # of the scheduler's lines

    @property
    def state(self) -> EngineState:
        return self._state

    @property
    def num_waiting(self) -> int:
        """Sequences that have not started, as of the last `put` or `set_backlog`."""
        return self._num_waiting

    @property
    def drained(self) -> bool:
        """True once nothing new is taken and everything that was taken has ended."""
        with self._lock:
            return self._state is EngineState.DRAINING and not self._live

    def put(self, *sequences: Sequence) -> None:
        """Any thread. Takes all of them, which are of one flow, or raises and takes none.

        Raises:
            EngineDead, ServerDraining: nothing is taken any more.
            ServerBusy: there is no place for all of them now.
            RequestError: there never is, or an id is in use.
        """
        with self._lock:
            if self._state is EngineState.DEAD:
                raise EngineDead("the engine has stopped after a failure; the server must be restarted")
            if self._state in (EngineState.DRAINING, EngineState.STOPPED):
                raise ServerDraining("the server is shutting down and takes no new requests")
            shares = shares_of(sequences[0].flow)
            for share in shares:
                self._check_room(share, len(sequences))
            for sequence in sequences:
                if sequence.id in self._live:
                    raise RequestError(
                        f"a request with the id {sequence.id} is still running", code="duplicate_request_id"
                    )
            self._live.update(sequence.id for sequence in sequences)
            self._num_waiting += len(sequences)
            for share in shares:
                self._waiting[share] += len(sequences)
            self._mail.sequences += sequences
        self._news.set()

    def abort(self, sequence_id: str) -> None:
        """Any thread. The engine drops the sequence before its next step; an id it does not hold is ignored."""
        with self._lock:
            if sequence_id not in self._live:
                return
            self._mail.aborted.add(sequence_id)
        self._news.set()

    def abort_all(self) -> None:
        """Any thread."""
        with self._lock:
            self._mail.aborted |= self._live
        self._news.set()

    def retire(self, version: str) -> None:
        """Any thread. The version leaves its device slot before the next step, or when the last that uses it ends."""
        with self._lock:
            if self._state not in ENDED:
                self._mail.retired.add(version)
        self._news.set()

    def keep(self, versions: frozenset[str]) -> None:
        """Any thread. From the next step on these are evicted from the device only where there is no other way."""
        with self._lock:
            if self._state not in ENDED:
                self._mail.kept = versions
        self._news.set()

    def drain(self) -> None:
        """Any thread. From now on nothing new is taken."""
        with self._lock:
            if self._state not in ENDED:
                self._state = EngineState.DRAINING
        self._news.set()

    def wake(self) -> None:
        """Any thread. Makes a waiting engine look at the world again."""
        self._news.set()

    def wait(self, seconds: float | None = None) -> None:
        """Engine thread. Returns at once if anything was said since the last `take`; None: waits until then."""
        self._news.wait(seconds)

    def take(self) -> Mail:
        """Engine thread. Everything since the last call; an abort comes with or after its sequence, never before."""
        self._news.clear()
        with self._lock:
            mail, self._mail = self._mail, Mail()
        return mail

    def started(self) -> None:
        """Engine thread. The warm-up is over."""
        with self._lock:
            if self._state is EngineState.STARTING:
                self._state = EngineState.RUNNING

    def set_backlog(self, backlog: Mapping[Flow, Backlog]) -> None:
        """Engine thread. What waits in the scheduler now, by share; what is in the inbox is added."""
        with self._lock:
            self._backlog = backlog
            self._waiting = Counter({share: one.waiting for share, one in backlog.items()})
            for sequence in self._mail.sequences:
                self._waiting.update(shares_of(sequence.flow))
            self._num_waiting = sum(self._waiting[share] for share in self._waiting if len(share) > 1)

    def forget(self, ids: Iterable[str]) -> None:
        """Engine thread. These sequences have ended; their ids may be used again."""
        with self._lock:
            self._live.difference_update(ids)
        self._news.set()  # a drain may be over

    def end(self, state: EngineState) -> set[str]:
        """Engine thread, as its last act. Nothing is taken any more; returns the ids that have not been forgotten."""
        assert state in ENDED
        with self._lock:
            self._state = state
            left, self._live = self._live, set()
            self._mail = Mail()
            self._backlog, self._waiting, self._num_waiting = {}, Counter(), 0
        return left

    def _check_room(self, share: Flow, count: int) -> None:
        """With the lock held. Raises ServerBusy or RequestError if the share has no place for so many more."""
        most = _places(self._max_waiting, 0)
        if count > most:
            raise RequestError(
                f"the request has {count} prompts, and this server takes {most} at a time; send fewer in each request",
                param="prompt",
                code="too_many_prompts",
            )
        if count <= _places(self._max_waiting - self._num_waiting, self._waiting[share]):
            return
        waiting = f"{self._num_waiting} requests are waiting already"
        if self._num_waiting + count <= self._max_waiting:
            kind = "model" if len(share) > 1 else "tenant"
            waiting += (
                f", {self._waiting[share]} of them for the same {kind}, and other places are kept for other {kind}s"
            )
        seconds = self._seconds_to_wait(share)
        raise ServerBusy(f"{waiting}; try again in about {seconds} s", retry_after=seconds)

    def _seconds_to_wait(self, share: Flow) -> int:
        """Until what waits of this share has started, when all get the same; at least until somebody has."""
        level = [one for other, one in self._backlog.items() if len(other) > 1]
        measured = sum(one.waiting for one in level)
        each = sum(one.seconds for one in level) / max(1, measured)  # the inbox's own are like these
        total = each * self._num_waiting
        known = self._backlog.get(share, Backlog(0, 0.0))
        own = known.seconds + each * (self._waiting[share] - known.waiting)
        seconds = max(each, min(total, own * self._busy_beside(share)))
        return min(LONGEST_RETRY, max(1, math.ceil(seconds)))

    def _busy_beside(self, share: Flow) -> int:
        """Among how many that wait the engine is shared here: tenants, and between them each one's adapters."""
        beside = sum(
            waiting > 0
            for other, waiting in self._waiting.items()
            if len(other) == len(share) and other[:-1] == share[:-1]
        )
        if len(share) == 1:
            return beside
        return beside * max(1, len({other[0] for other, waiting in self._waiting.items() if waiting > 0}))


def _places(free: int, held: int) -> int:
    """How many more sequences a share that holds so many places may bring.

    The largest n for which the last of n has less than FLOW_SHARE times what is free when it comes:
    held + n - 1 < FLOW_SHARE * (free - n + 1).
    """
    return max(0, (FLOW_SHARE * (free + 1) - held) // (1 + FLOW_SHARE))
