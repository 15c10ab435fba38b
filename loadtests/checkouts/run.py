"""Two checkouts of this project: the same bits of every reply, the same speed, ready as soon?

    python -m loadtests checkouts --before DIR --after DIR

Each checkout has its own `.venv` (`make install` there), or is called as --before-command and --after-command say, such
as "env PYTHONPATH=DIR/server:DIR/adapters loramux". Both servers get the same 16 adapters of mixed ranks. The test
fails if a reply differs by one bit or a request fails. Then both start anew for every round: ratios are shown beside
their aim; trust them only if nothing else was running.
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
from ..peers.servers import Side
from ..process import Server
from ..report import processor_name, write_json
from ..workload import adapter_ranks
from . import bits
from .checkout import NAMES, Checkout
from .pairs import Pair, in_turn, rounds, show
from .speed import Speed
from .start import Place, Starts

PARTS = ("bits", "start", "speed")
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
    parser.add_argument("--rounds", type=at_least_one, default=6, help="starts of each server (default: 6)")
    parser.add_argument("--seconds", type=float, default=450.0, help="rounds that would end later are left out")
    parser.add_argument("--out", type=Path, default=Path("loadtests/results"), help="where checkouts.json goes")


def at_least_one(text: str) -> int:
    """A number of rounds, for argparse."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def main(args: argparse.Namespace) -> int:
    """0 if all replies are equal and no request failed."""
    deadline = time.monotonic() + args.seconds
    checkouts = [
        Checkout.of("before", args.before, args.before_command),
        Checkout.of("after", args.after, args.after_command),
    ]
    results: dict[str, Any] = {it.name: it.revision() for it in checkouts}
    results["settings"] = {"parts": args.parts, "rounds": args.rounds, "adapters": ADAPTERS, "ranks": RANKS}
    say(f"{processor_name()}: " + ", ".join(f"{name} {results[name]}" for name in NAMES))
    failed: list[str] = []
    with tempfile.TemporaryDirectory(prefix="loadtest-checkouts-") as scratch:
        place = Place(args.base, Path(scratch), args.out)
        adapters = make_adapters(Path(scratch) / "adapters", read_shapes(args.base), adapter_ranks(RANKS, ADAPTERS))
        verdict = fill_stores(checkouts, place, adapters, bits_too="bits" in args.parts)
        if verdict is not None:
            say(f"bits: {verdict}")
            failed += verdict.different or ([] if verdict.equal else ["no token was compared"])
            results["bits"] = asdict(verdict) | {"equal": verdict.equal}
        starts, speed = Starts(), Speed(list(adapters))
        for number in rounds(args.rounds if {"start", "speed"} & set(args.parts) else 0, deadline, say):
            with ExitStack() as stack:
                sides = starts.measure(in_turn(checkouts, number), place, stack)
                if "speed" in args.parts:
                    speed.measure([sides[name] for name in NAMES], number)
            say(f"round {number + 1}/{args.rounds}: {latest([*starts.pairs, *speed.pairs])}")
    failed += speed.errors
    measured = [it for it in (*starts.pairs, *speed.pairs) if it.ratios]
    if measured:
        say(f"\n{show(measured)}")
    for line in failed[:20]:
        say(f"  {line}")
    results["figures"] = {it.label: it.document() for it in measured}
    write_json(args.out / "checkouts.json", results | {"failed": failed})
    return 1 if failed else 0


def say(line: str) -> None:
    print(line, flush=True)


def latest(pairs: Sequence[Pair]) -> str:
    """The last ratio of each figure."""
    return "; ".join(f"{it.label} {it.ratios[-1]:.3f}" for it in pairs if it.ratios)


def fill_stores(
    checkouts: Sequence[Checkout], place: Place, adapters: Mapping[str, Path], *, bits_too: bool
) -> bits.Verdict | None:
    """First starts, which may convert the base; uploads the adapters, and compares replies if that is wanted."""
    with ExitStack() as stack:
        sides = []
        for checkout in checkouts:
            sides.append(stack.enter_context(place.server(checkout, adapters)))
            maps = Path(f"/proc/{sides[-1].process.pid}/maps").read_text(encoding="utf-8")
            code = ", ".join(checkout.compiled_code(maps)) or "no compiled code"
            say(f"{checkout.name} is up with {len(adapters)} adapters and runs {code}")
        return compare_bits(sides, list(adapters)) if bits_too else None


def compare_bits(sides: Sequence[Side], adapters: Sequence[str]) -> bits.Verdict:
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
