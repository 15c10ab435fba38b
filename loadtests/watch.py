"""What a process holds while it is under load: memory, threads and file descriptors, noted every few seconds."""

from __future__ import annotations

import statistics
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from .memory import resident_bytes

SAMPLE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Sample:
    """`at` is in seconds since the watch began; `rss` in bytes."""

    at: float
    rss: int
    threads: int
    descriptors: int


class ProcessWatch(threading.Thread):
    """Samples a process of this machine until it is stopped."""

    def __init__(self, pid: int) -> None:
        super().__init__(name="process-watch", daemon=True)
        self._pid, self._ended = pid, threading.Event()
        self.samples: list[Sample] = []

    def run(self) -> None:
        began, process = time.monotonic(), Path(f"/proc/{self._pid}")
        while not self._ended.wait(SAMPLE_SECONDS):
            threads, descriptors = (len(list((process / name).iterdir())) for name in ("task", "fd"))
            rss = resident_bytes(self._pid)["rss"]
            self.samples.append(Sample(time.monotonic() - began, rss, threads, descriptors))

    def stop(self) -> None:
        self._ended.set()
        self.join()

    def slope(self, after: float) -> float:
        """Megabytes a minute, by least squares over the samples from `after` seconds on; 0 for fewer than two."""
        late = [(it.at / 60, it.rss / 1e6) for it in self.samples if it.at >= after]
        return statistics.linear_regression(*zip(*late, strict=True)).slope if len(late) > 1 else 0.0

    def risen(self, what: str, after: float) -> float:
        """By how much the median of "threads" or "descriptors" is higher in the last quarter than in the first one.

        Only samples from `after` seconds on count.
        """
        late = [getattr(it, what) for it in self.samples if it.at >= after]
        quarter = max(1, len(late) // 4)
        return statistics.median(late[-quarter:]) - statistics.median(late[:quarter]) if late else 0.0
