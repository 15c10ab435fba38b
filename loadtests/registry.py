"""Thousands of registered adapters on a server with room for a few: throughput, waiting, memory, start.

    python -m loadtests registry

Two stores are filled, one with all adapters and one with a few. Servers on each start in turn, and the time until they
are ready is compared. Then clients draw adapters by Zipf's law, from all of them or from the few, in turn, on one
server whose device memory holds the few; its resident size is watched.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from .client import Outcome, Run, Target, run_clients
from .make_adapters import make_adapters, read_shapes
from .process import Server, started_server
from .report import Figure, Summary, figures_table, summarize, summary_table, write_json
from .watch import ProcessWatch
from .workload import Workload, adapter_ranks

RANKS = tuple(range(1, 9))
TARGETS = ("q_proj", "v_proj")  # with half precision, rank 8 on these stays below a megabyte for the default base
STARTS = 3
# Share of throughput; seconds for a first token; megabytes a minute; seconds between the starts.
LEAST_SHARE, LONGEST_WAIT, STEEPEST, LATER = 0.60, 10.0, 1.0, 2.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", type=Path, help="directory of the base checkpoint (default: the server's default)")
    parser.add_argument("--adapters", type=int, default=2000, help="registered adapters (default: 2000)")
    parser.add_argument("--few", type=int, default=16, help="adapters that the device has room for (default: 16)")
    parser.add_argument("--clients", type=int, default=32, help="closed-loop clients (default: 32)")
    parser.add_argument("--zipf-exponent", type=float, default=1.0, help="of the popularity (default: 1)")
    parser.add_argument("--max-tokens", type=int, default=64, help="of every reply (default: 64)")
    parser.add_argument("--seconds", type=float, default=600.0, help="of load over all adapters (default: 600)")
    parser.add_argument("--parts", type=int, default=4, help="the load comes in so many parts (default: 4)")
    parser.add_argument("--few-seconds", type=float, default=40.0, help="of load over the few, before each part")
    parser.add_argument("--adapter-memory-mib", type=int, default=78, help="of the device, for --few of rank 8")
    parser.add_argument("--host-cache-mib", type=int, default=64, help="less than all take, so that the disk is used")
    parser.add_argument("--out", type=Path, default=Path("loadtests/results"), help="where registry.json goes")


def main(args: argparse.Namespace) -> int:
    """0 if all targets are reached."""
    with tempfile.TemporaryDirectory(prefix="loadtest-registry-") as scratch:
        root = Path(scratch)
        make_adapters(
            root / "all", read_shapes(args.base), adapter_ranks(RANKS, args.adapters), targets=TARGETS, dtype="float16"
        )
        names = tuple(sorted(path.name for path in (root / "all").iterdir()))
        (root / "few").mkdir()
        for name in names[: args.few]:
            (root / "few" / name).symlink_to(root / "all" / name)
        largest = max(path.stat().st_size for path in (root / "all").glob("*/*.safetensors"))
        print(f"{len(names)} adapters made, at most {largest / 1e6:.2f} MB each", flush=True)
        starts = {which: [_start(args, root, which, preload=True)] for which in ("few", "all")}
        print(f"stores filled in {starts['few'].pop():.1f} s and {starts['all'].pop():.1f} s, the start included")
        for _ in range(STARTS):
            for which, seconds in starts.items():
                seconds.append(_start(args, root, which))
                print(f"ready with {which} registered after {seconds[-1]:.2f} s", flush=True)
        with _server(args, root, "all") as server:
            runs, watch, tiers = _load(server, names, args)
    summaries = [summarize(label, run) for label, run in runs]
    print(f"\n{summary_table(summaries)}\n")
    figures = _figures(args, runs, summaries, watch, starts)
    print(figures_table(figures))
    write_json(
        args.out / "registry.json",
        {
            "settings": {name: value for name, value in vars(args).items() if isinstance(value, (int, float))},
            "figures": {name: value for name, value, _, _ in figures},
            "starts": starts,
            "tiers": tiers,
            "resident": [[round(it.at), it.rss] for it in watch.samples],
            "runs": [{**asdict(it), "adapters": len(it.adapters)} for it in summaries],
        },
    )
    return 0 if all(reached for *_, reached in figures) else 1


@contextmanager
def _server(args: argparse.Namespace, root: Path, which: str, *, preload: bool = False) -> Iterator[Server]:
    """A server on one of the stores."""
    arguments = ["--adapter-memory-mib", str(args.adapter_memory_mib), "--host-cache-mib", str(args.host_cache_mib)]
    arguments += ["--preload", str(root / which)] if preload else []
    log = args.out / f"server-{which}.log.tmp"
    with started_server(args.base, arguments=arguments, log=log, store=root / f"store-{which}") as server:
        yield server


def _start(args: argparse.Namespace, root: Path, which: str, *, preload: bool = False) -> float:
    """Seconds from the command to ready, imports included; the server is stopped again."""
    began = time.monotonic()
    with _server(args, root, which, preload=preload):
        return time.monotonic() - began


def _load(
    server: Server, names: Sequence[str], args: argparse.Namespace
) -> tuple[list[tuple[str, Run]], ProcessWatch, dict[str, float]]:
    """The few and all of them in turn; with what the server says of its tiers afterwards."""
    assert server.pid is not None
    target, watch = Target(server.url, server.base_model()), ProcessWatch(server.pid)
    watch.start()
    runs: list[tuple[str, Run]] = []
    for part in range(args.parts):
        for count, seconds in ((args.few, args.few_seconds), (len(names), args.seconds / args.parts)):
            workload = Workload(
                adapters=tuple(names[:count]),
                popularity="zipf",
                zipf_exponent=args.zipf_exponent,
                max_tokens=args.max_tokens,
                seed=part,
            )
            requests = workload.requests(int(seconds * 40))
            run = asyncio.run(run_clients(target, requests, clients=args.clients, seconds=seconds))
            runs.append((f"{count} adapters, part {part + 1}", run))
            tokens = sum(outcome.tokens for outcome in run.outcomes)
            print(f"{runs[-1][0]}: {tokens / run.seconds:.0f} tok/s in {run.seconds:.0f} s", flush=True)
    watch.stop()
    return runs, watch, _tiers(server)


def _tiers(server: Server) -> dict[str, float]:
    """The server's counters of its tiers."""
    lines = server.call("GET", "/metrics").decode().splitlines()
    wanted = ("loramux_adapter_cache", "loramux_adapter_evictions", "loramux_slot_loads", "loramux_adapter_load_s")
    pairs = [line.rsplit(" ", 1) for line in lines if line.startswith(wanted) and "_bucket" not in line]
    return {name: float(value) for name, value in pairs}


