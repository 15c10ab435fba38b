"""What adapters cost those who do not ask for them, and those who do, as ratios within interleaved rounds.

    python -m loadtests cost

Four servers of ours take turns, the others being frozen meanwhile: one that never had an adapter, one with a few, all
in their slots, one with the same few among many registered, and one with 64 of one rank and 64 of mixed ranks.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from .client import Run, run_clients
from .make_adapters import make_adapters, read_shapes
from .peers.servers import Side, ours
from .registry import RANKS, TARGETS
from .report import summarize, summary_table, table, write_json
from .workload import Workload, adapter_ranks

RANK = 16
FEW, EVEN, MIXED = "few", "even", "mixed"  # how their names begin: of rank 16, twice, and mixed
MIXED_RANKS, SET = (16, 64, 4, 32, 8), 64  # those asked most are neither the small nor the large ones


@dataclass(frozen=True, slots=True)
class Load:
    """Requests of one kind to one of the servers. `adapters`: how the names of those asked begin; empty: the base."""

    server: str
    adapters: str
    clients: int
    popularity: str = "distinct"

    @property
    def label(self) -> str:
        return f"{self.server}: {self.adapters or 'base'}, {self.clients} clients"


@dataclass(slots=True)
class Comparison:
    """The rate of one load over that of another, round by round; `same_replies`: they must also answer alike."""

    label: str
    load: Load
    beside: Load
    least: float
    same_replies: bool = False
    ratios: list[float] = field(default_factory=list)
    different: int = 0

    @property
    def reached(self) -> bool:
        return statistics.median(self.ratios) >= self.least and not self.different


def comparisons() -> list[Comparison]:
    """Those that are promised."""
    few, mixed = Load("few", FEW, 32), Load("sets", MIXED, 64, "zipf")
    return [
        Comparison("base, adapters resident", Load("few", "", 32), Load("none", "", 32), least=0.97, same_replies=True),
        Comparison("the few, many registered", Load("many", FEW, 32), few, least=0.97, same_replies=True),
        Comparison("the few beside base, 16 clients", Load("few", FEW, 16), Load("few", "", 16), least=0.88),
        Comparison("the few beside base, 32 clients", few, Load("few", "", 32), least=0.88),
        Comparison("mixed ranks, Zipf's law", mixed, Load("sets", EVEN, 64, "uniform"), least=0.85),
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", type=Path, required=True, help="directory of the base checkpoint")
    parser.add_argument("--few", type=int, default=16, help="adapters of rank 16 on every layer (default: 16)")
    parser.add_argument("--many", type=int, default=1000, help="registered adapters, the few included (default: 1000)")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default: 5)")
    parser.add_argument("--requests", type=int, default=64, help="of one load in a round (default: 64)")
    parser.add_argument("--seconds", type=float, default=60.0, help="most seconds of one load (default: 60)")
    parser.add_argument("--out", type=Path, default=Path("loadtests/results"), help="where cost.json goes")


def main(args: argparse.Namespace) -> int:
    """0 if every request was answered and all targets are reached."""
    wanted = comparisons()
    loads = list(dict.fromkeys(load for it in wanted for load in (it.load, it.beside)))
    names = {
        prefix: tuple(f"{prefix}{number:03d}" for number in range(count))
        for prefix, count in (("", 0), (FEW, args.few), (EVEN, SET), (MIXED, SET))
    }
    failed: list[str] = []
    with tempfile.TemporaryDirectory(prefix="loadtest-cost-") as scratch, ExitStack() as stack:
        sides = _start(args, Path(scratch), stack)
        for number in range(-1, args.rounds):  # round -1 warms up: afterwards the few are in their slots
            turn = number % len(loads)
            runs = {
                load: _run(sides[load.server], load, names[load.adapters], number, args)
                for load in [*loads[turn:], *loads[:turn]]
            }
            failed += [f"{it.label}: {error}" for it, run in runs.items() for error in summarize("", run).errors]
            if number < 0:
                continue
            for comparison in wanted:
                compare(comparison, runs[comparison.load], runs[comparison.beside])
            print(
                f"round {number + 1}/{args.rounds}", *(f"{it.label} {it.ratios[-1]:.3f};" for it in wanted), flush=True
            )
            last = [summarize(load.label, runs[load]) for load in loads]
    print(f"\nthe last round\n{summary_table(last)}\n\n{show(wanted)}")
    for line in failed[:10]:
        print(f"  {line}")
    settings = {"rounds": args.rounds, "requests": args.requests, "few": args.few, "many": args.many, "rank": RANK}
    settings |= {"sets": SET, "mixed_ranks": MIXED_RANKS}
    results = {it.label: {"ratios": it.ratios, "target": it.least, "different_replies": it.different} for it in wanted}
    write_json(args.out / "cost.json", {"settings": settings, "results": results, "errors": failed})
    return 0 if not failed and all(it.reached for it in wanted) else 1


def _start(args: argparse.Namespace, scratch: Path, stack: ExitStack) -> dict[str, Side]:
    """The servers by name, frozen; the many are small, and published by the server itself as it starts."""
    shapes = read_shapes(args.base)
    few = make_adapters(scratch / FEW, shapes, [RANK] * args.few, prefix=FEW)
    sets = make_adapters(scratch / EVEN, shapes, [RANK] * SET, prefix=EVEN)
    sets |= make_adapters(scratch / MIXED, shapes, adapter_ranks(MIXED_RANKS, SET), prefix=MIXED)
    ranks = adapter_ranks(RANKS, args.many - args.few)
    make_adapters(scratch / "rest", shapes, ranks, prefix="rest", targets=TARGETS, dtype="float16")
    sides = {}
    for name, adapters, rest in (
        ("none", few, None),
        ("few", few, None),
        ("many", few, scratch / "rest"),
        ("sets", sets, None),
    ):
        server = ours(
            args.base,
            adapters,
            store=scratch / f"store-{name}",
            log=args.out / f"loramux-{name}.log.tmp",
            lora=name != "none",
            preload=rest,
        )
        sides[name] = stack.enter_context(server)
        print(f"server with {name} is up", flush=True)
    return sides


def _run(side: Side, load: Load, names: tuple[str, ...], number: int, args: argparse.Namespace) -> Run:
    # Where replies are compared, the same prompts on different servers; on one server none comes twice.
    seed = 1000 * load.clients + 4 * (number + 1) + ("", FEW, EVEN, MIXED).index(load.adapters)
    workload = Workload(adapters=names, popularity=load.popularity, seed=seed)
    with side.turn() as target:
        requests = workload.requests(max(args.requests, 2 * load.clients))
        return asyncio.run(run_clients(target, requests, clients=load.clients, seconds=args.seconds))


def compare(comparison: Comparison, run: Run, beside: Run) -> None:
    """Adds one round."""
    rates = [sum(outcome.tokens for outcome in it.outcomes) / it.seconds for it in (run, beside)]
    comparison.ratios.append(rates[0] / rates[1])
    if comparison.same_replies:
        replies = [{(it.adapter, it.prompt): it.text for it in each.outcomes} for each in (run, beside)]
        comparison.different += sum(replies[1].get(asked) != text for asked, text in replies[0].items())


def show(comparisons: Sequence[Comparison]) -> str:
    head = ["tokens a second of", "over", "median (lowest .. highest)", "target", "other replies"]
    rows = [
        [
            it.load.label,
            it.beside.label,
            f"{statistics.median(it.ratios):.3f} ({min(it.ratios):.3f} .. {max(it.ratios):.3f})",
            f">= {it.least}",
            str(it.different) if it.same_replies else "",
        ]
        for it in comparisons
    ]
    return table([head, *rows])
