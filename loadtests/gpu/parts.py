"""The parts of a run on a GPU: each a process of its own with a time limit, so that one that fails loses no other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TAIL = 30  # lines of a part's output that the report keeps where it failed
_END_SECONDS = 5.0  # for a part that is told to end


@dataclass(frozen=True, slots=True)
class Part:
    """One of them.

    Attributes:
        name: its key in the report.
        module: the program, for `python -m`; it writes JSON to `--out` whenever it found something.
        worth: the budget is spent on the largest first; parts are run in the order of their list.
        seconds: that it takes on one H100; where less is left it is given less, and below `least` it is left out.
        most: seconds after which it is ended.
        needs: parts that must have passed before.
    """

    name: str
    module: str
    worth: int
    seconds: float
    most: float
    least: float = 10.0
    needs: tuple[str, ...] = ()


@dataclass(slots=True)
class Outcome:
    """What became of a part.

    Attributes:
        state: "passed", "failed", "out of time" or "left out".
        why: where it did not pass.
        found: what it wrote, complete or not.
        tail: the end of its output, where it did not pass.
    """

    state: str
    why: str = ""
    seconds: float = 0.0
    found: dict[str, Any] = field(default_factory=dict)
    tail: list[str] = field(default_factory=list)


def shares(parts: Sequence[Part], budget: float) -> dict[str, float]:
    """Seconds for each part by name: those worth most get what they take, until nothing is left.

    A part for which less than its `least` is left gets none, and those that need it get none either.
    """
    left, given = budget, {part.name: 0.0 for part in parts}
    for part in sorted(parts, key=lambda it: -it.worth):
        if all(given.get(name, 1.0) for name in part.needs) and left >= part.least:
            given[part.name] = min(part.seconds, left)
            left -= given[part.name]
    return given


def run_all(
    parts: Sequence[Part],
    *,
    budget: float,
    out: Path,
    arguments: Sequence[str],
    environ: Mapping[str, str],
    told: Callable[[str, Outcome], None],
    say: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Outcome]:
    """Runs them in order within the budget; `told` hears of each that is over.

    Args:
        budget: seconds of all together.
        out: a directory for what they write.
        arguments: more flags of each.
        environ: the whole environment of each.
    """
    ends, outcomes = clock() + budget, dict[str, Outcome]()
    for number, part in enumerate(parts):
        left = ends - clock()
        given = shares([it for it in parts[number:] if not _lacking(it, outcomes)], left)
        if lacking := _lacking(part, outcomes):
            outcomes[part.name] = Outcome("left out", f"it needs what did not pass: {', '.join(lacking)}")
        elif not given[part.name]:
            outcomes[part.name] = Outcome("left out", f"{left:.0f} s are left, and parts worth more take them")
        else:
            most = min(part.most, given[part.name] + left - sum(given.values()))  # what nobody needs is its own too
            say(f"{part.name}: at most {most:.0f} s")
            outcomes[part.name] = run_one(part, most, out=out, arguments=arguments, environ=environ, say=say)
        told(part.name, outcomes[part.name])
    return outcomes


def _lacking(part: Part, outcomes: Mapping[str, Outcome]) -> list[str]:
    return [name for name in part.needs if name in outcomes and outcomes[name].state != "passed"]


def run_one(
    part: Part,
    seconds: float,
    *,
    out: Path,
    arguments: Sequence[str],
    environ: Mapping[str, str],
    say: Callable[[str], None],
) -> Outcome:
    """One part as a process of its own, ended with all that it started after `seconds`. Its output is echoed."""
    found, log = out / f"{part.name}.json", out / f"{part.name}.log"
    found.unlink(missing_ok=True)
    # it plans with somewhat less, so that it is at its end before it is ended
    command = [sys.executable, "-m", part.module, "--out", str(found), "--seconds", f"{0.85 * seconds:.0f}", *arguments]
    began = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _end(process)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    outcome = Outcome("passed", seconds=round(time.monotonic() - began, 1))
    with suppress(OSError, ValueError):
        outcome.found = json.loads(found.read_text(encoding="utf-8"))
    if status is None:
        outcome.state, outcome.why = "out of time", f"it was ended after {seconds:.0f} s"
    elif status:
        words = f"signal {-status}" if status < 0 else f"status {status}"
        outcome.state, outcome.why = "failed", next((line for line in reversed(lines) if line.strip()), words)
    if outcome.state != "passed":
        outcome.tail = lines[-TAIL:]
    for line in lines if outcome.state == "passed" else outcome.tail:
        say(f"  {line}")
    return outcome


def _end(process: subprocess.Popen[bytes]) -> None:
    """All processes of its group, whether it is over or not: a test that hangs leaves others."""
    for number, wait in ((signal.SIGTERM, _END_SECONDS), (signal.SIGKILL, _END_SECONDS)):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(wait)
