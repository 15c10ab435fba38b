"""The same kind of load from another client, NVIDIA's aiperf, on the same server: does it see what ours sees?

    python -m loadtests independent --base DIR --environments DIR

Rounds of ours and of aiperf in turn, each with prompts of its own, as many clients, requests and tokens. aiperf runs in
an environment of its own, which is made the first time. Its processes take processor time from the server that they
measure, on a small machine a good part of it, so rates cannot be compared. What can: each client's latencies beside
those that the server counted in the same run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import tempfile
from dataclasses import asdict, dataclass
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
FIRST, BETWEEN, TOKENS = (
    "loramux_time_to_first_token_seconds",
    "loramux_inter_token_seconds",
    "loramux_generated_tokens",
)


@dataclass(frozen=True, slots=True)
class Seen:
    """A run: tokens a second, mean seconds to the first token and between tokens, tokens."""

    rate: float
    first_token: float
    between: float
    tokens: float


Rounds = list[tuple[Seen, Seen]]  # (by the client, by the server)


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
    """0 if both clients see the same."""
    args.environments.mkdir(parents=True, exist_ok=True)
    env = environments.aiperf(args.environments.resolve(), lambda line: print(line, flush=True))
    found: dict[str, Rounds] = {"ours": [], "aiperf": []}
    with started_server(args.base, log=args.out / "server.log.tmp") as server:
        names = upload_adapters(server, args.base, [RANK] * args.adapters, "load", 0)
        for number in range(-1, args.rounds):  # round -1 warms up
            for place, (who, measure) in enumerate((("ours", _ours), ("aiperf", _aiperf))):
                workload = Workload(adapters=names, max_tokens=args.max_tokens, seed=2 * (number + 1) + place)
                before = _counters(server)
                seen = measure(server, workload, env, args)
                counted = _between(before, _counters(server), seen)
                if number >= 0:
                    found[who].append((seen, counted))
                    print(f"round {number + 1}/{args.rounds}  {who:6}  {seen.rate:.1f} tok/s", flush=True)
    print("\n" + show(found))
    results = {who: [[asdict(seen) for seen in each] for each in rounds] for who, rounds in found.items()}
    settings = {name: getattr(args, name) for name in ("adapters", "clients", "requests", "max_tokens", "rounds")}
    write_json(args.out / "independent.json", {"settings": settings, "aiperf": environments.AIPERF, "results": results})
    return 0 if agrees(found) else 1


def _counters(server: Server) -> dict[str, float]:
    """The server's own counts since its start."""
    lines = server.call("GET", "/metrics").decode().splitlines()
    found: dict[str, float] = {}
    for line in lines:
        if line.startswith((FIRST, BETWEEN, TOKENS)) and "_bucket" not in line:
            name, _, value = line.rpartition(" ")
            name = name.partition("{")[0]
            found[name] = found.get(name, 0.0) + float(value)
    return found


def _between(before: dict[str, float], after: dict[str, float], seen: Seen) -> Seen:
    """What the server counted meanwhile; the rate is the client's."""
    grown = {name: value - before.get(name, 0.0) for name, value in after.items()}
    first, between = (grown[f"{name}_sum"] / grown[f"{name}_count"] for name in (FIRST, BETWEEN))
    return Seen(seen.rate, first, between, grown[f"{TOKENS}_total"])


def _ours(server: Server, workload: Workload, env: Path, args: argparse.Namespace) -> Seen:
    target = Target(server.url, server.base_model(), extra={"ignore_eos": True})
    run = asyncio.run(run_clients(target, workload.requests(args.requests), clients=args.clients, seconds=300))
    summary = summarize("", run)
    if summary.errors:
        raise LoadTestError(f"ours: {summary.errors}")
    first = [it.first_token_seconds for it in run.outcomes if it.first_token_seconds is not None]
    # As aiperf has it: for each reply the time behind its first token, by the tokens that came in it.
    between = [(it.stamps[-1] - it.stamps[0]) / (it.tokens - 1) for it in run.outcomes if it.tokens > 1]
    return Seen(summary.tokens_per_second, statistics.fmean(first), statistics.fmean(between), summary.tokens)


def _aiperf(server: Server, workload: Workload, env: Path, args: argparse.Namespace) -> Seen:
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
    rate, first, between, length, count = (
        float(told[name]["avg"])
        for name in (
            "output_token_throughput",
            "time_to_first_token",
            "inter_token_latency",
            "output_sequence_length",
            "request_count",
        )
    )
    return Seen(rate, first / 1000, between / 1000, length * count)


def relative(rounds: Rounds, figure: str) -> list[float]:
    """The client's figure over the server's, by round."""
    return [getattr(seen, figure) / getattr(counted, figure) for seen, counted in rounds]


def agrees(found: dict[str, Rounds]) -> bool:
    """True if aiperf stands to the server as ours does: as many tokens, and latencies within the tolerance."""
    same = all(round(seen.tokens) == counted.tokens for rounds in found.values() for seen, counted in rounds)
    return same and all(abs(disagreement(found, figure)) <= TOLERANCE for figure in ("first_token", "between"))


def disagreement(found: dict[str, Rounds], figure: str) -> float:
    """By how much aiperf's figure is larger than ours, each in times of the server's, by the medians."""
    ours, theirs = (statistics.median(relative(found[who], figure)) for who in ("ours", "aiperf"))
    return theirs / ours - 1


def show(found: dict[str, Rounds]) -> str:
    """Medians over the rounds."""
    rows = []
    for label, figure in (("to the first token, mean s", "first_token"), ("between tokens, mean s", "between")):
        for who, rounds in found.items():
            seen, counted = (statistics.median(getattr(each[side], figure) for each in rounds) for side in (0, 1))
            share = f"{statistics.median(relative(rounds, figure)):.3f}"
            rows.append([label, who, f"{seen:.4f}", f"{counted:.4f}", share])
        rows.append([label, "aiperf over ours", "", "", f"{1 + disagreement(found, figure):.3f}"])
    for who, rounds in found.items():
        seen, counted = (sum(each[side].tokens for each in rounds) for side in (0, 1))
        rows.append(["tokens", who, f"{seen:.0f}", f"{counted:.0f}", f"{seen / counted:.3f}"])
        rows.append(["tokens a second", who, f"{statistics.median(each[0].rate for each in rounds):.1f}", "", ""])
    return table([["", "client", "by the client", "by the server", "ratio"], *rows])
