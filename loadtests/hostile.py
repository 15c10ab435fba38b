"""Hostile JSON bodies beside a stream: each is refused with its reason, and how long everything stands still meanwhile.

    python -m loadtests hostile
    python -m loadtests hostile --before DIR --before-command "env PYTHONPATH=DIR/server:DIR/adapters loramux"

Some clients stream from the base while others send one body again and again, as fast as it is answered. /health is
asked all the while: nothing needs less of the server, so its slowest answer is the longest pause of the event loop as a
client sees it. The server's own measure is read from /metrics, where it has one. Of several rounds the shortest of the
longest pauses counts: what a body causes comes in every round, what else the machine does in one.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import re
import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from .checkouts.checkout import Checkout
from .client import Target, run_clients
from .hostile_bodies import HostileBody, corpus
from .process import Program, Server, own_program, started_server
from .report import processor_name, table, write_json
from .workload import Workload

TARGET_SECONDS = 0.05
PROBE_SECONDS = 0.005
_BUCKET = re.compile(r'loramux_event_loop_pause_seconds_bucket\{le="([0-9.e+-]+)"\} ([0-9.e+]+)')


@dataclass(frozen=True, slots=True)
class Condition:
    """What happened while one body was sent. Times in seconds.

    Attributes:
        answers: how often it was answered, each with `status` and `message`.
        answered: the median time to an answer.
        events: of the streams, per second.
        health: the slowest answer of /health.
        pause: the server's own longest pause, rounded up to its measure's next step; None where it does not tell.
    """

    name: str
    status: int
    message: str
    answers: int
    answered: float
    events: float
    health: float
    pause: float | None

    def as_wanted(self, body: HostileBody) -> bool:
        return self.status == 400 and body.reason in self.message


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", type=Path, help="directory of the base checkpoint (default: the server's default)")
    parser.add_argument("--before", type=Path, metavar="DIR", help="another checkout, to be measured first")
    parser.add_argument("--before-command", metavar="WORDS", help="how to call it (default: its .venv/bin/loramux)")
    parser.add_argument("--after-command", metavar="WORDS", help="how to call this checkout's (default: loramux)")
    parser.add_argument("--rounds", type=int, default=3, help="over all bodies (default: 3)")
    parser.add_argument("--seconds", type=float, default=1.0, help="for which each body is sent (default: 1)")
    parser.add_argument("--streams", type=int, default=2, help="clients that stream (default: 2)")
    parser.add_argument("--senders", type=int, default=1, help="clients that send the body (default: 1)")
    parser.add_argument("--out", type=Path, default=Path("loadtests/results"), help="where hostile.json goes")


def main(args: argparse.Namespace) -> int:
    """0 if every body is refused with its reason and no pause is above the target."""
    sides: dict[str, Program] = {}
    if args.before is not None:
        sides["before"] = Checkout.of("before", args.before, args.before_command).program
    here = Checkout.of("after", Path(), args.after_command).program if args.after_command else own_program()
    sides["after"] = here
    results: dict[str, list[Condition]] = {}
    wanted = True
    for side, program in sides.items():
        with started_server(args.base, log=args.out / "server.log.tmp", program=program) as server:
            bodies = corpus(server.base_model())
            rounds = [[measure(server, body, args) for body in [None, *bodies]] for _ in range(args.rounds)]
        results[side] = [over_rounds(of_one) for of_one in zip(*rounds, strict=True)]
        wanted = all(it.as_wanted(body) for it, body in zip(results[side][1:], bodies, strict=True))
        print(f"\n{side}, {processor_name()}\n{show(results[side], bodies)}")
    write_json(args.out / "hostile.json", {side: [asdict(it) for it in done] for side, done in results.items()})
    return 0 if wanted and max(it.health for it in results["after"]) <= TARGET_SECONDS else 1


def measure(server: Server, body: HostileBody | None, args: argparse.Namespace) -> Condition:
    """None: nothing is sent beside the streams."""
    before = pauses(server)
    sent, (events, health) = asyncio.run(_beside(server, body, args))
    after = pauses(server)
    longest = max((edge for edge, count in after.items() if count > before.get(edge, 0)), default=None)
    times = sorted(seconds for seconds, _, _ in sent)
    _, status, message = sent[0] if sent else (0.0, 0, "")
    condition = Condition(
        name=body.name if body else "nothing",
        status=status,
        message=message,
        answers=len(sent),
        answered=times[len(times) // 2] if times else 0.0,
        events=events,
        health=health,
        pause=longest,
    )
    print(
        f"{condition.name:34} {status:3} health {1000 * health:6.0f} ms  {events:6.1f} events/s  {message[:60]}",
        flush=True,
    )
    return condition


def over_rounds(conditions: Sequence[Condition]) -> Condition:
    """One of the same body in every round: the shortest of the longest pauses, the median of the rest."""
    own = [it.pause for it in conditions if it.pause is not None]
    return replace(
        max(conditions, key=lambda it: it.status),
        answers=sum(it.answers for it in conditions),
        answered=statistics.median(it.answered for it in conditions),
        events=statistics.median(it.events for it in conditions),
        health=min(it.health for it in conditions),
        pause=min(own, default=None),
    )


Sent = list[tuple[float, int, str]]


async def _beside(
    server: Server, body: HostileBody | None, args: argparse.Namespace
) -> tuple[Sent, tuple[float, float]]:
    """Answers to the body, and beside it the streams' events per second and the slowest answer of /health."""
    target = Target(server.url, server.base_model(), extra={"ignore_eos": True})
    requests = Workload(max_tokens=512, seed=1).requests(4096)
    sent: Sent = []
    slowest: list[float] = [0.0]
    beside = [asyncio.create_task(_probe(target, slowest))]
    if body is not None:
        beside += [asyncio.create_task(_send(target, body, sent)) for _ in range(args.senders)]
    run = await run_clients(target, requests, clients=args.streams, seconds=args.seconds)
    for task in beside:
        task.cancel()
    await asyncio.gather(*beside, return_exceptions=True)
    return sent, (sum(len(outcome.stamps) for outcome in run.outcomes) / run.seconds, slowest[0])


