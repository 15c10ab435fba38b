"""Minutes of load while adapters come, change and go and clients leave: what the server holds must stay where it is.

    python -m loadtests soak

Clients ask a few adapters and the base. Meanwhile one adapter a second is published under a new name, one of the few is
replaced, and the oldest of the new ones is deleted. The load comes in parts; at the end of each all clients leave in
the middle of their replies.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from .client import Target, run_clients
from .errors import LoadTestError
from .make_adapters import make_adapters, read_shapes
from .process import Server, adapter_parts, started_server
from .publishing import Parts, retouched
from .report import Figure, figures_table, write_json
from .watch import ProcessWatch
from .workload import Workload

KEPT = 8  # new adapters that are there at the same time
STEEPEST, RISEN = 1.0, 1.0  # megabytes a minute; threads or descriptors


class Churn(threading.Thread):
    """Publishes, replaces and deletes, once each in `period` seconds, until it is stopped."""

    def __init__(self, server: Server, few: Sequence[str], parts: Sequence[Parts], period: float) -> None:
        super().__init__(name="churn", daemon=True)
        self._server, self._few, self._parts, self._period = server, few, parts, period
        self._ended = threading.Event()
        self._there: deque[str] = deque()
        self.done: Counter[str] = Counter()
        self.errors: list[str] = []

    def run(self) -> None:
        number, began = 0, time.monotonic()
        while not self._ended.wait(max(0.0, began + number * self._period - time.monotonic())):
            try:
                self._once(number)
            except LoadTestError as error:
                self.errors.append(str(error))
            number += 1

    def stop(self) -> None:
        self._ended.set()
        self.join()

    def _once(self, number: int) -> None:
        parts = retouched(self._parts[number % len(self._parts)], number % (1 << 15))
        self._server.put(self._few[number % len(self._few)], parts)
        self.done["replaced"] += 1
        self._there.append(f"new{number}")
        self._server.put(self._there[-1], parts)
        self.done["published"] += 1
        if len(self._there) > KEPT:
            self._server.call("DELETE", f"/v1/adapters/{self._there.popleft()}")
            self.done["deleted"] += 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", type=Path, help="directory of the base checkpoint (default: the server's default)")
    parser.add_argument("--seconds", type=float, default=600.0, help="of load (default: 600)")
    parser.add_argument("--parts", type=int, default=20, help="the load comes in so many parts (default: 20)")
    parser.add_argument("--few", type=int, default=16, help="adapters that are asked for (default: 16)")
    parser.add_argument("--rank", type=int, default=8, help="of all adapters (default: 8)")
    parser.add_argument("--clients", type=int, default=16, help="closed-loop clients (default: 16)")
    parser.add_argument("--period", type=float, default=1.0, help="seconds between two changes (default: 1)")
    parser.add_argument("--out", type=Path, default=Path("loadtests/results"), help="where soak.json goes")


def main(args: argparse.Namespace) -> int:
    """0 if nothing failed and nothing grows."""
    with tempfile.TemporaryDirectory(prefix="loadtest-adapters-") as scratch:
        made = make_adapters(Path(scratch), read_shapes(args.base), [args.rank] * args.few)
        parts = [adapter_parts(directory) for directory in made.values()]
        with started_server(args.base, log=args.out / "server.log.tmp") as server:
            for name, directory in made.items():
                server.upload(name, directory)
            assert server.pid is not None
            churn, watch = Churn(server, tuple(made), parts, args.period), ProcessWatch(server.pid)
            churn.start()
            watch.start()
            replies, failed, cut = _load(server, tuple(made), args)
            churn.stop()
            watch.stop()
    errors = [*(f"{times} x {error}" for error, times in failed.items()), *churn.errors]
    found = figures(watch, len(errors), after=args.seconds / 4)
    print("\n" + figures_table(found))
    print(
        f"{replies} replies, {cut} left in the middle; adapters " + ", ".join(f"{n} {w}" for w, n in churn.done.items())
    )
    for line in errors[:10]:
        print(f"  {line}")
    write_json(
        args.out / "soak.json",
        {
            "settings": {name: value for name, value in vars(args).items() if isinstance(value, (int, float))},
            "figures": {name: value for name, value, _, _ in found},
            "replies": replies,
            "cut": cut,
            "churn": dict(churn.done),
            "errors": errors,
            "samples": [asdict(sample) for sample in watch.samples],
        },
    )
    return 0 if all(reached for *_, reached in found) else 1


def _load(server: Server, names: tuple[str, ...], args: argparse.Namespace) -> tuple[int, Counter[str], int]:
    """Replies that came whole, what failed, and how many were left open."""
    target = Target(server.url, server.base_model())
    replies, cut, failed = 0, 0, Counter[str]()
    for part in range(args.parts):
        workload = Workload(adapters=names, popularity="zipf", base_share=0.2, max_tokens=64, seed=part)
        seconds = args.seconds / args.parts
        requests = workload.requests(int(seconds * 40))
        run = asyncio.run(run_clients(target, requests, clients=args.clients, seconds=seconds))
        failed += Counter(outcome.error for outcome in run.outcomes if outcome.error is not None)
        whole = sum(outcome.finish is not None for outcome in run.outcomes)
        replies, cut = replies + whole, cut + run.cut
        print(f"part {part + 1}/{args.parts}: {whole} replies, {run.cut} left open", flush=True)
    return replies, failed, cut


def figures(watch: ProcessWatch, errors: int, after: float) -> list[Figure]:
    """What is held against its target, over the samples from `after` seconds on."""
    slope = watch.slope(after)
    risen = {what: watch.risen(what, after) for what in ("threads", "descriptors")}
    return [
        ("errors", float(errors), "0", errors == 0),
        ("memory after the first quarter, MB a minute", slope, f"< {STEEPEST:g}", slope < STEEPEST),
        *((f"{what}, last quarter over first", n, f"<= {RISEN:g}", n <= RISEN) for what, n in risen.items()),
    ]
