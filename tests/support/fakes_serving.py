"""`loramux serve` with a server that has no model: `python fakes_serving.py BUILD_SECONDS FAILURE [FLAG ...]`.

Its application answers /stream with a line each 50 ms, twenty times, and refuses new streams while it drains.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from loramux_server.base.source import BaseSource
from loramux_server.cli.main import main
from loramux_server.config.serve import ServeConfig
from loramux_server.errors import BaseModelError
from loramux_server.serving import process
from loramux_server.serving.startup import Stages
from loramux_server.wire.connections import Connections

LINES = 20
SECONDS_PER_LINE = 0.05


class FakeBuilt:
    """Stands for engine, store and API together."""

    models = ["base", "pirate"]
    summary = ["memory: none"]

    def __init__(self) -> None:
        self.running = 0
        self.draining = False

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        refused = scope["path"] in ("/ready", "/stream") and self.draining
        await send({"type": "http.response.start", "status": 503 if refused else 200, "headers": []})
        if scope["path"] == "/stream" and not refused:
            self.running += 1
            for number in range(LINES):
                await send({"type": "http.response.body", "body": f"{number}\n".encode(), "more_body": True})
                await asyncio.sleep(SECONDS_PER_LINE)
            self.running -= 1
        await send({"type": "http.response.body", "body": b""})

    async def start(self) -> None:
        pass

    async def drain(self, timeout: float) -> int:
        self.draining = True
        deadline = time.monotonic() + timeout
        while self.running and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        return self.running

    async def stop(self) -> None:
        print("fake stopped")


def install(build_seconds: float, failure: str) -> None:
    """Puts a module in place of `loramux_server.serving.build`; its `build` takes this long and raises this, if any.

    Any base is found.
    """

    def build(config: ServeConfig, source: BaseSource, stages: Stages, connections: Connections) -> FakeBuilt:
        with stages.stage("load the base"):
            time.sleep(build_seconds)
            if failure:
                raise BaseModelError(failure)
        return FakeBuilt()

    def found(spec: str, cache_dir: Path, report: Callable[[str], None]) -> BaseSource:
        return BaseSource(cache_dir, spec, from_gguf=False)

    process.resolve_base = found  # type: ignore[assignment]
    module = ModuleType("loramux_server.serving.build")
    module.build = build  # type: ignore[attr-defined]
    sys.modules["loramux_server.serving.build"] = module


if __name__ == "__main__":
    install(float(sys.argv[1]), sys.argv[2])
    sys.exit(main(["serve", *sys.argv[3:]], {}))
