"""Streams that run as late as they may: work is done when something waits for it, and no sooner."""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from loramux_adapters.device.device import Event


@dataclass(frozen=True, slots=True)
class Work:
    """Something that was started. `what`: for the error that it may end with."""

    what: str
    run: Callable[[], None]


@dataclass(eq=False)
class EmulatedStream:
    """`WorkStream`: a queue. `refuse` raises where a capture forbids what it is told."""

    streams: Streams
    name: str
    refuse: Callable[[str], None]
    queue: deque[Work] = field(default_factory=deque)
    started: int = 0
    done: int = 0

    def record(self) -> Event:
        self.refuse("records an event")
        return Moment(self, self.started)

    def wait(self, event: Event) -> None:
        self.refuse("waits for another stream")
        assert isinstance(event, Moment), "an event of another device"
        self.start(Work(f"a wait for {event.stream.name}", event.reach))

    def synchronize(self) -> None:
        self.refuse("waits for a stream")
        self.run_until(self.started)

    def start(self, work: Work) -> None:
        with self.streams.lock:
            self.queue.append(work)
            self.started += 1
            self.streams.maybe_run()

    def run_until(self, number: int) -> None:
        """Does the first `number` pieces of work that were ever started here, as far as they are not done."""
        with self.streams.lock:
            while self.done < number:
                work = self.queue.popleft()
                try:
                    work.run()
                except Exception as error:
                    error.add_note(f"in {work.what}, which was started on {self.name}")
                    raise
                finally:
                    self.done += 1


@dataclass(frozen=True, slots=True)
class Moment:
    """`Event`: when so many pieces of work are done."""

    stream: EmulatedStream
    number: int

    def reach(self) -> None:
        self.stream.run_until(self.number)

    def synchronize(self) -> None:
        self.stream.refuse("waits for an event")
        self.reach()

    def is_over(self) -> bool:
        self.stream.refuse("asks for an event")
        return self.stream.done >= self.number


class Streams:
    """All streams of a device, which know nothing of each other.

    With `early` above 0 each start is followed, with this chance, by some of the work that waits on any stream, as a
    device does it: which wait is missing shows in one order or in the other.
    """

    def __init__(self, early: float, seed: int) -> None:
        self.lock = threading.RLock()
        self.all: list[EmulatedStream] = []
        self._early, self._random = early, random.Random(seed)

    def add(self, name: str, refuse: Callable[[str], None]) -> EmulatedStream:
        self.all.append(EmulatedStream(self, name, refuse))
        return self.all[-1]

    def maybe_run(self) -> None:
        while self._random.random() < self._early:
            stream = self._random.choice(self.all)
            stream.run_until(min(stream.done + 1, stream.started))

    def run_all(self) -> None:
        for stream in self.all:
            stream.run_until(stream.started)