def _figures(
    args: argparse.Namespace,
    runs: Sequence[tuple[str, Run]],
    summaries: Sequence[Summary],
    watch: ProcessWatch,
    starts: dict[str, list[float]],
) -> list[Figure]:
    """What is held against its target."""
    few, every = summaries[0::2], summaries[1::2]
    share = statistics.median(b.tokens_per_second / a.tokens_per_second for a, b in zip(few, every, strict=True))
    errors = sum(sum(summary.errors.values()) for summary in summaries)
    wait = max((_wait(outcome) for _, run in runs[1::2] for outcome in run.outcomes), default=0.0)
    slope = watch.slope(after=watch.samples[-1].at / args.parts)
    later = statistics.median(starts["all"]) - statistics.median(starts["few"])
    return [
        ("errors", float(errors), "0", errors == 0),
        ("throughput, share of the few's", share, f">= {LEAST_SHARE}", share >= LEAST_SHARE),
        ("longest time to a first token, s", wait, f"< {LONGEST_WAIT:g}", wait < LONGEST_WAIT),
        ("memory after the first part, MB a minute", slope, f"< {STEEPEST:g}", slope < STEEPEST),
        ("later ready than with the few, s", later, f"<= {LATER:g}", later <= LATER),
    ]


def _wait(outcome: Outcome) -> float:
    """To the first token; of a request that got none, as long as it was open."""
    first = outcome.first_token_seconds
    return outcome.ended - outcome.started if first is None else first
