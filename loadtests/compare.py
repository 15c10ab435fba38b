"""Ours beside `transformers` + `peft`, same NF4 base and prompts: interleaved rounds, median ratios, memory."""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .baselines import Worker
from .client import Run, Target, run_clients
from .errors import LoadTestError
from .make_adapters import make_adapters, read_shapes
from .memory import Memory, memory_table, read_memory
from .process import Server, started_server
from .report import Summary, summarize, summary_table, table, write_json
from .workload import Workload, adapter_ranks

TARGETS = {"mixed": 4.0, "base": 1.3}
WARM_UP_TOKENS = 4
WARM_UP_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Comparison:
    """One scenario over all rounds. Rates are tokens per second, one per round; ratios are taken within a round."""

    scenario: str
    baseline: str
    ours: list[float]
    theirs: list[float]
    target: float

    @property
    def ratios(self) -> list[float]:
        return [ours / theirs for ours, theirs in zip(self.ours, self.theirs, strict=True)]

    @property
    def median_ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def reached(self) -> bool:
        return self.median_ratio >= self.target


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", type=Path, required=True, help="directory of the base checkpoint, for both sides")
    parser.add_argument("--rounds", type=int, default=5, help="rounds; each measures all four in turn (default: 5)")
    parser.add_argument("--clients", type=int, default=32, help="clients, and rows of a baseline batch (default: 32)")
    parser.add_argument("--adapters", type=int, default=16, help="adapters (default: 16)")
    parser.add_argument("--rank", type=int, nargs="+", default=[16], help="their ranks, taken in turn (default: 16)")
    parser.add_argument("--max-tokens", type=int, default=64, help="new tokens of every reply (default: 64)")
    parser.add_argument(
        "--requests", type=int, default=64, help="requests of one of our rounds (default: 64, two waves)"
    )
    parser.add_argument("--round-seconds", type=float, default=120.0, help="most seconds of one of our measurements")
    parser.add_argument(
        "--total-seconds", type=float, default=1200.0, help="no round begins after so many seconds (default: 1200)"
    )
    parser.add_argument(
        "--attention", default="eager", help="the baselines' attention: eager (default: the faster one on CPU) or sdpa"
    )
    parser.add_argument("--serve-args", nargs=argparse.REMAINDER, default=[], help="the rest goes to `loramux serve`")
    parser.add_argument("--out", type=Path, default=Path("loadtests/results"), help="where compare.json and .png go")


class Rounds:
    """The four things that are measured, on one server and one worker. Only one side is busy at any time."""

    def __init__(self, args: argparse.Namespace, server: Server, worker: Worker, adapters: tuple[str, ...]) -> None:
        self._args = args
        self._target = Target(server.url, server.base_model())
        self._worker = worker
        self._mixed = Workload(adapters=adapters, max_tokens=args.max_tokens)
        self._base = Workload(max_tokens=args.max_tokens)
        self.runs: dict[str, list[Run]] = {"mixed": [], "base": []}

    def ours(self, scenario: str, number: int) -> float:
        requests = self._workload(scenario, number).requests(self._args.requests)
        run = asyncio.run(
            run_clients(self._target, requests, clients=self._args.clients, seconds=self._args.round_seconds)
        )
        failed = [outcome.error for outcome in run.outcomes if outcome.error is not None]
        if failed:
            raise LoadTestError(f"{len(failed)} of {len(requests)} requests failed, the first with: {failed[0]}")
        self.runs[scenario].append(run)
        return sum(outcome.tokens for outcome in run.outcomes) / run.seconds

    def theirs(self, scenario: str, number: int) -> float:
        """The first batch of the very same requests."""
        requests = self._workload(scenario, number).requests(self._args.clients)
        return self._worker.measure(
            "peft" if scenario == "mixed" else "static",
            [request.prompt for request in requests],
            [request.adapter for request in requests],
            self._args.max_tokens,
        )

    def _workload(self, scenario: str, number: int) -> Workload:
        """Each round has prompts of its own: our prefix cache would know those of the last."""
        return replace(self._mixed if scenario == "mixed" else self._base, seed=number + 1)

    def warm_up(self) -> None:
        """A few tokens of everything, unmeasured: first forwards repack weights, first requests load adapters."""
        for kind, workload in (("peft", self._mixed), ("static", self._base)):
            requests = replace(workload, max_tokens=WARM_UP_TOKENS).requests(self._args.clients)
            asyncio.run(run_clients(self._target, requests, clients=self._args.clients, seconds=WARM_UP_SECONDS))
            self._worker.measure(kind, [it.prompt for it in requests], [it.adapter for it in requests], WARM_UP_TOKENS)


def measure(rounds: Rounds, count: int, seconds: float, say: Callable[[str], None]) -> list[Comparison]:
    """`count` interleaved rounds, fewer if `seconds` have passed; the side that begins changes from round to round."""
    deadline = time.monotonic() + seconds
    sides = {"ours": rounds.ours, "theirs": rounds.theirs}
    rates: dict[tuple[str, str], list[float]] = {(side, what): [] for side in sides for what in TARGETS}
    for number in range(count):
        if number and time.monotonic() > deadline:
            say(f"{count - number} rounds left out, the time is up")
            break
        for scenario in TARGETS:
            for side in list(sides) if number % 2 == 0 else reversed(list(sides)):
                rate = sides[side](scenario, number)
                rates[side, scenario].append(rate)
                say(f"round {number + 1}/{count}  {scenario:5}  {side:6}  {rate:7.1f} tok/s")
    baselines = {"mixed": "peft generate(adapter_names)", "base": "static generate"}
    return [
        Comparison(it, baselines[it], rates["ours", it], rates["theirs", it], target) for it, target in TARGETS.items()
    ]


