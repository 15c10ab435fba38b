"""One server over HTTP with 64 clients, on the checkpoint that the part before wrote. A part of `loadtests gpu`."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..client import Target, run_clients
from ..errors import LoadTestError
from ..process import KEYS, Program, Server, environment_without, started_server
from ..report import Summary, summarize, summary_table
from ..workload import Workload

CLIENTS, TOKENS = 64, 384
_WORDS = (10, 14)  # of a prompt: most rows of a step are replies


def main() -> int:
    """0 if every reply came."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True, help="holds base/ and adapters/")
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    found: dict[str, Any] = {"clients": CLIENTS}
    log = args.scratch / "server.log"
    environ = environment_without(*KEYS, "TRITON_INTERPRET")
    program = Program((sys.executable, "-m", "loramux_server"), {**environ, "XDG_CACHE_HOME": str(args.scratch)})
    arguments = ["--device", "cpu" if args.dry else "cuda", "--preload", str(args.scratch / "adapters")]
    arguments += ["--max-model-len", "1024"] if args.dry else []
    status = 0
    try:
        with started_server(args.scratch / "base", arguments=arguments, log=log, program=program) as server:
            found["start"] = log.read_text(encoding="utf-8").splitlines()
            status = _ask(server, args, found)
    except LoadTestError as error:
        print(error)
        status = 1
    found["log"] = log.read_text(encoding="utf-8", errors="replace").splitlines()[-200:] if log.exists() else []
    args.out.write_text(json.dumps(found), encoding="utf-8")
    if status:
        print("\n".join(found["log"][-20:]))
    return status


def _ask(server: Server, args: argparse.Namespace, found: dict[str, Any]) -> int:
    target = Target(server.url, server.base_model(), extra={"ignore_eos": True})
    models = json.loads(server.call("GET", "/v1/models"))["data"]
    names = tuple(str(model["id"]) for model in models if model.get("parent"))
    tokens, clients = (4, 2) if args.dry else (TOKENS, CLIENTS)
    summaries: list[Summary] = []
    for seed, (label, adapters) in enumerate((("warm-up", names), ("adapters", names), ("base", ()))):
        replies = Workload(adapters=adapters, max_tokens=tokens, prompt_words=_WORDS, seed=seed).requests(2 * clients)
        run = asyncio.run(run_clients(target, replies, clients=clients, seconds=args.seconds / 4))
        summaries.append(summarize(label, run))
        found[label] = asdict(summaries[-1])
        args.out.write_text(json.dumps(found), encoding="utf-8")
    print(summary_table(summaries))
    return int(any(summary.errors or summary.cut for summary in summaries))


if __name__ == "__main__":
    sys.exit(main())