async def _send(target: Target, body: HostileBody, sent: Sent) -> None:
    while True:
        began = time.perf_counter()
        status, answer = await _ask(target, "POST", body.path, body.raw)
        message = ""
        with suppress(ValueError, KeyError, TypeError):
            message = str(json.loads(answer)["error"]["message"])
        sent.append((time.perf_counter() - began, status, message))


async def _probe(target: Target, slowest: list[float]) -> None:
    while True:
        began = time.perf_counter()
        try:
            await _ask(target, "GET", "/health", b"")
        finally:  # also where time was up before the answer came
            slowest[0] = max(slowest[0], time.perf_counter() - began)
        await asyncio.sleep(PROBE_SECONDS)


async def _ask(target: Target, method: str, path: str, raw: bytes) -> tuple[int, bytes]:
    """Status and body of one reply."""
    reader, writer = await asyncio.open_connection(*target.address)
    try:
        head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Length: {len(raw)}\r\n"
        writer.write(head.encode() + b"Content-Type: application/json\r\n\r\n" + raw)
        reply = await reader.read()
    finally:
        writer.close()
    first, _, answer = reply.partition(b"\r\n\r\n")
    return int(first[9:12] or b"0"), answer


def pauses(server: Server) -> dict[float, float]:
    """The event loop's pauses so far: upper edge -> how many were between the edge before and this one."""
    connection = http.client.HTTPConnection(*Target(server.url, "").address, timeout=30)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    found, below = {}, 0.0
    for edge, count in _BUCKET.findall(text):
        found[float(edge)], below = float(count) - below, float(count)
    return found


def show(conditions: list[Condition], bodies: list[HostileBody]) -> str:
    head = ["body", "status", "as wanted", "answers", "ms to answer", "/health ms", "own ms", "events/s"]
    rows = [
        [
            it.name,
            str(it.status),
            "yes" if body is None or it.as_wanted(body) else "NO",
            str(it.answers),
            f"{1000 * it.answered:.0f}",
            f"{1000 * it.health:.0f}",
            "-" if it.pause is None else f"<= {1000 * it.pause:.0f}",
            f"{it.events:.1f}",
        ]
        for it, body in zip(conditions, [None, *bodies], strict=True)
    ]
    longest = max(conditions[1:], key=lambda it: it.health)
    slowest = min(conditions[1:], key=lambda it: it.events)
    return table([head, *rows]) + (
        f"\nlongest /health {1000 * longest.health:.0f} ms ({longest.name}), target {1000 * TARGET_SECONDS:.0f} ms; "
        f"fewest events {slowest.events:.1f} a second ({slowest.name}), {conditions[0].events:.1f} beside nothing"
    )
