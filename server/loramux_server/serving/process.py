"""The life of the serving process, from the port to the last byte of the last reply.

The event loop runs in the main thread from the first second. The base is loaded in a thread beside it; what
`serving.build` returns is then started, put behind the port, and on SIGTERM or SIGINT drained and stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NoReturn, Protocol, cast

import uvicorn

from loramux_adapters.store.store import check_store
from loramux_server.base.device import check_device
from loramux_server.base.source import check_base, resolve_base
from loramux_server.config.environment import before_a_base, cache_dir_of
from loramux_server.config.serve import ServeConfig
from loramux_server.errors import ConfigError
from loramux_server.longrun.interrupt import SAME_SECONDS
from loramux_server.plain_text import for_reader
from loramux_server.serving.startup import ASGIApp, Stages, StartupApp, in_daemon_thread, take_port, url_of
from loramux_server.wire.acceptor import Acceptor
from loramux_server.wire.connections import Connections
from loramux_server.wire.descriptors import connection_cap
from loramux_server.wire.protocol import DeadlineProtocol, Deadlines

_SWITCH_SECONDS = 0.0005  # of the interpreter lock: the engine wants it some times a step, for microseconds each
FLUSH_SECONDS = 5  # for the last bytes of replies, once the engine has drained
WORKERS = 8  # threads for what blocks; adapters that come in hold half of them at most, and all else has the rest
MODELS_SHOWN = 6


class Built(Protocol):
    """What `loramux_server.serving.build.build` returns. Its methods are called on the event loop.

    Attributes:
        app: the whole HTTP API.
        models: names a client can ask for: the base first, then the adapters.
        running: replies that are not finished.
        summary: lines to print at start, such as the memory table and the kernel path.
    """

    @property
    def app(self) -> ASGIApp: ...

    @property
    def models(self) -> Sequence[str]: ...

    @property
    def running(self) -> int: ...

    @property
    def summary(self) -> Sequence[str]: ...

    async def start(self) -> None:
        """Starts the engine and returns when it is warm: after this, /ready is 200."""

    async def drain(self, timeout: float) -> int:
        """Makes /ready 503, refuses new work, and returns when running replies are done or, after `timeout` s, cut.

        Returns how many were cut.
        """

    async def stop(self) -> None:
        """Ends threads and closes the store. Called once, when no connection is left, also after a failed start."""


def serve(config: ServeConfig) -> int:
    """Serves until a signal; returns the exit code.

    Raises:
        ConfigError: a directory that adapters come from is not there, the kernels asked for are not, or the system
            allows too few open files.
        BaseModelError: there is no such base.
        CommandFailed: the port cannot be had.
        StoreUnavailable, IndexLost: another server uses the store, or its index is lost. All of this is found before
            anything is loaded.
        LoramuxError, AdapterError: the base or the store cannot be used.
    """
    _require_directories(config)
    before_a_base(os.environ)
    check_device(config.device)
    check_base(config.base)
    sys.setswitchinterval(_SWITCH_SECONDS)
    check_store(config.adapter_dir)
    connections = Connections(connection_cap(config.max_connections))
    with take_port(config.host, config.port) as listener:
        return asyncio.run(_serve(config, listener, connections))


def _require_directories(config: ServeConfig) -> None:
    sources = {
        "--preload": config.preload,
        "--watch-dir": config.watch_dir,
        "--lora-path-root": config.lora_path_root,
    }
    for flag, directory in sources.items():
        if directory is not None and not directory.is_dir():
            raise ConfigError(f"{flag}: {directory} is not a directory")


async def _serve(config: ServeConfig, listener: socket.socket, connections: Connections) -> int:
    began = time.monotonic()
    url = url_of(listener)
    startup_app = StartupApp()
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(WORKERS, "worker"))
    deadlines = Deadlines(config.header_timeout, config.pace)
    server = _Server(_uvicorn_config(config, startup_app), listener, connections, deadlines)
    stop = _stop_on_signals()
    serving = asyncio.create_task(server.serve([listener]))
    built: Built | None = None
    try:
        _show(f"loramux loads {config.base}; {url}/health answers already")
        stages = Stages(_write)
        built = await _load(config, stages, connections, stop)
        await _start(built, stop)
        startup_app.hand_over_to(built.app)
        for line in [*built.summary, *_ready(url, built.models, time.monotonic() - began)]:
            _show(line)
        print(_command(url, built.models, config), flush=True)  # to be copied, so it is not wrapped
        await _first_of(serving, stop)
        _show(_stopping(built.running, config.shutdown_timeout))
        cut = await built.drain(config.shutdown_timeout)
    except BaseException:
        server.force_exit = True
        raise
    finally:
        server.should_exit = True
        await serving
        if built is not None:
            await built.stop()
    _show(f"stopped; {_replies(cut)} cut off" if cut else "stopped")
    return 0


async def _load(config: ServeConfig, stages: Stages, connections: Connections, stop: asyncio.Event) -> Built:
    """Builds everything in a thread; a signal meanwhile ends the process, since there is nothing yet to finish."""
    loading = asyncio.ensure_future(asyncio.wrap_future(in_daemon_thread(lambda: _build(config, stages, connections))))
    await _first_of(loading, stop)
    if not loading.done():
        _leave("stopped while loading", 0)
    return loading.result()


async def _start(built: Built, stop: asyncio.Event) -> None:
    """A signal meanwhile ends the process: nobody has been served yet, and the store takes a kill at any moment."""
    starting = asyncio.ensure_future(built.start())
    await _first_of(starting, stop)
    if not starting.done():
        _leave("stopped while starting", 0)
    starting.result()


async def _first_of(work: asyncio.Future[Any], stop: asyncio.Event) -> None:
    """Returns when the work is done or the event is set, whichever comes first; the work goes on."""
    stopping = asyncio.ensure_future(stop.wait())
    await asyncio.wait({work, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()


def _build(config: ServeConfig, stages: Stages, connections: Connections) -> Built:
    with stages.stage("find the base"):
        source = resolve_base(config.base, cache_dir_of(config.cache_dir, os.environ), stages.note)
    with stages.imports():
        from loramux_server.serving.build import build
    return build(config, source, stages, connections)


class _Server(uvicorn.Server):
    """uvicorn with our own connections, and without its signal handlers: a signal must drain the engine while the port
    still answers."""

    def __init__(
        self, config: uvicorn.Config, listener: socket.socket, connections: Connections, deadlines: Deadlines
    ) -> None:
        super().__init__(config)
        self._listener = listener
        self._connections = connections
        self._deadlines = deadlines

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await self.lifespan.startup()
        protocol = partial(
            DeadlineProtocol,
            self._connections,
            self._deadlines,
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
        )
        acceptor = Acceptor(self._listener, self._connections, protocol)
        self.servers = [cast(asyncio.Server, acceptor)]  # only to be closed
        self.started = True

    async def on_tick(self, counter: int) -> bool:
        """uvicorn's, ten times a second."""
        self._connections.check(asyncio.get_running_loop().time(), counter)
        return await super().on_tick(counter)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _uvicorn_config(config: ServeConfig, app: ASGIApp) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        interface="asgi3",
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=config.log_level == "debug",
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=config.keep_alive_timeout,
        timeout_graceful_shutdown=FLUSH_SECONDS,
    )


