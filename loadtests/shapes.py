"""What it costs to hold replies to a shape: streams held to JSON beside streams that are not, in interleaved rounds.

    python -m loadtests shapes

Every reply has the same number of tokens, and rounds take turns. A free one has them by `ignore_eos`, a held one since
what it is held to is far longer.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .client import Run, Target, run_clients
from .errors import LoadTestError
from .process import Server, own_program, started_server
from .report import percentile, table, write_json
from .workload import Workload

TARGET = 1.15
FREE = "no shape"
TEXT = {"type": "string", "minLength": 2, "maxLength": 24}
ITEM = {
    "type": "object",
    "properties": {
        "id": {"type": "integer", "minimum": 0, "maximum": 99999},
        "name": TEXT,
        "state": {"enum": ["open", "closed", "waiting"]},
        "at": {"type": "string", "format": "date-time"},
        "tags": {"type": "array", "items": TEXT, "maxItems": 3},
    },
    "required": ["id", "name", "state", "at", "tags"],
    "additionalProperties": False,
}
LONG = {"type": "array", "items": ITEM, "minItems": 500}
SHAPES: Mapping[str, Mapping[str, Any]] = {
    FREE: {"ignore_eos": True},
    "a JSON schema": {
        "response_format": {"type": "json_schema", "json_schema": {"name": "items", "schema": LONG}},
    },
    "a pattern": {"guided_regex": r"([a-z]{2,9} ){500}"},
}


@dataclass(slots=True)
class Condition:
    """What came of the streams of one shape, round by round.

    Attributes:
        gaps: the median time between two events of a stream, in seconds.
        late: the 99th percentile of it.
        first: the median time to a reply's first text.
        processor: seconds of the server's processor time for each token, all its threads together.
    """

    label: str
    extra: Mapping[str, Any]
    gaps: list[float] = field(default_factory=list)
    late: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    tokens_per_second: list[float] = field(default_factory=list)

    def add(self, run: Run, tokens: int, processor: float) -> None:
        """Raises LoadTestError: a reply has failed, or is not as long as all are."""
        for outcome in run.outcomes:
            if outcome.error is not None or outcome.tokens != tokens:
                raise LoadTestError(f"{self.label}: {outcome.tokens} tokens of {tokens}, {outcome.error or 'no error'}")
        gaps = [gap for outcome in run.outcomes for gap in outcome.inter_token_seconds]
        self.gaps.append(percentile(gaps, 0.50) or 0.0)
        self.late.append(percentile(gaps, 0.99) or 0.0)
        self.first.append(statistics.median(outcome.first_token_seconds or 0.0 for outcome in run.outcomes))
        self.processor.append(processor / (len(run.outcomes) * tokens))
        self.tokens_per_second.append(sum(outcome.tokens for outcome in run.outcomes) / run.seconds)

    def ratios(self, free: Condition) -> list[float]:
        """Of each round: the time of its tokens over that without a shape."""
        return [own / its for own, its in zip(free.tokens_per_second, self.tokens_per_second, strict=True)]

    def processor_ratios(self, free: Condition) -> list[float]:
        """The same of processor time, which other work on the machine changes little."""
        return [own / its for own, its in zip(self.processor, free.processor, strict=True)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", type=Path, help="directory of the base checkpoint (default: the server's default)")
    parser.add_argument("--clients", type=int, default=32, help="streams at once (default: 32)")
    parser.add_argument("--tokens", type=int, default=128, help="of each reply (default: 128)")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds (default: 7)")
    parser.add_argument("--isa", help="the instruction set of the server, such as avx2")
    parser.add_argument("--out", type=Path, default=Path("loadtests/results"), help="where shapes.json goes")


def main(args: argparse.Namespace) -> int:
    """0 if the median with a schema is within the target."""
    program = own_program()
    if args.isa:
        program = replace(program, environ={**program.environ, "LORAMUX_ISA": args.isa})
    conditions = [Condition(label, extra) for label, extra in SHAPES.items()]
    with started_server(args.base, log=args.out / "server.log.tmp", program=program) as server:
        first_seconds = measure(server, conditions, args)
        pause = longest_pause(server)
    print("\n" + show(conditions))
    print(f"longest pause of the event loop: {1000 * pause:.0f} ms")
    suffix = f"-{args.isa}" if args.isa else ""
    results = {
        "clients": args.clients,
        "tokens": args.tokens,
        "cores": os.cpu_count(),
        "first_shape_seconds": first_seconds,
        "longest_loop_pause_seconds": pause,
        "conditions": {it.label: _json(it, conditions[0]) for it in conditions},
    }
    write_json(args.out / f"shapes{suffix}.json", results)
    return 0 if all(statistics.median(it.ratios(conditions[0])) <= TARGET for it in conditions) else 1


def measure(server: Server, conditions: list[Condition], args: argparse.Namespace) -> float:
    """Fills in the conditions; the seconds to the first text of the first reply of all that is held to a shape."""
    base = server.base_model()
    alone = Target(server.url, base, extra=conditions[1].extra)
    first = _round(alone, 1, 4, 0)
    begun = first.outcomes[0].first_token_seconds
    if begun is None:
        raise LoadTestError(f"the first reply that is held to a shape: {first.outcomes[0].error}")
    for number in range(-1, args.rounds):  # round -1 warms up
        turn = number % len(conditions)
        for place in [*range(turn, len(conditions)), *range(turn)]:
            condition = conditions[place]
            target = Target(server.url, base, extra=condition.extra)
            before = processor_seconds(server)
            seed = (number + 2) * len(conditions) + place  # no prompt twice: the server keeps their blocks
            run = _round(target, args.clients, args.tokens, seed)
            if number >= 0:
                condition.add(run, args.tokens, processor_seconds(server) - before)
                ratio = condition.tokens_per_second[-1]
                print(
                    f"round {number + 1}/{args.rounds}  {condition.label:14}  {ratio:.0f} tokens a second", flush=True
                )
    return begun


def _round(target: Target, clients: int, tokens: int, seed: int) -> Run:
    """Each client sends one request: all run at once, from the first token to the last."""
    workload = Workload(adapters=(), max_tokens=tokens, seed=seed)
    return asyncio.run(run_clients(target, workload.requests(clients), clients=clients, seconds=300.0))


def processor_seconds(server: Server) -> float:
    """That the server's process has used, as Linux counts it."""
    assert server.pid is not None
    fields = Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def longest_pause(server: Server) -> float:
    """Seconds, in the last one to two minutes."""
    for line in server.call("GET", "/metrics").decode().splitlines():
        if line.startswith("loramux_event_loop_longest_pause_seconds "):
            return float(line.split()[1])
    raise LoadTestError("the server does not tell the pauses of its event loop")


def show(conditions: list[Condition]) -> str:
    head = ["condition", "tok/s", "p50 ms", "p99 ms", "first text ms", "time over no shape", "target", "processor time"]
    rows = [
        [
            it.label,
            f"{statistics.median(it.tokens_per_second):.0f}",
            f"{1000 * statistics.median(it.gaps):.1f}",
            f"{1000 * statistics.median(it.late):.1f}",
            f"{1000 * statistics.median(it.first):.0f}",
            f"{statistics.median(it.ratios(conditions[0])):.3f}x",
            f"{TARGET:g}x",
            f"{statistics.median(it.processor_ratios(conditions[0])):.3f}x",
        ]
        for it in conditions
    ]
    return table([head, *rows])


def _json(condition: Condition, free: Condition) -> dict[str, Any]:
    shown = {name: getattr(condition, name) for name in ("gaps", "late", "first", "tokens_per_second", "processor")}
    over = {"time_over_no_shape": condition.ratios(free), "processor_over_no_shape": condition.processor_ratios(free)}
    return {**shown, **over, "asked": json.dumps(condition.extra)}
