"""Whole decode steps of ours by rows and adapters, as graphs and from the host, and where the time of one goes."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from measure.ours import OurSteps
from measure.part import Launches, Part
from measure.shapes import Shape, random_base
from measure.timing import interleaved, sample

ROWS, ADAPTERS = (1, 16, 32, 128), (0, 1, 16, 64)
LOOKED_INTO = (32, 16)  # the step whose kernels are timed one by one
HTTP_ROWS = (64, 16)  # what 64 clients over HTTP are compared with
AHEAD = 32  # steps from the host in a row


def cases(shape: Shape, free: int, *, dry: bool) -> list[tuple[int, int]]:
    """(rows, adapters): those that fit into `free` bytes."""
    if dry:
        return [(1, 0), (2, 2)]
    wanted = [*((rows, adapters) for rows in ROWS for adapters in ADAPTERS if adapters <= rows), HTTP_ROWS]
    return [case for case in wanted if shape.fits(*case, free)]


def main() -> int:
    part = Part(__doc__)
    with part.device.used(), torch.inference_mode():
        return measure(part)


def measure(part: Part) -> int:
    device, shape = part.device, part.shape
    wanted = cases(shape, device.memory().free, dry=part.dry)
    if not wanted:
        print(f"{device.report()}: there is no room for a base of this shape")
        return 1
    began = time.monotonic()
    model = random_base(shape, device)
    ours = OurSteps(
        model, shape, device, rows=max(rows for rows, _ in wanted), adapters=max(count for _, count in wanted)
    )
    if ours.decoder is None:
        print(f"there is no whole step on this device: {ours.why}")
        return 1
    device.synchronize()
    part.write(shape=asdict(shape), seconds_to_build=time.monotonic() - began, held=device.memory().held)
    part.write(told=ours.lines)
    part.say(f"{ours.lines[-1] if ours.lines else 'no graphs'}; {time.monotonic() - began:.0f} s so far")
    times = 1 if part.dry else 8
    found = interleaved(
        device,
        {str(case): partial(ours.ready, *case) for case in wanted},
        rounds=part.rounds,
        times=times,
        until=part.until,
    )
    lines = []
    for rows, adapters in wanted:
        each = found[str((rows, adapters))]
        lines.append(
            {
                "rows": rows,
                "adapters": adapters,
                "ms": each.median,
                "lowest": each.lowest,
                "highest": each.highest,
                "bytes": shape.bytes_of_step(rows, adapters),
                "graph": ours.is_graph(rows, adapters),
                "from_host_ms": from_host(ours, rows, adapters, 2 if part.dry else AHEAD),
            }
        )
        part.write(cases=lines)
    case = LOOKED_INTO if LOOKED_INTO in wanted else wanted[-1]
    part.write(kernels=kernels_of(part, ours, *case), kernels_of=case)
    return 0


def from_host(ours: OurSteps, rows: int, adapters: int, times: int) -> float:
    """Milliseconds of a step by the clock, with the next one started before the answers of one are read."""
    ours.start(rows, adapters).read()
    began = time.perf_counter()
    before = ours.start(rows, adapters)
    for _ in range(times - 1):
        after = ours.start(rows, adapters)
        before.read()
        before = after
    before.read()
    return (time.perf_counter() - began) / times * 1e3


def kernels_of(part: Part, ours: OurSteps, rows: int, adapters: int) -> list[dict[str, Any]]:
    """A step's kernels, by name and the shape of the largest tensor that they read, the slowest first.

    All launches of one kernel are captured as a graph of their own, which finds caches and clocks as a step does not:
    the sum is near a step's time, and not the same.
    """
    device = part.device
    assert isinstance(device, Launches)
    ours.start(rows, adapters).read()
    shape = ours.shape(rows, adapters)
    device.log = []
    ours.decoder.run(shape)
    launches, device.log = device.log, None
    device.synchronize()
    by_name: dict[str, list[Any]] = {}
    for launch in launches:
        by_name.setdefault(_name(launch), []).append(launch)
    found = []
    for name, some in by_name.items():

        def run(some: list[Any] = some) -> None:
            for kernel, grid, args, constants in some:
                device.launch(kernel, grid, *args, **constants)

        replay: Callable[[], None] = device.capture(run)[0]
        replay()
        samples = sorted(sample(device, replay, 1 if part.dry else 4) for _ in range(part.rounds))
        ms = samples[len(samples) // 2]
        nbytes = sum(max(map(_bytes, launch[2])) for launch in some)
        one = {"kernel": name, "launches": len(some), "ms": ms}
        if name.startswith(("nf4.product", "dense.product")):  # they read all of their largest tensor once
            one["gb_per_s"] = nbytes / ms / 1e6
        found.append(one)
    return sorted(found, key=lambda one: -one["ms"])


def _bytes(arg: Any) -> int:
    """Of a tensor that is no list: lists and scratch are of one dimension."""
    return arg.numel() * arg.element_size() if isinstance(arg, torch.Tensor) and arg.dim() > 1 else 0


def _name(launch: tuple[Any, ...]) -> str:
    kernel, _, args, _ = launch
    module = getattr(getattr(kernel, "fn", kernel), "__module__", "").rpartition(".")[2]
    largest = max(args, key=_bytes)
    of = " ".join(map(str, largest.shape)) if _bytes(largest) else ""
    return f"{module}.{getattr(kernel, '__name__', type(kernel).__name__).strip('_')} [{of}]"


if __name__ == "__main__":
    sys.exit(main())
