"""The same kind of load from another client, NVIDIA's aiperf, on the same server: does it see what ours sees?

    python -m loadtests independent --base DIR --environments DIR

Rounds of ours and of aiperf in turn, each with prompts of its own, as many clients, requests and tokens. aiperf runs in
an environment of its own, which is made the first time, and takes processor time from the server that it measures.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .client import Target, run_clients
from .errors import LoadTestError
from .peers import environments
from .process import Server, started_server
from .report import summarize, table, write_json
from .sweep import upload_adapters
from .workload import Workload

TOLERANCE = 0.10
RANK = 16
# What both tell: label, aiperf's name and the part of it, by how much its unit is smaller than ours.
FIGURES = (
    ("tokens a second", "output_token_throughput", "avg", 1.0),
    ("first token, p50, s", "time_to_first_token", "p50", 1e-3),
    ("between tokens, p50, s", "inter_token_latency", "p50", 1e-3),
    ("whole reply, p50, s", "request_latency", "p50", 1e-3),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", type=Path, required=True, help="directory of the base checkpoint: its tokenizer")
    parser.add_argument("--environments", type=Path, required=True, help="where aiperf's environment is, or goes")
    parser.add_argument("--adapters", type=int, default=16, help="asked for in turn (default: 16)")
    parser.add_argument("--clients", type=int, default=16, help="closed-loop clients (default: 16)")
    parser.add_argument("--requests", type=int, default=128, help="of one round (default: 128)")
    parser.add_argument("--max-tokens", type=int, default=64, help="of every reply (default: 64)")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds (default: 3)")
    parser.add_argument("--out", type=Path, default=Path("loadtests/results"), help="where independent.json goes")


def main(args: argparse.Namespace) -> int:
    """0 if the rates agree."""
    args.environments.mkdir(parents=True, exist_ok=True)
    env = environments.aiperf(args.environments.resolve(), lambda line: print(line, flush=True))
    found: dict[str, list[tuple[float, ...]]] = {"ours": [], "aiperf": []}
    with started_server(args.base, log=args.out / "server.log.tmp") as server:
        names = upload_adapters(server, args.base, [RANK] * args.adapters, "load", 0)
        for number in range(-1, args.rounds):  # round -1 warms up
            for place, (who, measure) in enumerate((("ours", _ours), ("aiperf", _aiperf))):
                workload = Workload(adapters=names, max_tokens=args.max_tokens, seed=2 * (number + 1) + place)
                figures = measure(server, workload, env, args)
                if number >= 0:
                    found[who].append(figures)
                    print(f"round {number + 1}/{args.rounds}  {who:6}  {figures[0]:.1f} tok/s", flush=True)
    print("\n" + show(found))
    labels = [label for label, *_ in FIGURES]
    results = {who: [dict(zip(labels, each, strict=True)) for each in rounds] for who, rounds in found.items()}
    settings = {name: getattr(args, name) for name in ("adapters", "clients", "requests", "max_tokens", "rounds")}
    write_json(args.out / "independent.json", {"settings": settings, "aiperf": environments.AIPERF, "results": results})
    return 0 if abs(ratios(found, 0) - 1) <= TOLERANCE else 1


def _ours(server: Server, workload: Workload, env: Path, args: argparse.Namespace) -> tuple[float, ...]:
    target = Target(server.url, server.base_model(), extra={"ignore_eos": True})
    run = asyncio.run(run_clients(target, workload.requests(args.requests), clients=args.clients, seconds=300))
    summary = summarize("", run)
    if summary.errors:
        raise LoadTestError(f"ours: {summary.errors}")
    each = [outcome.inter_token_seconds for outcome in run.outcomes]  # aiperf's is one mean for each reply
    between = statistics.median(statistics.fmean(gaps) for gaps in each if gaps)
    return summary.tokens_per_second, summary.first_token.p50 or 0.0, between, summary.end_to_end.p50 or 0.0


def _aiperf(server: Server, workload: Workload, env: Path, args: argparse.Namespace) -> tuple[float, ...]:
    requests = workload.requests(args.requests)
    with tempfile.TemporaryDirectory(prefix="loadtest-aiperf-") as scratch:
        prompts = Path(scratch) / "prompts.jsonl"
        prompts.write_text("".join(json.dumps({"text": it.prompt}) + "\n" for it in requests), encoding="utf-8")
        command = [str(env / "bin" / "aiperf"), "profile", "--model", ",".join(workload.adapters)]
        command += ["--model-selection-strategy", "round_robin", "--url", server.url, "--endpoint-type", "completions"]
        command += ["--streaming", "--concurrency", str(args.clients), "--request-count", str(args.requests)]
        command += ["--input-file", str(prompts), "--custom-dataset-type", "single_turn"]
        command += ["--dataset-sampling-strategy", "sequential", "--tokenizer", str(args.base.resolve())]
        command += ["--use-server-token-count", "--extra-inputs", "ignore_eos:true"]
        command += ["--extra-inputs", f"max_tokens:{args.max_tokens}", "--extra-inputs", "temperature:0"]
        command += ["--workers-max", "1", "--ui", "none", "--artifact-dir", scratch]
        # Told to be offline, it would look for the tokenizer's directory in the hub's cache.
        online = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
        done = subprocess.run(command, capture_output=True, text=True, env=online, timeout=600, check=False)
        exported = next(Path(scratch).rglob("profile_export_aiperf.json"), None)
        if done.returncode or exported is None:
            raise LoadTestError(f"aiperf failed:\n{(done.stdout + done.stderr)[-3000:]}")
        told: dict[str, Any] = json.loads(exported.read_text(encoding="utf-8"))
    return tuple(float(told[name][part]) * unit for _, name, part, unit in FIGURES)


def ratios(found: dict[str, list[tuple[float, ...]]], figure: int) -> float:
    """The median over the rounds of aiperf's figure over ours."""
    rounds = zip(found["aiperf"], found["ours"], strict=True)
    return statistics.median(theirs[figure] / mine[figure] for theirs, mine in rounds)


def show(found: dict[str, list[tuple[float, ...]]]) -> str:
    def median(rounds: Sequence[tuple[float, ...]], figure: int) -> str:
        return f"{statistics.median(each[figure] for each in rounds):.3f}"

    rows = [
        [label, median(found["ours"], n), median(found["aiperf"], n), f"{ratios(found, n):.3f}"]
        for n, (label, *_) in enumerate(FIGURES)
    ]
    return table([["", "ours", "aiperf", "aiperf / ours"], *rows])
