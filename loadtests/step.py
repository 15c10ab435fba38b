"""The whole compiled step beside the same kernels module by module, on random bases in two families' shapes.

    python -m loadtests step --base DIR

Two servers of ours take turns on the same base, the other one being frozen: one with LORAMUX_KERNELS=modules, one with
`native`. Both compute the same bits, so every reply must be the same. The bases are written for the test, with the
tokenizer of `--base`; they are gone afterwards. `--isa avx2` holds both servers to that instruction set.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .checkouts.pairs import in_turn, rounds
from .client import Run, run_clients
from .errors import LoadTestError
from .peers.servers import Side, ours
from .process import Program, own_program
from .random_base import RandomBase
from .report import processor_name, summarize, table, write_json
from .workload import Workload

CLIENTS = 32
TARGET = 2.0  # tokens a second of the whole step over those by modules
MODULES, STEP = "by modules", "whole step"
_EXPECTED = {
    MODULES: "a step is run module by module",
    STEP: "a step is one compiled call",
}  # in a server's start-up lines
_WORDS = (10, 14)  # of a prompt: most rows of a step are replies


@dataclass(frozen=True, slots=True)
class Case:
    """`tokens`: of each reply. `size`: what --sizes calls it."""

    size: str
    base: RandomBase
    tokens: int


# the tiny ones are as deep as Qwen3-0.6B and Gemma 3 1B, and narrow
CASES = (
    Case("tiny", RandomBase("Qwen3, tiny", "qwen3", 256, 768, 28, 4, 2, 64), 48),
    Case("tiny", RandomBase("Gemma 3, tiny", "gemma3_text", 256, 1024, 26, 4, 1, 64), 48),
    Case("0.5b", RandomBase("Qwen3, 0.5B", "qwen3", 1024, 3072, 28, 16, 8, 128), 12),
    Case("0.5b", RandomBase("Gemma 3, 0.5B", "gemma3_text", 1152, 6912, 18, 4, 1, 256), 12),
)


@dataclass(slots=True)
class Measured:
    """One base, round by round.

    Attributes:
        rates: side -> tokens a second.
        different: replies that were not the same on both servers.
        errors: one sentence for each kind of failure.
        isa: what both servers said they run on.
    """

    label: str
    isa: str = ""
    rates: dict[str, list[float]] = field(default_factory=lambda: {MODULES: [], STEP: []})
    different: int = 0
    errors: list[str] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        return [step / modules for modules, step in zip(self.rates[MODULES], self.rates[STEP], strict=True)]

    @property
    def reached(self) -> bool:
        return statistics.median(self.ratios) >= TARGET and not self.different and not self.errors


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", type=Path, required=True, help="directory of a checkpoint: its tokenizer is used")
    sizes = sorted({case.size for case in CASES})
    parser.add_argument("--sizes", nargs="+", choices=sizes, default=sizes, help="of the bases (default: all)")
    parser.add_argument("--isa", choices=("avx2",), help="hold both servers to this instruction set")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds for each base (default: 3)")
    parser.add_argument(
        "--seconds", type=float, default=330.0, help="rounds that would end later are left out (default: 330)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("loadtests/results"), help="where step.json (step-avx2.json) goes"
    )


def main(args: argparse.Namespace) -> int:
    """0 if every reply came, was the same on both sides, and the target is reached."""
    chosen = [case for case in CASES if case.size in args.sizes]
    began, found = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="loadtest-step-") as scratch:
        for number, case in enumerate(chosen):
            deadline = began + args.seconds * (number + 1) / len(chosen)
            found.append(_measure(case, args, Path(scratch), deadline))
    print(f"\n{processor_name()}, {CLIENTS} clients, tokens a second (medians)\n{show(found)}")
    for line in [error for it in found for error in it.errors][:10]:
        print(f"  {line}")
    write_json(
        args.out / (f"step-{args.isa}.json" if args.isa else "step.json"),
        {
            "settings": {
                "isa": args.isa,
                "rounds": args.rounds,
                "clients": CLIENTS,
                "target": TARGET,
                "bases": {case.base.label: asdict(case.base) | {"reply_tokens": case.tokens} for case in chosen},
            },
            "results": {it.label: asdict(it) | {"ratios": it.ratios, "reached": it.reached} for it in found},
        },
    )
    return 0 if all(it.reached for it in found) else 1


def show(found: Sequence[Measured]) -> str:
    head = ["", "instruction set", MODULES, STEP, "ratio (lowest .. highest)", "target", "other replies", "reached"]
    rows = [
        [
            it.label,
            it.isa,
            *(f"{statistics.median(it.rates[side]):.1f}" for side in (MODULES, STEP)),
            f"{statistics.median(it.ratios):.2f} ({min(it.ratios):.2f} .. {max(it.ratios):.2f})",
            f">= {TARGET}",
            str(it.different),
            "yes" if it.reached else "NO",
        ]
        for it in found
    ]
    return table([head, *rows])


def _measure(case: Case, args: argparse.Namespace, scratch: Path, deadline: float) -> Measured:
    label, found = case.base.label, Measured(case.base.label)
    place = scratch / re.sub(r"\W+", "-", label.lower())
    checkpoint = case.base.write(place / "base", args.base)
    print(f"{label}: the base is written", flush=True)
    with ExitStack() as stack:
        sides = []
        for name, kernels in ((MODULES, "modules"), (STEP, "native")):
            log = args.out / f"step-{place.name}-{kernels}.log.tmp"
            program = _program(kernels, place / "cache")
            server = ours(
                checkpoint, {}, store=place / kernels, log=log, lora=False, program=program, name=name, isa=args.isa
            )
            sides.append(stack.enter_context(server))
            found.isa = told(log.read_text(encoding="utf-8"), name)
            print(f"{label}: the server {name} is up on {found.isa}", flush=True)
        for side in sides:
            _run(side, Workload(seed=0, max_tokens=2, prompt_words=_WORDS), CLIENTS // 4)  # warms up
        for number in rounds(args.rounds, deadline, print):
            workload = Workload(seed=number + 1, max_tokens=case.tokens, prompt_words=_WORDS)  # no prompt comes twice
            add_round(found, {side.name: _run(side, workload, CLIENTS) for side in in_turn(sides, number)})
            print(f"{label}: round {number + 1}/{args.rounds}: ratio {found.ratios[-1]:.2f}", flush=True)
    return found


def _program(kernels: str, cache: Path) -> Program:
    """Ours, with a cache of its own, shared by both sides: it is deleted with the base."""
    own = own_program()
    return Program(own.words, {**own.environ, "LORAMUX_KERNELS": kernels, "XDG_CACHE_HOME": str(cache)})


def _run(side: Side, workload: Workload, count: int) -> Run:
    with side.turn() as target:
        return asyncio.run(run_clients(target, workload.requests(count), clients=CLIENTS, seconds=120.0))


def add_round(found: Measured, runs: dict[str, Run]) -> None:
    for name, run in runs.items():
        summary = summarize(name, run)
        found.rates[name].append(summary.tokens_per_second)
        failures = {**summary.errors, "cut off": summary.cut}
        found.errors += [f"{found.label}, {name}: {times} x {why}" for why, times in failures.items() if times]
    texts = {name: {it.prompt: it.text for it in run.outcomes} for name, run in runs.items()}
    found.different += sum(texts[STEP].get(prompt) != text for prompt, text in texts[MODULES].items())


def told(log: str, name: str) -> str:
    """The instruction set in a server's start-up lines; raises LoadTestError where it does not run what it should."""
    isa = re.search(r"compiled kernels on (\S+)", log)
    if isa is None or _EXPECTED[name] not in log:
        line = next((line for line in log.splitlines() if line.startswith("device")), "no line on its device")
        raise LoadTestError(f"the server that should run {name} does not; it says: {line}")
    return isa[1]
