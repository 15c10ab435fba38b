"""One scenario against a server that is up, or a small sweep against one that is started for it.

The keys of a server that asks for some are read from LORAMUX_API_KEY and, for uploads, LORAMUX_ADMIN_KEY.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from .client import Target, run_clients
from .make_adapters import make_adapters, read_shapes
from .process import Server, started_server
from .report import Summary, summarize, summary_table, write_report
from .workload import POPULARITIES, Workload, adapter_ranks

MIXED_RANKS = (4, 8, 16, 32, 64)


@dataclass(frozen=True, slots=True)
class Scenario:
    """One line of the report: a workload and how many clients send how much of it."""

    label: str
    workload: Workload
    clients: int
    requests: int


def sweep(names: Sequence[str], mixed_ranks: Sequence[str], *, max_tokens: int, seed: int) -> list[Scenario]:
    """Ours at a glance: clients, adapters, popularity, ranks and prompt lengths, each changed from one middle case.

    Args:
        names: adapters of one rank.
        mixed_ranks: adapters of different ranks.
    """
    base = Workload(max_tokens=max_tokens, seed=seed)
    middle = replace(base, adapters=tuple(names))
    scenarios = [Scenario("base, 1 client", base, 1, 2)]
    scenarios += [Scenario(f"base, {clients} clients", base, clients, 2 * clients) for clients in (8, 32)]
    scenarios += [Scenario("1 adapter, 1 client", replace(middle, adapters=(names[0],)), 1, 2)]
    many = f"{len(names)} adapters"
    scenarios += [Scenario(f"{many}, {clients} clients", middle, clients, 2 * clients) for clients in (16, 32)]
    scenarios += [
        Scenario(f"{many}, {popularity}", replace(middle, popularity=popularity), 32, 64)
        for popularity in POPULARITIES
        if popularity != "distinct"  # the line above
    ]
    scenarios += [
        Scenario(f"{many}, half base", replace(middle, base_share=0.5), 32, 64),
        Scenario("mixed ranks", replace(middle, adapters=tuple(mixed_ranks)), 32, 64),
        Scenario("base, 800-word prompts", replace(base, prompt_words=(800, 800), max_tokens=8), 1, 4),
        Scenario("760 of them shared", replace(base, prompt_words=(40, 40), shared_words=760, max_tokens=8), 1, 8),
        Scenario("base, 400-word prompts", replace(base, prompt_words=(400, 400)), 8, 16),
        Scenario(f"{many}, 400-word prompts", replace(middle, prompt_words=(400, 400)), 8, 16),
    ]
    # Prompts that no scenario before has asked: the prefix cache would know them.
    return [replace(it, workload=replace(it.workload, seed=100 * seed + n)) for n, it in enumerate(scenarios)]


def run_scenarios(
    target: Target, scenarios: Sequence[Scenario], *, seconds: float, total: float, say: Callable[[str], None]
) -> list[Summary]:
    """Each scenario for at most `seconds`, all of them for at most `total`; what does not fit is left out and said."""
    deadline = time.monotonic() + total
    summaries = []
    for scenario in scenarios:
        left = deadline - time.monotonic()
        if left < 1:
            say(f"{scenario.label}: left out, the time is up")
            continue
        requests = scenario.workload.requests(scenario.requests)
        run = asyncio.run(run_clients(target, requests, clients=scenario.clients, seconds=min(seconds, left)))
        summaries.append(summarize(scenario.label, run))
        say(f"{scenario.label}: {summaries[-1].tokens_per_second:.1f} tok/s in {run.seconds:.1f} s")
        for error, times in summaries[-1].errors.items():
            say(f"  {times} x {error}")
    return summaries


def add_arguments(parser: argparse.ArgumentParser) -> None:
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--url", help="a server that is up, such as http://127.0.0.1:8000: runs one scenario")
    where.add_argument("--spawn", action="store_true", help="start a server with random adapters: runs the sweep")
    one = parser.add_argument_group("one scenario (--url)")
    one.add_argument("--adapter", nargs="*", default=[], metavar="NAME", help="adapters the server has; none: the base")
    one.add_argument("--make", type=int, default=0, metavar="N", help="make and upload N random adapters, and use them")
    one.add_argument("--popularity", choices=POPULARITIES, default="distinct", help="how requests spread over adapters")
    one.add_argument("--zipf-exponent", type=float, default=1.0, help="for --popularity zipf (default: 1)")
    one.add_argument("--base-share", type=float, default=0.0, help="part of the requests to the base (default: 0)")
    one.add_argument(
        "--prompt-words", type=int, nargs=2, default=(20, 40), metavar=("MIN", "MAX"), help="prompt length"
    )
    one.add_argument("--clients", type=int, default=32, help="closed-loop clients (default: 32)")
    one.add_argument("--requests", type=int, default=64, help="requests of all clients together (default: 64)")
    one.add_argument("--extra", type=json.loads, default={}, metavar="JSON", help="more fields of every request's body")
    spawned = parser.add_argument_group("sweep (--spawn)")
    spawned.add_argument("--adapters", type=int, default=16, help="adapters of one rank (default: 16)")
    spawned.add_argument("--serve-args", nargs=argparse.REMAINDER, default=[], help="the rest goes to `loramux serve`")
    both = parser.add_argument_group("both")
    both.add_argument(
        "--base", type=Path, help="directory of the base checkpoint (default: the server's own default base)"
    )
    both.add_argument("--ranks", type=int, nargs="+", default=[16], help="of made adapters, in turn (default: 16)")
    both.add_argument("--max-tokens", type=int, default=64, help="of every reply (default: 64)")
    both.add_argument("--seconds", type=float, default=60.0, help="most seconds of one scenario (default: 60)")
    both.add_argument("--total-seconds", type=float, default=480.0, help="most seconds of all scenarios (default: 480)")
    both.add_argument("--seed", type=int, default=0, help="of prompts, draws and made adapters (default: 0)")
    both.add_argument("--out", type=Path, default=Path("loadtests/results"), help="where run.json and run.png go")


def upload_adapters(server: Server, base: Path | None, ranks: Sequence[int], prefix: str, seed: int) -> tuple[str, ...]:
    """Make one random adapter for each rank and upload it; the names."""
    with tempfile.TemporaryDirectory(prefix="loadtest-adapters-") as scratch:
        made = make_adapters(Path(scratch), read_shapes(base), ranks, prefix=prefix, seed=seed)
        for name, directory in made.items():
            server.upload(name, directory)
    return tuple(made)


@contextmanager
def chosen_server(args: argparse.Namespace) -> Iterator[tuple[Server, list[Scenario]]]:
    """The server that `args` ask for and what to run against it."""
    if args.spawn:
        log = args.out / "server.log.tmp"
        with started_server(args.base, arguments=args.serve_args, log=log) as server:
            names = upload_adapters(
                server, args.base, adapter_ranks(tuple(args.ranks), args.adapters), "load", args.seed
            )
            mixed = upload_adapters(
                server, args.base, adapter_ranks((4, 8, 16, 32, 64), args.adapters), "mixed", args.seed
            )
            yield server, sweep(names, mixed, max_tokens=args.max_tokens, seed=args.seed)
        return
    server = Server(args.url, api_key=args.api_key, admin_key=args.admin_key)
    names = upload_adapters(server, args.base, adapter_ranks(tuple(args.ranks), args.make), "load", args.seed)
    workload = Workload(
        adapters=(*args.adapter, *names),
        popularity=args.popularity,
        zipf_exponent=args.zipf_exponent,
        base_share=args.base_share,
        prompt_words=tuple(args.prompt_words),
        max_tokens=args.max_tokens,
        seed=args.seed,
    )
    label = f"{len(workload.adapters)} adapters, {args.popularity}" if workload.adapters else "base"
    yield server, [Scenario(label, workload, args.clients, args.requests)]


def main(args: argparse.Namespace) -> int:
    """Returns 0 where every request was answered, 1 where one failed."""
    with chosen_server(args) as (server, scenarios):
        target = Target(server.url, server.base_model(), server.api_key, args.extra)
        summaries = run_scenarios(
            target,
            scenarios,
            seconds=args.seconds,
            total=args.total_seconds,
            say=lambda line: print(line, flush=True),
        )
    print(f"\n{summary_table(summaries)}")
    settings = {"scenarios": [asdict(scenario) for scenario in scenarios], "ranks": args.ranks}
    for path in write_report(args.out, "run", summaries, settings):
        print(f"written: {path}")
    return 1 if any(summary.errors for summary in summaries) else 0
