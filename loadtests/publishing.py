"""Publishes adapters on a running server while it is measured: one after the other, or so many a second."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from .errors import LoadTestError
from .process import Server

Parts = Mapping[str, bytes]
WORKERS = 8  # uploads under way at the same time


@dataclass(frozen=True, slots=True)
class Publication:
    """One upload. Times are `time.perf_counter`'s.

    Attributes:
        number: which one it was, from 0.
        version: what the server says it became.
    """

    number: int
    name: str
    version: str
    begun: float
    done: float


def retouched(parts: Parts, number: int) -> dict[str, bytes]:
    """The same adapter as another version: the last weight differs by less than its 16-bit form can hold.

    Raises LoadTestError if the weights are not fp32, or `number` is not in 0 .. 32767.
    """
    weights = parts["weights"]
    if b'"F32"' not in weights[:4096] or not 0 <= number < 1 << 15:
        raise LoadTestError("only fp32 weights can be retouched, at most 32,768 times")
    return {**parts, "weights": weights[:-4] + number.to_bytes(2, "little") + weights[-2:]}


class Publisher:
    """Uploads under one of `names` in turn."""

    def __init__(self, server: Server, names: Sequence[str], parts: Callable[[int], Parts]) -> None:
        """`parts`: the files of the n-th upload."""
        self._server, self._names, self._parts = server, names, parts
        self._numbers = itertools.count()
        self._stop = threading.Event()
        self.done: list[Publication] = []
        self.errors: list[str] = []

    @contextmanager
    def steadily(self, per_second: float) -> Iterator[None]:
        """While it lasts, an upload begins every 1 / per_second, whether or not those before have ended."""
        with ThreadPoolExecutor(WORKERS, "publish") as pool, self._running(lambda: self._pace(pool, per_second)):
            yield

    def in_turn(self, count: int) -> None:
        """`count` uploads, each after the last has ended; fewer after `stop`."""
        for _ in range(count):
            if self._stop.is_set():
                break
            self._publish(next(self._numbers))

    def stop(self) -> None:
        """From any thread: no further upload begins."""
        self._stop.set()

    @contextmanager
    def _running(self, body: Callable[[], None]) -> Iterator[None]:
        thread = threading.Thread(target=body, name="publisher")
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()
            self._stop.clear()

    def _pace(self, pool: ThreadPoolExecutor, per_second: float) -> None:
        began = time.perf_counter()
        under_way: list[Future[None]] = []
        while not self._stop.wait(max(0.0, began + len(under_way) / per_second - time.perf_counter())):
            under_way.append(pool.submit(self._publish, next(self._numbers)))
        for upload in under_way:
            upload.cancel()  # what has not begun

    def _publish(self, number: int) -> None:
        name, begun = self._names[number % len(self._names)], time.perf_counter()
        try:
            version = self._server.put(name, self._parts(number))
        except LoadTestError as error:
            self.errors.append(str(error))
        else:
            self.done.append(Publication(number, name, version, begun, time.perf_counter()))
