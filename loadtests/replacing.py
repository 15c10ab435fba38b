"""One adapter is replaced again and again while clients use it: every reply must come from a version that was current.

    python -m loadtests replace

Each upload is a version that never was before, made from one of a few adapters whose replies, taken beforehand on the
idle server, all differ. A reply is wrong if its text is not exactly what the version it names says, or if that version
was not the current one at any moment between the request and its end.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

from .client import Outcome, Run, Target, run_clients
from .errors import LoadTestError
from .make_adapters import make_adapters, read_shapes
from .process import Server, adapter_parts, started_server
from .publishing import Publication, Publisher, retouched
from .report import summarize, summary_table, table, write_json
from .workload import Request, Workload

NAME = "live"
VARIANTS = 8
STRENGTH = 0.5  # so that no two variants give the same reply
Spoken = dict[tuple[int, str], str]  # (variant, prompt) -> its reply


@dataclass(frozen=True, slots=True)
class Verdicts:
    """What came of the replies.

    Attributes:
        right: their text is their version's, and the version was current.
        wrong: one sentence each.
        failed: error -> how often.
    """

    right: int
    wrong: list[str]
    failed: dict[str, int]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", type=Path, help="directory of the base checkpoint (default: the server's default)")
    parser.add_argument("--times", type=int, default=1000, help="replacements (default: 1000)")
    parser.add_argument("--clients", type=int, default=8, help="closed-loop clients (default: 8)")
    parser.add_argument("--max-tokens", type=int, default=16, help="of every reply (default: 16)")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters, all linear layers (default: 8)")
    parser.add_argument("--seconds", type=float, default=900.0, help="most seconds of the whole test (default: 900)")
    parser.add_argument("--out", type=Path, default=Path("loadtests/results"), help="where replace.json goes")


def main(args: argparse.Namespace) -> int:
    """0 if all replies were right and all uploads were taken."""
    with tempfile.TemporaryDirectory(prefix="loadtest-adapters-") as scratch:
        made = make_adapters(
            Path(scratch), read_shapes(args.base), [args.rank] * VARIANTS, prefix="variant", strength=STRENGTH
        )
        variants = [adapter_parts(directory) for directory in made.values()]
        with started_server(args.base, log=args.out / "server.log.tmp") as server:
            target = Target(server.url, server.base_model())
            asked = [it.prompt for it in Workload().requests(2 * args.clients)]
            spoken, prompts = speak(server, target, variants, asked, args.max_tokens)
            print(f"{VARIANTS} adapters tell themselves apart on {len(prompts)} prompts; now as one", flush=True)
            publisher = Publisher(
                server, [NAME], lambda number: retouched(variants[number % VARIANTS], number // VARIANTS)
            )
            publisher.in_turn(1)
            run = replace_under_load(publisher, target, prompts, args)
    verdicts = judge(run, publisher.done, spoken)
    summary = summarize(f"{len(publisher.done) - 1} replacements", run)
    print(f"\n{summary_table([summary])}\n")
    rows = [
        ["replies", "count"],
        ["right", str(verdicts.right)],
        ["from a wrong version", str(len(verdicts.wrong))],
        ["failed", str(sum(verdicts.failed.values()))],
        ["still open at the end", str(run.cut)],
        ["uploads refused", str(len(publisher.errors))],
        ["versions that answered", str(len({outcome.version for outcome in run.outcomes if outcome.version}))],
    ]
    print(table(rows))
    for line in [*verdicts.wrong[:10], *verdicts.failed, *publisher.errors[:10]]:
        print(f"  {line}")
    write_json(args.out / "replace.json", {rows[0][0]: {name: int(value) for name, value in rows[1:]}})
    return 0 if verdicts.right and not (verdicts.wrong or verdicts.failed or publisher.errors) else 1


def speak(
    server: Server, target: Target, variants: Sequence[Mapping[str, bytes]], prompts: Sequence[str], max_tokens: int
) -> tuple[Spoken, list[str]]:
    """What each variant says, one request at a time, and the prompts to which all say something else.

    The adapters are gone afterwards. Raises LoadTestError if fewer than half of the prompts tell them apart.
    """
    spoken: Spoken = {}
    for number, parts in enumerate(variants):
        name = f"variant{number}"
        server.put(name, retouched(parts, (1 << 15) - 1))  # a version that does not come again
        requests = [Request(index, prompt, name, max_tokens) for index, prompt in enumerate(prompts)]
        run = asyncio.run(run_clients(target, requests, clients=1, seconds=120.0))
        spoken |= {(number, outcome.prompt): outcome.text for outcome in run.outcomes}
        server.call("DELETE", f"/v1/adapters/{name}")
    everybody = range(len(variants))
    telling = [it for it in prompts if len({spoken[number, it] for number in everybody}) == len(variants)]
    if 2 * len(telling) < len(prompts):
        raise LoadTestError(f"only {len(telling)} of {len(prompts)} prompts tell the adapters apart")
    return spoken, telling


def replace_under_load(publisher: Publisher, target: Target, prompts: Sequence[str], args: argparse.Namespace) -> Run:
    """Requests without a pause until the last replacement is done, or the time is up."""
    replacing = threading.Thread(target=publisher.in_turn, args=(args.times,), name="replace")

    def requests() -> Iterator[Request]:
        for index, prompt in enumerate(cycle(prompts)):
            if not replacing.is_alive():
                return
            yield Request(index, prompt, NAME, args.max_tokens)

    replacing.start()
    run = asyncio.run(run_clients(target, requests(), clients=args.clients, seconds=args.seconds))
    publisher.stop()
    replacing.join()
    return run


def judge(run: Run, publications: Sequence[Publication], spoken: Spoken) -> Verdicts:
    """Holds every reply against the version that it names."""
    ends = [later.done for later in islice(publications, 1, None)] + [float("inf")]
    current = {it.version: (it.number % VARIANTS, it.begun, end) for it, end in zip(publications, ends, strict=True)}
    right, wrong, failed = 0, [], dict[str, int]()
    for outcome in run.outcomes:
        if outcome.error is not None:
            failed[outcome.error] = failed.get(outcome.error, 0) + 1
        elif outcome.finish is not None:
            fault = _fault(outcome, run.began, current, spoken)
            if fault is None:
                right += 1
            else:
                wrong.append(fault)
    return Verdicts(right, wrong, failed)


def _fault(
    outcome: Outcome, zero: float, current: Mapping[str, tuple[int, float, float]], spoken: Spoken
) -> str | None:
    """What is wrong with a reply."""
    if outcome.version is None or outcome.version not in current:
        return f"version {outcome.version} was never published"
    variant, since, until = current[outcome.version]
    if not since <= zero + outcome.ended or not zero + outcome.started <= until:
        return f"version {outcome.version} was current from {since:.2f} to {until:.2f}, asked {zero + outcome.started}"
    if outcome.text != spoken[variant, outcome.prompt]:
        return f"version {outcome.version} says {spoken[variant, outcome.prompt]!r}, not {outcome.text!r}"
    return None
