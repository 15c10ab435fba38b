"""The same requests to ours, vLLM on the CPU and llama.cpp's server, in interleaved rounds; ratios with their spread.

    python -m loadtests peers --base DIR --environments DIR

The first time, the peers' environments are made: gigabytes from the package registry, and a build of ten minutes.
Every server is tuned as its makers say, runs on all cores, and is frozen while another one is measured. Ours serves the
base in NF4, vLLM in bf16, llama.cpp in Q4_1. `--base` is the checkpoint that the GGUF file was converted to (ours puts
it into its cache directory at the first start).

With `--isa avx2` every server is held to AVX2, as on a processor without AVX-512: llama.cpp is built without it, and
vLLM's PyTorch and oneDNN are told so and run in float32, their best there; vLLM's own kernels may still use more.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..client import run_clients
from ..errors import LoadTestError
from ..make_adapters import Shapes, make_adapters, read_shapes
from ..report import Summary, summarize, summary_table, table, write_json
from ..workload import Workload
from . import environments, servers
from .servers import Side

OURS = "loramux"
RANK = 16


@dataclass(frozen=True, slots=True)
class Scenario:
    """`adapters`: how many are asked, 0 for servers without LoRA. `figure`: tokens/s of replies, or of prompts."""

    label: str
    adapters: int
    clients: int
    requests: int
    max_tokens: int = 64
    prompt_words: tuple[int, int] = (20, 40)
    figure: str = "reply"


SCENARIOS = (
    Scenario("16 adapters, 32 clients", 16, 32, 64),
    Scenario("16 adapters, 16 clients", 16, 16, 32),
    Scenario("base, 32 clients", 0, 32, 64),
    Scenario("base, 1 client", 0, 1, 2),
    Scenario("1 adapter, 1 client", 1, 1, 2),
    Scenario("prompts of 1,000 tokens", 0, 1, 2, max_tokens=1, prompt_words=(800, 800), figure="prompt"),
)


@dataclass(slots=True)
class Measured:
    """What one server did in one scenario, round by round."""

    rates: list[float] = field(default_factory=list)
    first_token_p95: list[float] = field(default_factory=list)
    summaries: list[Summary] = field(default_factory=list)


Results = dict[str, dict[str, Measured]]  # scenario -> server -> what it did


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", type=Path, required=True, help="directory of the base checkpoint")
    parser.add_argument("--environments", type=Path, required=True, help="where the peers' environments are, or go")
    parser.add_argument("--only", nargs="+", choices=("vllm", "llama"), default=["vllm", "llama"], help="peers to run")
    parser.add_argument("--isa", choices=("avx2",), help="hold every server to this instruction set")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds (default: 3)")
    parser.add_argument("--seconds", type=float, default=120.0, help="most seconds of one measurement (default: 120)")
    parser.add_argument(
        "--out", type=Path, default=Path("loadtests/results"), help="where peers.json (peers-avx2.json) goes"
    )


def main(args: argparse.Namespace) -> int:
    """0 if every server answered every request."""
    with tempfile.TemporaryDirectory(prefix="loadtest-peers-") as scratch, _all_sides(args, Path(scratch)) as sides:
        results: Results = {it.label: {side.name: Measured() for side in sides} for it in SCENARIOS}
        for number in range(-1, args.rounds):  # round -1 warms up
            for scenario in SCENARIOS:
                _measure(scenario, sides, results, number, args.seconds)
    print("\n" + show(results))
    write_json(
        args.out / (f"peers-{args.isa}.json" if args.isa else "peers.json"),
        {
            "settings": {
                "isa": args.isa,
                "rounds": args.rounds,
                "scenarios": [asdict(it) for it in SCENARIOS],
                "rank": RANK,
            },
            "results": {
                label: {
                    name: {"rates": it.rates, "first_token_p95": it.first_token_p95} for name, it in by_server.items()
                }
                for label, by_server in results.items()
            },
        },
    )
    failed = [it for by in results.values() for one in by.values() for it in one.summaries if it.errors or it.cut]
    if failed:
        print("\nnot all was answered:\n" + summary_table(failed))
    return 1 if failed else 0


@contextmanager
def _all_sides(args: argparse.Namespace, scratch: Path) -> Iterator[list[Side]]:
    """Every server with adapters and without, frozen."""

    def say(line: str) -> None:
        print(line, flush=True)

    args.environments.mkdir(parents=True, exist_ok=True)
    root = args.environments.resolve()
    shapes = read_shapes(args.base)
    adapters = make_adapters(scratch / "adapters", shapes, [RANK] * 16)
    logs = args.out
    with ExitStack() as stack:
        sides: list[Side] = []

        def add(starting: AbstractContextManager[Side]) -> None:
            side = stack.enter_context(starting)
            sides.append(side)
            say(f"{side.name} is up, {'with adapters' if side.lora else 'without LoRA'}")

        for lora in (True, False):
            store, log = scratch / f"store-{lora}", logs / f"loramux-{lora}.log.tmp"
            add(servers.ours(args.base, adapters, store=store, log=log, lora=lora, isa=args.isa))
        if "vllm" in args.only:
            env = environments.vllm(root, say)
            preloads = environments.preloads(env)
            for lora in (True, False):
                log = logs / f"vllm-{lora}.log.tmp"
                chosen = adapters if lora else {}
                add(servers.vllm(env, args.base, chosen, preloads, log=log, rank=RANK, isa=args.isa))
        if "llama" in args.only:
            env, gguf = environments.llama(root, say, args.isa), environments.base_gguf(root, say)
            files = {name: _converted(env, directory, shapes) for name, directory in adapters.items()}
            for lora in (True, False):
                add(servers.llama(env, gguf, files if lora else {}, log=logs / f"llama-{lora}.log.tmp"))
        yield sides


def _converted(env: Path, directory: Path, shapes: Shapes) -> Path:
    """The adapter as GGUF."""
    target = directory.with_suffix(".gguf")
    script = Path(__file__).with_name("to_gguf.py")
    heads, kv_heads = str(shapes.heads), str(shapes.kv_heads)
    command = [str(env / "bin" / "python"), str(script), heads, kv_heads, str(target), str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LoadTestError(f"{directory.name} cannot be converted to GGUF:\n{done.stderr[-1000:]}")
    return target


def _measure(scenario: Scenario, sides: Sequence[Side], results: Results, number: int, seconds: float) -> None:
    """One round of one scenario; who begins changes from round to round."""
    chosen = [side for side in sides if side.lora == (scenario.adapters > 0)]
    turn = number % len(chosen)
    names = tuple(f"load{place:03d}" for place in range(scenario.adapters))
    workload = Workload(
        adapters=names,
        max_tokens=scenario.max_tokens,
        prompt_words=scenario.prompt_words,
        seed=(number + 1) * len(SCENARIOS) + SCENARIOS.index(scenario),  # no prompt comes twice: caches would know it
    )
    requests = workload.requests(scenario.clients if number < 0 else scenario.requests)
    for side in [*chosen[turn:], *chosen[:turn]]:
        with side.turn() as target:
            run = asyncio.run(run_clients(target, requests, clients=scenario.clients, seconds=seconds))
        if number < 0:
            continue
        summary = summarize(f"{side.name}, {scenario.label}", run)
        tokens = summary.prompt_tokens if scenario.figure == "prompt" else summary.tokens
        measured = results[scenario.label][side.name]
        measured.rates.append(tokens / run.seconds)
        measured.first_token_p95.append(summary.first_token.p95 or float("nan"))
        measured.summaries.append(summary)
        print(
            f"round {number + 1}  {scenario.label:24} {side.name:10} {measured.rates[-1]:7.1f} tok/s, "
            f"first token p95 {measured.first_token_p95[-1]:6.2f} s",
            flush=True,
        )


def show(results: Results) -> str:
    """Medians, and our ratio to the better peer within each round: median (lowest .. highest)."""
    rows = [["scenario", "server", "tok/s", "first token p95, s", "ours / better peer", "its first token / ours"]]
    for label, by_server in results.items():
        peers = [it for name, it in by_server.items() if name != OURS]
        ours = by_server[OURS]
        for name, it in by_server.items():
            cells = ["", ""]
            if name == OURS and peers:
                best = [max(rates) for rates in zip(*(peer.rates for peer in peers), strict=True)]
                soonest = [min(waits) for waits in zip(*(peer.first_token_p95 for peer in peers), strict=True)]
                cells = [
                    spread([mine / theirs for mine, theirs in zip(ours.rates, best, strict=True)]),
                    spread([theirs / mine for mine, theirs in zip(ours.first_token_p95, soonest, strict=True)]),
                ]
            rows.append(
                [
                    label,
                    name,
                    f"{statistics.median(it.rates):.1f}",
                    f"{statistics.median(it.first_token_p95):.2f}",
                    *cells,
                ]
            )
    return table(rows)


def spread(ratios: Sequence[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} .. {max(ratios):.2f})"
