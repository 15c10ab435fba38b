"""One adapter's crowd, then one request for another: how long does that one wait? Two checkouts, in turns.

    python -m loadtests fairness --before DIR --after DIR

A crowd of requests for one adapter is sent at once, then, when they wait, one for another adapter. Of it the time to
the first text is measured, or that it was refused; and of the crowd, how many were refused, and what `Retry-After` one
more of them hears. `alone` is the same request with nobody else there.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from .checkouts.checkout import NAMES, Checkout
from .checkouts.pairs import in_turn
from .checkouts.start import Place
from .client import Run, Target, run_clients
from .make_adapters import make_adapters, read_shapes
from .peers.servers import Side
from .report import processor_name, write_json
from .workload import Request, Workload

CROWDS = (200, 295)
CROWDED_SECONDS = 1.5  # until all of a crowd have come
QUIET_SECONDS = 2.0  # until those that were cut off have left
MAX_TOKENS = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for name in NAMES:
        parser.add_argument(f"--{name}", type=Path, required=True, metavar="DIR", help=f"the checkout {name}")
        parser.add_argument(
            f"--{name}-command", metavar="WORDS", help="how to call it (default: its .venv/bin/loramux)"
        )
    parser.add_argument("--base", type=Path, help="directory of the base checkpoint (default: the server's default)")
    parser.add_argument("--rounds", type=int, default=2, help="of each crowd on each side (default: 2)")
    parser.add_argument("--seconds", type=float, default=40.0, help="longest that one request may wait (default: 40)")
    parser.add_argument("--out", type=Path, default=Path("loadtests/results"), help="where fairness.json goes")


def main(args: argparse.Namespace) -> int:
    """0 if the one request was served each time on the side `after`."""
    checkouts = [
        Checkout.of("before", args.before, args.before_command),
        Checkout.of("after", args.after, args.after_command),
    ]
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    print(processor_name(), flush=True)
    with tempfile.TemporaryDirectory(prefix="loadtest-fairness-") as scratch, ExitStack() as stack:
        place = Place(args.base, Path(scratch), args.out)
        adapters = make_adapters(Path(scratch) / "adapters", read_shapes(args.base), [16, 16])
        sides = [stack.enter_context(place.server(checkout, adapters)) for checkout in checkouts]
        hot, other = adapters
        for number in range(args.rounds):
            for crowd in (0, *CROWDS):
                for side in in_turn(sides, number):
                    one = measure(side, number, crowd, hot, other, args.seconds)
                    found[side.name].append(one)
                    print(f"{side.name:>6}, crowd of {crowd:>3}: {json.dumps(one)}", flush=True)
    write_json(args.out / "fairness.json", {**{it.name: it.revision() for it in checkouts}, "rounds": found})
    return 0 if all(one["first_text_seconds"] is not None for one in found["after"]) else 1


def measure(side: Side, number: int, crowd: int, hot: str, other: str, seconds: float) -> dict[str, Any]:
    """One crowd on one side, from the first of it until the one request has ended."""
    # No prompt comes twice on one server: the prefix cache would know it.
    requests = Workload(adapters=(hot,), seed=1000 * number + crowd, max_tokens=MAX_TOKENS).requests(crowd)
    (late,) = Workload(adapters=(other,), seed=1000 * number + crowd + 500, max_tokens=MAX_TOKENS).requests(1)
    with side.turn() as target:
        run, one, retry = asyncio.run(crowded(target, requests, late, seconds))
    (outcome,) = one.outcomes
    return {
        "crowd": crowd,
        "first_text_seconds": outcome.first_token_seconds,
        "error": outcome.error,
        "crowd_refused": sum(each.error == "status 503" for each in run.outcomes),
        "crowd_retry_after": retry,
    }


async def crowded(
    target: Target, requests: Sequence[Request], late: Request, seconds: float
) -> tuple[Run, Run, int | None]:
    """The crowd's run, that of the one request beside it, and what one more of the crowd is told."""
    retry: int | None = None
    async with asyncio.TaskGroup() as group:
        limit = CROWDED_SECONDS + seconds if requests else 0.0
        crowd = group.create_task(run_clients(target, requests, clients=len(requests), seconds=limit))
        if requests:
            await asyncio.sleep(CROWDED_SECONDS)
            retry = await asyncio.to_thread(retry_after, target, requests[0]) if len(requests) > min(CROWDS) else None
        one = await run_clients(target, [late], clients=1, seconds=seconds)
    await asyncio.sleep(QUIET_SECONDS)
    return crowd.result(), one, retry


def retry_after(target: Target, request: Request) -> int | None:
    """What a refused request is told; None if it is not refused."""
    connection = http.client.HTTPConnection(*target.address, timeout=10)
    try:
        body = {"model": request.adapter, "prompt": "more", "max_tokens": 1, "stream": True}
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        reply = connection.getresponse()
        return int(reply.headers["retry-after"]) if reply.status == 503 else None
    except TimeoutError:  # it waits
        return None
    finally:
        connection.close()
