"""What other threads may say to the engine thread: take this sequence, abort that one, drop a version, finish up."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum

from loramux_server.engine.sequence import Sequence
from loramux_server.errors import EngineDead, RequestError, ServerBusy, ServerDraining


class EngineState(Enum):
    """Life of an engine, in this order; RUNNING may be skipped."""

    STARTING = "starting"  # takes sequences, warms up
    RUNNING = "running"
    DRAINING = "draining"  # takes no new sequences, finishes those it has
    STOPPED = "stopped"  # ended as asked
    DEAD = "dead"  # ended by a failure


ENDED = (EngineState.STOPPED, EngineState.DEAD)


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


class Inbox:
    """Bounded, thread-safe. It knows which ids the engine holds, so that an id is never used twice at a time."""

    def __init__(self, max_waiting: int) -> None:
        """`max_waiting`: sequences that may be in the inbox or in the scheduler's queue together."""
        self._max_waiting = max_waiting
        self._lock = threading.Lock()
        self._news = threading.Event()
        self._state = EngineState.STARTING
        self._mail = Mail()
        self._live: set[str] = set()  # ids handed in and not yet `forget`-ed
        self._num_waiting = 0  # in the inbox or in the scheduler's queue

    @property
    def state(self) -> EngineState:
        return self._state

    @property
    def num_waiting(self) -> int:
        """Sequences that have not started, as of the last `put` or `set_waiting`."""
        return self._num_waiting

    @property
    def drained(self) -> bool:
        """True once nothing new is taken and everything that was taken has ended."""
        with self._lock:
            return self._state is EngineState.DRAINING and not self._live

    def put(self, sequence: Sequence) -> None:
        """Any thread. Raises EngineDead, ServerDraining, ServerBusy, or RequestError for an id that is in use."""
        with self._lock:
            if self._state is EngineState.DEAD:
                raise EngineDead("the engine has stopped after a failure; the server must be restarted")
            if self._state in (EngineState.DRAINING, EngineState.STOPPED):
                raise ServerDraining("the server is shutting down and takes no new requests")
            if self._num_waiting >= self._max_waiting:
                raise ServerBusy(f"{self._num_waiting} requests are waiting already; try again later")
            if sequence.id in self._live:
                raise RequestError(f"a request with the id {sequence.id} is still running", code="duplicate_request_id")
            self._live.add(sequence.id)
            self._num_waiting += 1
            self._mail.sequences.append(sequence)
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

    def wait(self) -> None:
        """Engine thread. Returns at once if anything was said since the last `take`."""
        self._news.wait()

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

    def set_waiting(self, in_queue: int) -> None:
        """Engine thread. `in_queue`: sequences that wait in the scheduler now; those in the inbox are added."""
        with self._lock:
            self._num_waiting = in_queue + len(self._mail.sequences)

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
            self._num_waiting = 0
        return left
