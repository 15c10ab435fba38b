"""From the command to a server that is ready, and to `loramux --version`; nothing else of ours runs meanwhile."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from ..errors import LoadTestError
from ..process import started_server
from .checkout import Checkout
from .pairs import Pair, Say, in_turn, rounds

AIM = (0.0, 1.03)


def measure(
    checkouts: Sequence[Checkout], base: Path | None, count: int, deadline: float, logs: Path, say: Say
) -> list[Pair]:
    """At most `count` rounds. A first start of each does not count: it may convert the base, which is then kept."""
    ready, version = Pair("start to ready", "s", AIM), Pair("loramux --version", "s", AIM)
    for checkout in checkouts:
        start_seconds(checkout, base, logs)
    for number in rounds(count, deadline, say):
        turns = in_turn(checkouts, number)
        version.add({it.name: version_seconds(it) for it in turns})
        ready.add({it.name: start_seconds(it, base, logs) for it in turns})
        say(f"start {number + 1}/{count}: before {ready.before[-1]:.2f} s, after {ready.after[-1]:.2f} s")
    return [ready, version]


def start_seconds(checkout: Checkout, base: Path | None, logs: Path) -> float:
    """Until /ready says so, with an empty store. The server is stopped afterwards."""
    began = time.perf_counter()
    with started_server(base, log=logs / f"{checkout.name}-start.log.tmp", program=checkout.program):
        return time.perf_counter() - began


def version_seconds(checkout: Checkout) -> float:
    """Raises LoadTestError where the command fails."""
    words, environ = [*checkout.program.words, "--version"], checkout.program.environ
    began = time.perf_counter()
    try:
        subprocess.run(words, env=environ, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise LoadTestError(f"`{checkout.name}` does not tell its version: {error}") from error
    return time.perf_counter() - began
