"""All that a machine with a GPU is asked, in one go and within a budget of time.

    python -m loadtests gpu                  on a machine with a CUDA device: PyTorch for CUDA, and a C compiler
    python -m loadtests gpu --dry            anywhere: the same programs on a tiny shape, in Triton's interpreter

Versions; memory bandwidth; tests/gpu and the kernels' own tests, compiled; steps of an 8B shape with random weights
made on the device, with the floor of each, and where the time of one goes; a server over HTTP with 64 clients; the
same steps by bitsandbytes' layers, by transformers and by transformers with peft, in turn with ours. Nothing is
downloaded. Each part is a process of its own with a time limit; what it found is written to `gpu-<card>.json` when it
is over. With `--wheels` the packages of that directory are installed into a directory of their own first (`make
gpu-wheels` fills it).
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..errors import LoadTestError
from ..report import write_json
from .parts import ROOT, Outcome, Part, run_all
from .report import figures, show
from .wheels import install

BUDGET = 470.0  # seconds, of the 8 minutes that it may take
DRY_SLOWER = 4.0
DRIVER = "libcuda.so.1"  # NVIDIA's driver brings it, and PyTorch opens it by this name
PARTS = (
    Part("versions", "measure.versions", worth=100, seconds=15, most=60),
    Part("bandwidth", "measure.bandwidth", worth=95, seconds=15, most=60),
    Part("tests", "measure.tests", worth=90, seconds=110, most=170, least=30),
    Part("steps", "measure.steps", worth=99, seconds=110, most=200, least=30),
    Part("checkpoint", "measure.checkpoint", worth=86, seconds=25, most=90, least=20),
    Part("http", "loadtests.gpu.http", worth=85, seconds=90, most=150, least=45, needs=("checkpoint",)),
    Part("beside", "measure.beside", worth=80, seconds=100, most=180, least=30),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry", action="store_true", help="try the programs on a tiny shape, without a device")
    parser.add_argument("--budget", type=float, default=BUDGET, help=f"seconds of it all (default: {BUDGET:.0f})")
    names = [part.name for part in PARTS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="PART", help=", ".join(names))
    parser.add_argument("--wheels", type=Path, help="install the wheels of this directory beside the environment first")
    parser.add_argument(
        "--scratch", type=Path, help="for a checkpoint and its cache, 16 GB (default: a temporary directory)"
    )
    parser.add_argument("--out", type=Path, default=Path("loadtests/results"), help="where gpu-<card>.json goes")


def main(args: argparse.Namespace) -> int:
    """0 if every part passed.

    Raises:
        LoadTestError: there is no driver, so that every part would fail.
    """
    if not args.dry:
        check_driver()
    with tempfile.TemporaryDirectory(prefix="loadtest-gpu-", dir=args.scratch) as name:
        scratch = Path(name)
        site = scratch / "site"
        if args.wheels is not None:
            install(args.wheels, site)
        # the interpreter is slow, and a machine that tries this may be busy
        slower = DRY_SLOWER if args.dry else 1.0
        parts = [replace(part, most=slower * part.most) for part in PARTS if part.name in args.only]
        outcomes: dict[str, Outcome] = {}

        def told(name: str, outcome: Outcome) -> None:
            outcomes[name] = outcome
            print(f"{name}: {outcome.state} in {outcome.seconds:.1f} s{outcome.why and f': {outcome.why}'}", flush=True)
            write(args, outcomes)

        run_all(
            parts,
            budget=slower * args.budget,
            out=scratch,
            arguments=["--scratch", str(scratch), *(["--dry"] if args.dry else [])],
            environ=environment(site if args.wheels is not None else None, dry=args.dry),
            told=told,
            say=lambda line: print(line, flush=True),
        )
    path = write(args, outcomes)
    if args.dry:
        print("\nA dry run, in Triton's interpreter on a tiny shape: these figures say nothing of a GPU.")
    print(f"\n{show(document(outcomes))}\nwritten: {path}")
    print(last_line(outcomes))
    return int(any(outcome.state != "passed" for outcome in outcomes.values()))


def check_driver() -> None:
    try:
        ctypes.CDLL(DRIVER)
    except OSError as error:
        raise LoadTestError(
            f"NVIDIA's driver is not on this machine (there is no {DRIVER}); --dry tries the programs without a card"
        ) from error


def environment(site: Path | None, *, dry: bool) -> dict[str, str]:
    """Of the parts. `site`: where our wheel and others were installed; None takes the sources of this checkout."""
    ours = [ROOT / "server", ROOT / "adapters"] if site is None else [site]
    path = [*ours, ROOT, ROOT / "tests", ROOT / "tests" / "gpu"]
    before = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    return {
        **os.environ,
        "TRITON_INTERPRET": "1" if dry else "0",
        "PYTHONPATH": os.pathsep.join([*map(str, path), *before]),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def document(outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """What the JSON file holds: the parts, and the figures that follow from several of them."""
    return {"parts": {name: asdict(outcome) for name, outcome in outcomes.items()}, "figures": figures(outcomes)}


def write(args: argparse.Namespace, outcomes: Mapping[str, Outcome]) -> Path:
    versions = outcomes["versions"].found if "versions" in outcomes else {}
    card = re.sub(r"[^a-z0-9]+", "-", str(versions.get("card", "unknown")).lower()).strip("-")
    path: Path = args.out / ("gpu-dry.json.tmp" if args.dry else f"gpu-{card}.json")
    settings = {"dry": args.dry, "budget": args.budget, "parts": list(args.only), "wheels": args.wheels is not None}
    write_json(path, {"settings": settings, **document(outcomes)})
    return path


def last_line(outcomes: Mapping[str, Outcome]) -> str:
    by_state: dict[str, list[str]] = {}
    for name, outcome in outcomes.items():
        by_state.setdefault(outcome.state, []).append(name)
    order: Sequence[str] = ("passed", "failed", "out of time", "left out")
    return "; ".join(f"{state}: {', '.join(by_state[state])}" for state in order if state in by_state)
