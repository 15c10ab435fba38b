"""What happens before a server serves: the port is taken first, then the slow stages run, each timed and shown.

Until the base is loaded the port already answers, so that a supervisor sees a live process that is not ready yet.
"""

from __future__ import annotations

import errno
import gc
import json
import logging
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeAlias, TypeVar

from loramux_server.errors import CommandFailed
from loramux_server.plain_text import printable

T = TypeVar("T")
Message: TypeAlias = MutableMapping[str, Any]
ASGIApp: TypeAlias = Callable[
    [Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]
]
RETRY_AFTER_SECONDS = 5
TELLING_SECONDS = 5.0  # from one line of progress to the next


class Stages:
    """Shows what a start is doing and how long each stage took. Used by one thread at a time.

    Args:
        write: takes a piece of text, which may or may not end a line.
    """

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._write = write
        self._clock = clock
        self._line_is_open = False
        self._told_at = 0.0
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times one stage: its name appears when it begins, its seconds when it is done."""
        began = self._told_at = self._clock()
        self._write(f"  {name} ...")
        self._line_is_open = True
        try:
            with self._apart_from_logs():
                yield
        except BaseException:
            self.break_line()
            raise
        self.seconds[name] = self._clock() - began
        if not self._line_is_open:
            self._write(f"  {name}")
        self._line_is_open = False
        self._write(f" {self.seconds[name]:.1f} s\n")

    @contextmanager
    def imports(self) -> Iterator[None]:
        """The stage in which libraries are imported.

        Python looks for garbage meanwhile as often as ever, through more and more that stays: a fifth of the seconds
        of PyTorch and transformers. So it does not look, and never again looks through what was imported.
        """
        with self.stage("import libraries"):
            if "torch" in sys.modules or not gc.isenabled():
                yield
                return
            gc.disable()
            try:
                yield
            finally:
                gc.freeze()
                gc.enable()

    def note(self, text: str) -> None:
        """Adds a line, within a stage or between two."""
        self.break_line()
        self._write(f"  {printable(text)}\n")

    def progress(self, text: str) -> None:
        """Adds a line within a stage, if the last one, or the stage's own, is some seconds old."""
        now = self._clock()
        if now - self._told_at >= TELLING_SECONDS:
            self._told_at = now
            self.note(text)

    @contextmanager
    def _apart_from_logs(self) -> Iterator[None]:
        """Meanwhile, what this thread logs begins a line of its own too: both may go to one terminal or file."""
        thread, handlers = threading.get_ident(), list(logging.getLogger().handlers)

        def begin_line(record: logging.LogRecord) -> bool:
            if record.thread == thread:
                self.break_line()
            return True

        for handler in handlers:
            handler.addFilter(begin_line)
        try:
            yield
        finally:
            for handler in handlers:
                handler.removeFilter(begin_line)

    def break_line(self) -> None:
        """What is written next, by whomever, begins a line of its own."""
        if self._line_is_open:
            self._write("\n")
            self._line_is_open = False


class StartupApp:
    """The ASGI application on the port from the first second: /health is 200, everything else is 503, come back later.

    After `hand_over_to`, every request goes to the real application.
    """

    def __init__(self) -> None:
        self._app: ASGIApp | None = None

    def hand_over_to(self, app: ASGIApp) -> None:
        """Called on the event loop, when the server is ready."""
        self._app = app

    def __call__(
        self,
        scope: Message,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> Awaitable[None]:
        if self._app is not None:
            return self._app(scope, receive, send)
        return _answer_while_loading(scope["path"], send)


async def _answer_while_loading(path: str, send: Callable[[Message], Awaitable[None]]) -> None:
    alive = path == "/health"
    error = {
        "message": "The server is still starting.",
        "type": "server_error",
        "param": None,
        "code": "loading",
    }
    body = json.dumps({"status": "loading"} if alive else {"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if not alive:
        headers.append((b"retry-after", str(RETRY_AFTER_SECONDS).encode()))
    await send({"type": "http.response.start", "status": 200 if alive else 503, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def take_port(host: str, port: int) -> socket.socket:
    """A listening TCP socket; connections wait in its backlog until the event loop accepts them.

    Raises:
        CommandFailed: the port is in use, or the address is not one of this machine's, or may not be used.
    """
    host = host.removeprefix("[").removesuffix("]")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise CommandFailed(f"cannot listen on {host}: {error.strerror}") from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(socket.SOMAXCONN)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise CommandFailed(
                f"port {port} on {host} is in use; stop what listens there, or choose another with --port"
            ) from error
        raise CommandFailed(f"cannot listen on {host} port {port}: {error.strerror}") from error
    return listener


def url_of(listener: socket.socket) -> str:
    """The URL a client on this machine would use; a wildcard address becomes the loopback one."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def in_daemon_thread(work: Callable[[], T], name: str = "startup") -> Future[T]:
    """Runs the work in a thread that does not keep the process alive when everything else has ended."""
    future: Future[T] = Future()

    def body() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # handed over, whatever it is: the waiting side raises it
            future.set_exception(error)

    threading.Thread(target=body, name=name, daemon=True).start()
    return future
