"""Streams go on while adapters are replaced: how much longer the pauses between their tokens get.

    python -m loadtests pauses

Interleaved rounds of the same streams on the quiet server, while adapters without a fingerprint are replaced, and while
adapters with one are, which the server replays. The streams use other adapters than those that are replaced.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .client import Run, Target, run_clients
from .errors import LoadTestError
from .make_adapters import make_adapters, read_shapes
from .process import Server, adapter_parts, started_server
from .publishing import Parts, Publisher, retouched
from .report import percentile, table, write_json
from .workload import Workload

TARGET = 1.5
EXAMPLES = Path("adapters/examples")
REPLACED = ("replaced0", "replaced1", "replaced2", "replaced3")


@dataclass(slots=True)
class Condition:
    """What is done beside the streams, and what came of it, round by round.

    Attributes:
        per_second: uploads wanted; 0 for none.
        p99: between two events of a stream, in seconds.
        rates: uploads that were done, per second.
    """

    label: str
    per_second: float
    parts: Callable[[int], Parts]
    p50: list[float] = field(default_factory=list)
    p99: list[float] = field(default_factory=list)
    tokens_per_second: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)

    def beside(self, publisher: Publisher) -> AbstractContextManager[None]:
        return publisher.steadily(self.per_second) if self.per_second else contextlib.nullcontext()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", type=Path, help="directory of the base checkpoint (default: the server's default)")
    parser.add_argument(
        "--fingerprinted",
        type=Path,
        nargs="+",
        default=[EXAMPLES / "spam", EXAMPLES / "tweets"],
        help="directories of adapters with fingerprints (default: the examples that have one)",
    )
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default: 5)")
    parser.add_argument("--seconds", type=float, default=15.0, help="of one condition in a round (default: 15)")
    parser.add_argument("--clients", type=int, default=8, help="streams, each with an adapter of its own (default: 8)")
    parser.add_argument("--plain-rate", type=float, default=5.0, help="replacements a second without replay")
    parser.add_argument("--replay-rate", type=float, default=1.0, help="replacements a second with replay")
    parser.add_argument("--rank", type=int, default=8, help="of the streams' and the replaced adapters (default: 8)")
    parser.add_argument("--out", type=Path, default=Path("loadtests/results"), help="where pauses.json goes")


def main(args: argparse.Namespace) -> int:
    """0 if the medians are within the target."""
    fingerprinted = [adapter_parts(directory) for directory in args.fingerprinted]
    if not all("fingerprint" in parts for parts in fingerprinted):
        raise LoadTestError("one of --fingerprinted has no fingerprint.json")
    shapes = read_shapes(args.base)
    with tempfile.TemporaryDirectory(prefix="loadtest-adapters-") as scratch:
        made = make_adapters(Path(scratch), shapes, [args.rank] * args.clients)
        small = make_adapters(
            Path(scratch), shapes, [args.rank] * len(REPLACED), prefix="new", targets=("q_proj", "v_proj"), seed=1
        )
        plain = [adapter_parts(directory) for directory in small.values()]
        with started_server(args.base, log=args.out / "server.log.tmp") as server:
            for name, directory in made.items():
                server.upload(name, directory)
            conditions = [
                Condition("quiet", 0.0, lambda number: {}),
                Condition(
                    f"{args.plain_rate:g} replaced a second",
                    args.plain_rate,
                    lambda number: retouched(plain[number % len(plain)], number // len(plain)),
                ),
                Condition(
                    f"{args.replay_rate:g} a second, replayed",
                    args.replay_rate,
                    lambda number: fingerprinted[(number // len(REPLACED)) % len(fingerprinted)],
                ),
            ]
            errors = measure(server, tuple(made), conditions, args)
    print("\n" + show(conditions))
    for error in errors[:10]:
        print(f"  {error}")
    write_json(args.out / "pauses.json", {"errors": errors, "conditions": {it.label: _json(it) for it in conditions}})
    return 0 if not errors and all(slower(it, conditions[0]) <= TARGET for it in conditions) else 1


def measure(server: Server, names: tuple[str, ...], conditions: list[Condition], args: argparse.Namespace) -> list[str]:
    """Fills in the conditions; what failed."""
    target = Target(server.url, server.base_model())
    workload = Workload(adapters=names, max_tokens=128)
    publishers = [Publisher(server, REPLACED, condition.parts) for condition in conditions]
    errors: list[str] = []
    for number in range(-1, args.rounds):  # round -1 warms up
        turn = number % len(conditions)
        for place in [*range(turn, len(conditions)), *range(turn)]:
            condition, publisher = conditions[place], publishers[place]
            seconds, before = args.seconds if number >= 0 else 5.0, len(publisher.done)
            with condition.beside(publisher):
                run = asyncio.run(run_clients(target, workload.requests(4096), clients=args.clients, seconds=seconds))
            errors += [outcome.error for outcome in run.outcomes if outcome.error is not None]
            if number >= 0:
                _add(condition, run, (len(publisher.done) - before) / run.seconds)
                print(
                    f"round {number + 1}/{args.rounds}  {condition.label:22}  p99 {1000 * condition.p99[-1]:.0f} ms, "
                    f"{condition.rates[-1]:.2f} replaced a second",
                    flush=True,
                )
    return errors + [error for publisher in publishers for error in publisher.errors]


def _add(condition: Condition, run: Run, rate: float) -> None:
    gaps = [gap for outcome in run.outcomes for gap in outcome.inter_token_seconds]
    condition.p50.append(percentile(gaps, 0.50) or 0.0)
    condition.p99.append(percentile(gaps, 0.99) or 0.0)
    condition.tokens_per_second.append(sum(outcome.tokens for outcome in run.outcomes) / run.seconds)
    condition.rates.append(rate)


def slower(condition: Condition, quiet: Condition) -> float:
    """The median, over the rounds, of its p99 over the quiet server's."""
    return statistics.median(own / still for own, still in zip(condition.p99, quiet.p99, strict=True))


def show(conditions: list[Condition]) -> str:
    head = ["condition", "done a second", "tok/s", "p50 ms", "p99 ms", "p99 over quiet", "target"]
    rows = [
        [
            it.label,
            f"{statistics.median(it.rates):.2f}",
            f"{statistics.median(it.tokens_per_second):.0f}",
            f"{1000 * statistics.median(it.p50):.0f}",
            f"{1000 * statistics.median(it.p99):.0f}",
            f"{slower(it, conditions[0]):.2f}x",
            f"{TARGET:g}x",
        ]
        for it in conditions
    ]
    return table([head, *rows])


def _json(condition: Condition) -> dict[str, Any]:
    return {name: getattr(condition, name) for name in ("per_second", "p50", "p99", "tokens_per_second", "rates")}
