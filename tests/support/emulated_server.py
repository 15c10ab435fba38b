"""A whole server on an emulated device, in this process: the code and the start of `loramux serve`, over real HTTP."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn
from unittest.mock import patch

from loramux_server.config.serve import ServeConfig
from loramux_server.serving import build, process
from loramux_server.serving.startup import take_port, url_of
from loramux_server.wire.connections import Connections
from support.emulated import EmulatedDevice
from support.real_server import HttpServer

START_SECONDS = 300.0  # a machine may be busy
CONNECTIONS = 64
_BUILD = build.build


@dataclass
class EmulatedServer(HttpServer):
    """A server in a thread.

    Attributes:
        built: what serves: engine, store, caches.
        ended: what the serving thread ended with, None while it runs; its exit code, or what it raised.
    """

    device: EmulatedDevice = field(kw_only=True)
    built: build.BuiltServer | None = None
    ended: int | BaseException | None = None
    _loop: asyncio.AbstractEventLoop | None = None
    _stop: asyncio.Event | None = None
    _thread: threading.Thread | None = None

    def terminate(self) -> None:
        """As SIGTERM does: requests that run are finished, and no others begin. Returns at once."""
        assert self._loop is not None and self._stop is not None
        self._loop.call_soon_threadsafe(self._stop.set)

    def wait(self, seconds: float = 60.0) -> int:
        """Its exit code; raises what it ended with."""
        assert self._thread is not None
        self._thread.join(seconds)
        assert not self._thread.is_alive(), "the server still runs:\n" + "".join(self.lines)
        if isinstance(self.ended, BaseException):
            raise self.ended
        assert self.ended is not None
        return self.ended

    def said(self, text: str) -> bool:
        """Whether it printed this."""
        return text in "".join(self.lines)


@contextmanager
def emulated_server(device: EmulatedDevice, config: ServeConfig) -> Iterator[EmulatedServer]:
    """A ready server on this device; drained and stopped when the context ends, if it has not ended by then.

    `config.port` 0 takes a free one, and `config.device` is not asked. Raises what a start that failed raised.
    """
    server = EmulatedServer(config.adapter_dir, device=device)
    ready = threading.Event()

    def stop_event() -> asyncio.Event:
        server._loop, server._stop = asyncio.get_running_loop(), asyncio.Event()
        return server._stop

    def write(text: str) -> None:
        server.lines.append(text)
        if "is ready on" in text:
            ready.set()

    def built(*args: object) -> build.BuiltServer:
        server.built = _BUILD(*args)  # type: ignore[arg-type]
        return server.built

    def leave(message: str, code: int) -> NoReturn:
        raise RuntimeError(message)  # and not the end of all tests

    def run() -> None:
        try:
            with take_port(config.host, config.port) as listener:
                server.url = url_of(listener)
                server.ended = asyncio.run(process._serve(config, listener, Connections(CONNECTIONS)))
        except BaseException as error:
            server.ended = error
        finally:
            ready.set()

    with (
        patch.object(build, "device_of", lambda wanted, note: device),
        patch.object(build, "kernels_of", lambda environ: None),  # instruction sets are not of this device
        patch.object(build, "build", built),
        patch.object(process, "_stop_on_signals", stop_event),
        patch.object(process, "_leave", leave),
        patch.object(process, "_write", write),
    ):
        server._thread = threading.Thread(target=run, name="emulated server", daemon=True)
        server._thread.start()
        try:
            assert ready.wait(START_SECONDS), "the server is not ready:\n" + "".join(server.lines)
            if isinstance(server.ended, BaseException):
                raise server.ended
            yield server
        finally:
            if server.ended is None:
                server.terminate()
                server.wait()


def settings(base: Path, store: Path, **more: object) -> ServeConfig:
    """Small enough for the interpreter; `more` are settings of `loramux serve`."""
    values: dict[str, object] = {
        "base": str(base),
        "served_model_name": "tiny",
        "adapter_dir": store,
        "port": 0,
        "max_num_seqs": 3,
        "max_batch_tokens": 16,
        "max_model_len": 128,
        "proof_tokens": 4,
        "device_memory_mib": 8,
        "adapter_memory_mib": 2,
        "prefix_cache_mib": 2,
        "host_cache_mib": 64,
        "shutdown_timeout": 20.0,
    }
    return ServeConfig(**(values | more))  # type: ignore[arg-type]
