"""Two checkouts of this project: the same bits of every reply, the same speed, ready as soon?

    python -m loadtests checkouts --before DIR --after DIR

Each checkout has its own `.venv` (`make install` there), or is called as --before-command and --after-command say, such
as "env PYTHONPATH=DIR/server:DIR/adapters loramux". Both servers get the same 16 adapters of mixed ranks. The test
fails if a reply differs by one bit or a request fails. Ratios are shown beside their aim; trust them only if nothing
else was running.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import LoadTestError
from ..make_adapters import make_adapters, read_shapes
from ..peers.servers import Side, ours
from ..process import Server
from ..report import machine, write_json
from ..workload import adapter_ranks
from . import bits, pairs, speed, start
from .checkout import NAMES, Checkout

PARTS = ("start", "bits", "speed")
RANKS, ADAPTERS = (4, 8, 16, 32, 64), 16
CLIENTS = 32  # of the part that compares bits


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for name in NAMES:
        parser.add_argument(f"--{name}", type=Path, required=True, metavar="DIR", help=f"the checkout {name}")
        parser.add_argument(
            f"--{name}-command", metavar="WORDS", help="how to call it (default: its .venv/bin/loramux)"
        )
    parser.add_argument("--base", type=Path, help="directory of the base checkpoint (default: the server's default)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to compare (default: all)")
    parser.add_argument("--rounds", type=at_least_one, default=6, help="interleaved rounds of the speed (default: 6)")
    parser.add_argument("--starts", type=at_least_one, default=4, help="counted starts of each checkout (default: 4)")
    parser.add_argument("--seconds", type=float, default=450.0, help="rounds that would end later are left out")
    parser.add_argument("--out", type=Path, default=Path("loadtests/results"), help="where checkouts.json goes")


def main(args: argparse.Namespace) -> int:
    """0 if all replies are equal and no request failed."""
    deadline = time.monotonic() + args.seconds
    commands = {"before": args.before_command, "after": args.after_command}
    directories = {"before": args.before, "after": args.after}
    checkouts = [Checkout.of(name, directories[name], commands[name]) for name in NAMES]
    settings = {"rounds": args.rounds, "starts": args.starts, "ranks": RANKS, "adapters": ADAPTERS}
    results: dict[str, Any] = {it.name: it.revision() for it in checkouts} | {"settings": settings}
    say(f"{machine()['processor']}: " + ", ".join(f"{name} {results[name]}" for name in NAMES))
    measured, failed = list[pairs.Pair](), list[str]()
    if "start" in args.parts:
        measured += start.measure(checkouts, args.base, args.starts, deadline, args.out, say)
    if "bits" in args.parts or "speed" in args.parts:
        with tempfile.TemporaryDirectory(prefix="loadtest-checkouts-") as scratch, ExitStack() as stack:
            adapters = make_adapters(Path(scratch), read_shapes(args.base), adapter_ranks(RANKS, ADAPTERS))
            sides = [_started(it, args, Path(scratch), adapters, stack) for it in checkouts]
            if "bits" in args.parts:
                verdict = _compare_bits(sides, list(adapters))
                say(f"bits: {verdict}")
                failed += verdict.different or ([] if verdict.equal else ["no token was compared"])
                results["bits"] = asdict(verdict) | {"equal": verdict.equal}
            if "speed" in args.parts:
                rates, errors = speed.measure(sides, list(adapters), args.rounds, deadline, say)
                measured += rates
                failed += errors
    results["figures"] = {it.label: it.document() for it in measured}
    if measured:
        say(f"\n{pairs.show(measured)}")
    for line in failed[:20]:
        say(f"  {line}")
    write_json(args.out / "checkouts.json", results | {"failed": failed})
    return 1 if failed else 0


def at_least_one(text: str) -> int:
    """A number of rounds, for argparse."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def say(line: str) -> None:
    print(line, flush=True)


def _started(
    checkout: Checkout, args: argparse.Namespace, scratch: Path, adapters: Mapping[str, Path], stack: ExitStack
) -> Side:
    """The checkout's server with all adapters, frozen; its store is its own."""
    store, log = scratch / f"store-{checkout.name}", args.out / f"{checkout.name}.log.tmp"
    server = ours(args.base, adapters, store=store, log=log, lora=True, program=checkout.program, name=checkout.name)
    side = stack.enter_context(server)
    maps = Path(f"/proc/{side.process.pid}/maps").read_text(encoding="utf-8")
    code = ", ".join(checkout.compiled_code(maps)) or "no compiled code"
    say(f"{checkout.name} is up with {len(adapters)} adapters and runs {code}")
    return side


def _compare_bits(sides: Sequence[Side], adapters: Sequence[str]) -> bits.Verdict:
    """Raises LoadTestError where the servers do not call their base alike."""
    models = {side.target.base_model for side in sides}
    if len(models) > 1:
        raise LoadTestError(f"the servers call their base {' and '.join(sorted(models))}")
    asked = bits.questions(models.pop(), adapters)
    replies = []
    for side in sides:
        with side.turn() as target:
            replies.append(bits.ask(Server(target.url), asked, CLIENTS))
    return bits.compare(asked, *replies)
