"""How long the engine looks for an adapter's place in device memory, by rows of it: two checkouts beside each other.

    python -m loadtests slots --before DIR --after DIR

One thread, no server: `first` is the first adapter of an empty table, `evicting` one for which another has to leave a
full table of rank 8, `waiting` one that finds everything in use. Medians of each call, in milliseconds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from .errors import LoadTestError
from .process import environment_without
from .report import processor_name, write_json

ROWS = (1_000, 10_000, 100_000, 1_000_000)
CASES = ("first", "evicting", "waiting")
PROGRAM = """
import json, statistics, sys, time
from loramux_adapters.lora.slots import Slot, SlotTable, _Resident

def timed(call):
    began = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - began)

rows, budget = int(sys.argv[1]), float(sys.argv[2])
first, evicting, waiting = [], [], []
table = SlotTable(rows)
first.append(timed(lambda: table.acquire("0", 8)))
for number in range(1, rows // 8):
    if hasattr(table, "_units"):  # a table that would take hours to fill by its own means
        table._clock += 1
        table._residents[str(number)] = _Resident(Slot(8 * number, 8), 1, table._clock)
        table._fill(Slot(8 * number, 8), str(number))
    else:
        table.acquire(str(number), 8)
waiting.append(timed(lambda: table.acquire("waits", 64)))
for number in range(rows // 8):
    if table.lookup(str(number)) is not None:
        table.release(str(number))
began = time.perf_counter()
while len(evicting) < 200 and (not evicting or time.perf_counter() - began < budget):
    evicting.append(timed(lambda: table.acquire(f"new-{len(evicting)}", 16)))
    table.release(f"new-{len(evicting) - 1}")
print(json.dumps({"first": first[0], "evicting": statistics.median(evicting), "waiting": waiting[0]}))
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for name in ("before", "after"):
        parser.add_argument(f"--{name}", type=Path, required=True, metavar="DIR", help=f"the checkout {name}")
    parser.add_argument("--seconds", type=float, default=120.0, help="for one size; what takes longer is left out")
    parser.add_argument("--out", type=Path, default=Path("loadtests/results"), help="where slots.json goes")


def main(args: argparse.Namespace) -> int:
    found: dict[str, dict[int, dict[str, float] | None]] = {"before": {}, "after": {}}
    print(f"{processor_name()}\n{'rows':>9} " + " ".join(f"{case:>22}" for case in CASES))
    for rows in ROWS:
        for name, directory in (("before", args.before), ("after", args.after)):
            found[name][rows] = seconds_of(directory, rows, args.seconds)
        print(f"{rows:>9,} " + " ".join(f"{shown(found, rows, case):>22}" for case in CASES), flush=True)
    write_json(args.out / "slots.json", {"milliseconds": found})
    return 0


def seconds_of(checkout: Path, rows: int, limit: float) -> dict[str, float] | None:
    """None if it takes longer than `limit`. Raises LoadTestError where the checkout has no such table."""
    environ = environment_without("PYTHONPATH") | {"PYTHONPATH": str(checkout.resolve() / "adapters")}
    words = [sys.executable, "-c", PROGRAM, str(rows), "5"]
    try:
        ran = subprocess.run(words, env=environ, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return None
    if ran.returncode != 0:
        raise LoadTestError(f"the table of {checkout} cannot be measured: {ran.stderr.strip()[-300:]}")
    result: dict[str, float] = json.loads(ran.stdout)
    return result


def shown(found: dict[str, dict[int, dict[str, float] | None]], rows: int, case: str) -> str:
    each = (found[name][rows] for name in ("before", "after"))
    return " -> ".join("too long" if one is None else f"{one[case]:.3g}" for one in each) + " ms"
