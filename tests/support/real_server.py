"""Runs `loramux serve` as a process of its own on a free loopback port, and talks to it as any client would."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

START_TIMEOUT = 240.0  # a first start fetches and converts the embedded base
BASE = "smollm2-135m-instruct"


@dataclass
class HttpServer:
    """A running server, as its clients know it.

    Attributes:
        store: where its adapters are kept.
        key: sent with every request unless it is empty.
        lines: all that it has printed.
    """

    store: Path
    url: str = ""
    key: str = ""
    lines: list[str] = field(default_factory=list)

    def client(self) -> httpx.Client:
        headers = {"authorization": f"Bearer {self.key}"} if self.key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=120)

    def upload(self, name: str, directory: Path, query: str = "") -> httpx.Response:
        files = {
            "config": (directory / "adapter_config.json").read_bytes(),
            "weights": (directory / "adapter_model.safetensors").read_bytes(),
        }
        with self.client() as client:
            return client.put(f"/v1/adapters/{name}{query}", files=files)

    def adapters(self) -> dict[str, Any]:
        """The server's own list, by name."""
        with self.client() as client:
            return {adapter["name"]: adapter for adapter in client.get("/v1/adapters").json()["data"]}

    def scrape(self, path: str = "/metrics") -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
        """Every sample: name -> sorted labels -> value."""
        with self.client() as client:
            text = client.get(path).text
        samples: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                samples.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
        return samples

    def metric(self, name: str, **labels: str) -> float:
        """Sum over the series of one metric that have these labels."""
        series = self.scrape()[name]
        return sum(value for key, value in series.items() if labels.items() <= dict(key).items())

    def wait_for(self, name: str, value: float, seconds: float = 2.0, **labels: str) -> None:
        """Returns once the metric has this value; fails after so many seconds."""
        eventually(lambda: self.metric(name, **labels), value, seconds)


@dataclass
class RealServer(HttpServer):
    """A server in a process of its own."""

    process: subprocess.Popen[str] = field(kw_only=True)

    def terminate(self, timeout: float = 60.0) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout)


def eventually(find: Callable[[], object], expected: object, seconds: float = 2.0) -> None:
    """Returns once `find` finds what is expected; fails after so many seconds."""
    deadline = time.monotonic() + seconds
    while (found := find()) != expected:
        assert time.monotonic() < deadline, f"found {found} and not {expected}"
        time.sleep(0.02)


@contextmanager
def running_server(store: Path, *flags: str, environ: dict[str, str] | None = None) -> Iterator[RealServer]:
    """A ready server whose adapters are kept in `store`; ended, by force if need be, when the context ends."""
    process = subprocess.Popen(
        [sys.executable, "-m", "loramux_server", "serve", "--port", "0", "--adapter-dir", str(store), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=clean_environment() | (environ or {}),
    )
    server = RealServer(store, process=process, key=(environ or {}).get("LORAMUX_API_KEY", ""))
    ready = threading.Event()
    reader = threading.Thread(target=_read, args=(server, ready), daemon=True)
    reader.start()
    try:
        deadline = time.monotonic() + START_TIMEOUT
        while not ready.wait(0.1):
            assert process.poll() is None, "the server ended:\n" + "\n".join(server.lines)
            assert time.monotonic() < deadline, "the server is not ready:\n" + "\n".join(server.lines)
        yield server
    finally:
        process.kill()
        process.wait()
        reader.join(5)


def clean_environment() -> dict[str, str]:
    """The tests' own environment without settings of a server, but for the instruction set (`make test-isa`)."""
    kept = "LORAMUX_ISA"
    return {name: value for name, value in os.environ.items() if name == kept or not name.startswith("LORAMUX_")}


def _read(server: RealServer, ready: threading.Event) -> None:
    assert server.process.stdout is not None
    for line in server.process.stdout:
        server.lines.append(line.rstrip())
        if found := re.search(r"ready on (http://\S+)", line):
            server.url = found[1]
            ready.set()
    server.process.stdout.close()