def _stop_on_signals() -> asyncio.Event:
    """An event that the first SIGTERM or SIGINT sets; the second, unless it is the same one again, ends the process."""
    stop, first_at = asyncio.Event(), time.monotonic()

    def on_signal() -> None:
        nonlocal first_at
        if not stop.is_set():
            first_at = time.monotonic()
            stop.set()
        elif time.monotonic() - first_at >= SAME_SECONDS:
            _leave("stopped at once", 1)

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    return stop


def _stopping(running: int, seconds: float) -> str:
    """What the first signal is answered with."""
    if not running:
        return f"{_below_ctrl_c()}stopping; no reply is running"
    return (
        f"{_below_ctrl_c()}finishing {_replies(running)} in at most {seconds:g} s, new requests are refused; "
        "press Ctrl-C again to stop now"
    )


def _below_ctrl_c() -> str:
    """What stands before a line that answers a signal: a terminal shows ^C for it, wherever it is in a line."""
    return "\n" if sys.stdout.isatty() else ""


def _replies(count: int) -> str:
    return f"{count} {'reply' if count == 1 else 'replies'}"


def _ready(url: str, models: Sequence[str], seconds: float) -> list[str]:
    """The last lines of a start: where the server is, and what it serves."""
    shown = ", ".join(models[:MODELS_SHOWN]) + (
        f" and {len(models) - MODELS_SHOWN} more" if len(models) > MODELS_SHOWN else ""
    )
    return [
        "",
        f"loramux is ready on {url} after {seconds:.1f} s (Ctrl-C stops it)",
        f"models: {shown}",
    ]


def _command(url: str, models: Sequence[str], config: ServeConfig) -> str:
    """A request to paste."""
    body = {
        "model": models[min(1, len(models) - 1)],
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
    }
    key = ' -H "authorization: Bearer $LORAMUX_API_KEY"' if config.api_key else ""
    return f"curl {url}/v1/chat/completions -H 'content-type: application/json'{key} -d {shlex.quote(json.dumps(body))}"


def _leave(message: str, code: int) -> NoReturn:
    """Ends the process here and now, whatever its other threads do."""
    _show(f"{_below_ctrl_c()}{message}")
    sys.stderr.flush()
    os._exit(code)


def _write(text: str) -> None:
    print(for_reader(text, sys.stdout), end="", flush=True)


def _show(line: str) -> None:
    _write(f"{line}\n")