def comparison_table(comparisons: Sequence[Comparison]) -> str:
    head = ["scenario", "baseline", "ours tok/s", "theirs tok/s", "median ratio", "min .. max", "target", "reached"]
    rows = [
        [
            it.scenario,
            it.baseline,
            f"{statistics.median(it.ours):.1f}",
            f"{statistics.median(it.theirs):.1f}",
            f"{it.median_ratio:.2f}x",
            f"{min(it.ratios):.2f} .. {max(it.ratios):.2f}",
            f"{it.target:g}x",
            "yes" if it.reached else "NO",
        ]
        for it in comparisons
    ]
    return table([head, *rows])


def plot_comparison(path: Path, comparisons: Sequence[Comparison], memory: Memory) -> None:
    """Ratios of every round against the targets, rates of both sides, and memory."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    ratios, rates, sizes = figure.subplots(1, 3)
    for place, it in enumerate(comparisons):
        ratios.plot([place] * len(it.ratios), it.ratios, "o", color="tab:blue", alpha=0.5)
        ratios.hlines(
            it.median_ratio, place - 0.3, place + 0.3, color="tab:blue", label="median" if not place else None
        )
        ratios.hlines(
            it.target, place - 0.3, place + 0.3, color="tab:red", ls="--", label="target" if not place else None
        )
        rates.bar(place - 0.2, statistics.median(it.ours), 0.4, color="tab:blue", label="ours" if not place else None)
        rates.bar(
            place + 0.2, statistics.median(it.theirs), 0.4, color="tab:gray", label="baseline" if not place else None
        )
    names = [it.scenario for it in comparisons]
    ratios.set(title="ratio to the baseline, by round", xticks=range(len(names)), xticklabels=names, ylim=(0, None))
    rates.set(title="tokens per second, median", xticks=range(len(names)), xticklabels=names)
    for axes in (ratios, rates):  # each label once, although every scenario brings its own
        handles, labels = axes.get_legend_handles_labels()
        once = dict(zip(labels, handles, strict=True))
        axes.legend(once.values(), once.keys(), fontsize="small")
    below = 0.0
    for name, size in memory.pools.items():
        sizes.bar("accounted", size / 2**20, bottom=below, label=name)
        below += size / 2**20
    sizes.bar("resident", memory.process.get("rss", 0) / 2**20, color="tab:gray")
    sizes.bar("merged copies", memory.merged / 2**20, color="tab:red")
    sizes.set(title="memory, MiB")
    sizes.margins(y=0.4)
    sizes.legend(fontsize="small", ncols=2, loc="upper center")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(args: argparse.Namespace) -> int:
    """Returns 0 where every target is reached, 1 where one is not."""
    with tempfile.TemporaryDirectory(prefix="loadtest-adapters-") as scratch:
        made = make_adapters(Path(scratch), read_shapes(args.base), adapter_ranks(tuple(args.rank), args.adapters))
        log = args.out / "server.log.tmp"
        with started_server(args.base, arguments=args.serve_args, log=log) as server:
            for name, directory in made.items():
                server.upload(name, directory)
            print(f"{len(made)} adapters uploaded; starting the baselines", flush=True)
            worker = Worker(args.base, made, args.attention)
            try:
                rounds = Rounds(args, server, worker, tuple(made))
                rounds.warm_up()
                comparisons = measure(rounds, args.rounds, args.total_seconds, lambda line: print(line, flush=True))
            finally:
                worker.close()
            memory = read_memory(server, args.base, args.adapters)
    summaries = [
        summarize(f"{what}, round {place + 1}", run)
        for what, runs in rounds.runs.items()
        for place, run in enumerate(runs)
    ]
    print(
        "\n".join(
            ["", summary_table(summaries), "", comparison_table(comparisons), "", memory_table(memory, args.adapters)]
        )
    )
    write_json(args.out / "compare.json", document(args, comparisons, memory, summaries))
    plot_comparison(args.out / "compare.png", comparisons, memory)
    print(f"\nwritten: {args.out / 'compare.json'}, {args.out / 'compare.png'}")
    return 0 if all(it.reached for it in comparisons) else 1


def document(
    args: argparse.Namespace, comparisons: Sequence[Comparison], memory: Memory, summaries: Sequence[Summary]
) -> dict[str, Any]:
    """Everything measured, for the JSON file. The base is named by its directory's last part alone."""
    return {
        "settings": {
            "base": args.base.name,
            "rounds": args.rounds,
            "clients": args.clients,
            "adapters": args.adapters,
            "ranks": args.rank,
            "max_tokens": args.max_tokens,
            "requests": args.requests,
            "baseline_attention": args.attention,
            "serve_args": args.serve_args,
        },
        "comparisons": [
            {**asdict(it), "ratios": it.ratios, "median_ratio": it.median_ratio, "reached": it.reached}
            for it in comparisons
        ],
        "memory": {**asdict(memory), "accounted": memory.accounted, "off_by": memory.off_by},
        "runs": [asdict(summary) for summary in summaries],
    }
