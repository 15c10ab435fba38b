"""`python -m loadtests`: the commands and their flags."""

from __future__ import annotations

import argparse
import os
import signal
import sys

from . import (
    baselines,
    compare,
    cost,
    fairness,
    fidelity,
    hostile,
    idle_streams,
    independent,
    make_adapters,
    opening,
    pauses,
    registry,
    replacing,
    shapes,
    slots,
    soak,
    step,
    sweep,
    train_baseline,
)
from .checkouts import run as checkouts
from .errors import LoadTestError
from .gpu import run as gpu
from .peers import run as peers

COMMANDS = {
    "run": (sweep, "measure a server: one scenario with --url, a sweep of ours with --spawn"),
    "compare": (compare, "ours beside transformers + peft on the same NF4 base, in interleaved rounds"),
    "baselines": (baselines, "the process that `compare` starts for the other side"),
    "train": (train_baseline, "our training beside a plain peft + bitsandbytes loop, in interleaved rounds"),
    "registry": (registry, "thousands of registered adapters, room for a few: throughput, waiting, memory, start"),
    "opening": (opening, "time to open a store of 10,000 adapters"),
    "replace": (replacing, "one adapter replaced 1,000 times under load: every reply from a version that was current"),
    "pauses": (pauses, "pauses between tokens while adapters are replaced, beside the quiet server"),
    "hostile": (hostile, "bodies made to stop a server: each is refused, and streams go on beside it"),
    "idle": (idle_streams, "thousands of streams that wait: the server's memory for each"),
    "cost": (cost, "what adapters cost: base traffic beside them, few among many registered, few beside the base"),
    "fairness": (fairness, "one request behind a crowd for another adapter: how long it waits, in two checkouts"),
    "fidelity": (fidelity, "how far the served distribution is from fp32 on the same NF4 weights"),
    "shapes": (shapes, "replies held to JSON beside replies that are not, in interleaved rounds: what a shape costs"),
    "slots": (slots, "how long the engine looks for an adapter's place, by rows of device memory, in two checkouts"),
    "soak": (soak, "ten minutes while adapters come, change and go: memory, threads and descriptors stay"),
    "step": (
        step,
        "the whole compiled step beside the same kernels module by module, on random Qwen3 and Gemma 3 bases",
    ),
    "gpu": (gpu, "on a machine with a GPU: tests, steps beside floors and other sides, a server, in 8 minutes"),
    "checkouts": (checkouts, "two checkouts of this project: the same bits of every reply, speed and start as ratios"),
    "peers": (peers, "ours beside vLLM on the CPU and llama.cpp's server, in interleaved rounds"),
    "independent": (independent, "ours and NVIDIA's aiperf as clients of one server: do they see the same"),
    "make-adapters": (make_adapters, "write random PEFT adapters of a checkpoint's shapes"),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests", description="Load tests over HTTP.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module, summary) in COMMANDS.items():
        raw = argparse.RawDescriptionHelpFormatter
        module.add_arguments(commands.add_parser(name, help=summary, description=module.__doc__, formatter_class=raw))
    keys = {"api_key": os.environ.get("LORAMUX_API_KEY"), "admin_key": os.environ.get("LORAMUX_ADMIN_KEY")}
    args = parser.parse_args(namespace=argparse.Namespace(**keys))
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that started processes are stopped
    try:
        status: int = COMMANDS[args.command][0].main(args)
    except LoadTestError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return status


if __name__ == "__main__":
    sys.exit(main())
