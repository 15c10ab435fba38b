"""Milliseconds of work on a device: samples of several cases in turn, so that a card that grows warm harms none."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from loramux_adapters.device.device import Device

Sampled = Callable[[], None]  # starts the work once


@dataclass(frozen=True, slots=True)
class Times:
    """Milliseconds of one piece of work, of all its samples."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, samples: list[float]) -> Times:
        return cls(statistics.median(samples), min(samples), max(samples))


def sample(device: Device, run: Sampled, times: int) -> float:
    """Milliseconds of one of `times` runs in a row: between two events of a CUDA device, by the clock elsewhere."""
    if device.place.type != "cuda":
        device.synchronize()
        began = time.perf_counter()
        for _ in range(times):
            run()
        device.synchronize()
        return (time.perf_counter() - began) / times * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / times


def interleaved(
    device: Device,
    cases: Mapping[str, Callable[[], Sampled]],
    *,
    rounds: int,
    times: int,
    until: float = float("inf"),
) -> dict[str, Times]:
    """Each case sampled once a round, after one run that does not count.

    Args:
        cases: name -> what makes its work ready and gives it: work that shares memory is made ready again each round.
        times: runs of one sample.
        until: no further round begins behind this moment of `time.monotonic`; the first one is made all the same.
    """
    samples: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds):
        if number and time.monotonic() > until:
            break
        for name, ready in cases.items():
            run = ready()
            run()
            samples[name].append(sample(device, run, times))
    return {name: Times.of(found) for name, found in samples.items()}
