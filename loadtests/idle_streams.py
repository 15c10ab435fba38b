"""Memory of a server while thousands of streams wait: how many bytes each costs.

    python -m loadtests idle

One reply runs at a time, so that all other streams wait in the queue, each with its connection open. Both processes
need a file descriptor for each: where the system allows fewer, fewer are opened, and the table says so.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import socket
import time
from contextlib import ExitStack
from pathlib import Path

from .client import address_of
from .errors import LoadTestError
from .memory import resident_bytes
from .process import Server, started_server
from .report import table, write_json

STREAMS = 10_000
TARGET_MIB = 200  # for so many
WARM_UP = 100  # streams that are opened and closed first, so that what is allocated once is not counted
SPARE = 200  # descriptors that neither process gives to these streams
WAIT_SECONDS = 300.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", type=Path, help="directory of the base checkpoint (default: the server's default)")
    parser.add_argument("--streams", type=int, default=STREAMS, help=f"streams that wait (default: {STREAMS})")
    parser.add_argument("--out", type=Path, default=Path("loadtests/results"), help="where idle.json goes")


def main(args: argparse.Namespace) -> int:
    """0 if the memory of all streams is within the target."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    count = min(args.streams, most - SPARE) if most != resource.RLIM_INFINITY else args.streams
    room = ["--max-waiting", str(4 * count), "--max-num-seqs", "1", "--request-timeout", "3600"]
    with started_server(args.base, arguments=room, log=args.out / "server.log.tmp") as server:
        assert server.pid is not None
        model = server.base_model()
        with opened(server, model, WARM_UP):
            pass
        wait_for(server, 0)
        before = resident_bytes(server.pid)["rss"]
        began = time.monotonic()
        with opened(server, model, count) as waiting:
            seconds = time.monotonic() - began
            during = resident_bytes(server.pid)["rss"]
            asked = time.monotonic()
            server.call("GET", "/health")
            health = time.monotonic() - asked
    each = (during - before) / waiting
    at_target = each * STREAMS / 2**20
    rows = [
        ["streams", "opened in s", "MiB before", "MiB with them", "KiB each", f"MiB for {STREAMS:,}", "target"],
        [
            f"{waiting:,}",
            f"{seconds:.1f}",
            f"{before / 2**20:.0f}",
            f"{during / 2**20:.0f}",
            f"{each / 1024:.1f}",
            f"{at_target:.0f}",
            f"{TARGET_MIB}",
        ],
    ]
    print("\n" + table(rows) + f"\n/health answered in {1000 * health:.0f} ms beside them")
    if waiting < 0.99 * STREAMS:
        print(f"the last column but one is extrapolated: {waiting:,} were opened")
    write_json(
        args.out / "idle.json",
        {"streams": waiting, "before": before, "during": during, "bytes_each": each, "health_seconds": health},
    )
    return 0 if at_target <= TARGET_MIB else 1


class opened(ExitStack):
    """So many streams that wait in the server's queue; entering gives how many do."""

    def __init__(self, server: Server, model: str, count: int) -> None:
        super().__init__()
        self._server, self._model, self._count = server, model, count

    def __enter__(self) -> int:  # type: ignore[override]
        super().__enter__()
        request = _request(self._server, self._model)
        for _ in range(self._count):
            connection = self.enter_context(socket.create_connection(address_of(self._server.url), timeout=60))
            connection.sendall(request)
        return wait_for(self._server, self._count - 1)


def wait_for(server: Server, wanted: int) -> int:
    """How many requests wait, once that is `wanted` or no longer changes; LoadTestError if most never come."""
    deadline, last, still = time.monotonic() + WAIT_SECONDS, -1, 0
    while time.monotonic() < deadline:
        found = re.search(r"^loramux_requests_waiting (\S+)$", server.call("GET", "/metrics").decode(), re.MULTILINE)
        assert found is not None
        waiting = int(float(found[1]))
        still = still + 1 if waiting == last else 0
        if waiting == wanted or (still >= 10 and waiting > 0.9 * wanted):
            return waiting
        last = waiting
        time.sleep(0.5)
    raise LoadTestError(f"{last} requests wait, and not {wanted}")


def _request(server: Server, model: str) -> bytes:
    host, port = address_of(server.url)
    message = {"role": "user", "content": "Tell a long story of a lighthouse and its keeper."}
    body = json.dumps({"model": model, "messages": [message], "stream": True, "max_tokens": 1024}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
