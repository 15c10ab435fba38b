"""A server of our own for a test: start the real process on a free port, fill it with adapters, stop it."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .client import address_of
from .errors import LoadTestError

START_SECONDS = 300.0  # a first start converts and quantizes the base
POLL_SECONDS = 0.05
STOP_SECONDS = 40.0
KEYS = ("LORAMUX_API_KEY", "LORAMUX_ADMIN_KEY")


@dataclass(frozen=True, slots=True)
class Server:
    """A server that answers at `url`.

    Attributes:
        pid: None where it was started by somebody else.
        admin_key: for uploads; None uses the other key.
    """

    url: str
    pid: int | None = None
    api_key: str | None = None
    admin_key: str | None = None

    def call(self, method: str, path: str, body: bytes = b"", content_type: str = "application/json") -> bytes:
        """The body of the reply; raises LoadTestError, with the server's own words for a status from 400 on."""
        headers = {"Content-Type": content_type}
        key = (self.admin_key if method == "PUT" else None) or self.api_key
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        connection = http.client.HTTPConnection(*address_of(self.url), timeout=120)
        try:
            connection.request(method, path, body, headers)
            reply = connection.getresponse()
            answer = reply.read()
        except (OSError, http.client.HTTPException) as error:
            raise LoadTestError(f"{self.url} does not answer: {error}") from error
        finally:
            connection.close()
        if reply.status >= 400:
            raise LoadTestError(f"{method} {path}: status {reply.status}: {answer[:500].decode(errors='replace')}")
        return answer

    def base_model(self) -> str:
        """The served name of the base: the model without a parent."""
        models: list[dict[str, Any]] = json.loads(self.call("GET", "/v1/models"))["data"]
        return next(str(model["id"]) for model in models if not model.get("parent"))

    def upload(self, name: str, directory: Path) -> None:
        """PUT a PEFT directory under `name`."""
        self.put(name, adapter_parts(directory))

    def put(self, name: str, parts: Mapping[str, bytes]) -> str:
        """PUT an adapter's files; the version that they became."""
        answer: dict[str, Any] = json.loads(self.call("PUT", f"/v1/adapters/{name}", *multipart(parts)))
        return str(answer["version"])


def adapter_parts(directory: Path, *, fingerprint: bool = True) -> dict[str, bytes]:
    """An adapter's files, part by part of an upload; its fingerprint too if it has one and it is wanted."""
    files = {"config": "adapter_config.json", "weights": "adapter_model.safetensors"}
    if fingerprint and (directory / "fingerprint.json").exists():
        files["fingerprint"] = "fingerprint.json"
    return {part: (directory / name).read_bytes() for part, name in files.items()}


def multipart(parts: Mapping[str, bytes]) -> tuple[bytes, str]:
    """Body and content type of a form upload with one file per part."""
    boundary = uuid.uuid4().hex
    body = b"".join(
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"; filename="{name}"\r\n'
        "Content-Type: application/octet-stream\r\n\r\n".encode()
        + data
        + b"\r\n"
        for name, data in parts.items()
    )
    return body + f"--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"


@dataclass(frozen=True, slots=True)
class Program:
    """How `loramux` is called: the words of the command, and the whole environment that it gets."""

    words: tuple[str, ...]
    environ: Mapping[str, str]

    def serve(self, port: int, base: Path | None, store: Path) -> list[str]:
        """The command line of a server on loopback; `base` None leaves the server its default."""
        line = [*self.words, "serve", "--host", "127.0.0.1", "--port", str(port), "--adapter-dir", str(store)]
        return line + (["--base", str(base)] if base is not None else [])


def own_program() -> Program:
    """The `loramux` of the environment that runs this test. It asks for no key."""
    beside = Path(sys.executable).with_name("loramux")
    found = str(beside) if beside.exists() else shutil.which("loramux")
    if found is None:
        raise LoadTestError("the command `loramux` was not found; install the project first (make install)")
    return Program((found,), environment_without(*KEYS))


def environment_without(*names: str) -> dict[str, str]:
    """The environment of this process, less some variables."""
    return {name: value for name, value in os.environ.items() if name not in names}


@contextmanager
def started_server(
    base: Path | None,
    *,
    arguments: Sequence[str] = (),
    log: Path,
    store: Path | None = None,
    program: Program | None = None,
) -> Iterator[Server]:
    """A fresh server, ready to answer; stopped at the end. It asks for no key.

    Args:
        base: what `--base` gets; None leaves the server its default.
        arguments: more flags of `serve`.
        log: where its output goes.
        store: its adapter store; None gives it an empty one.
        program: whose server; None is the one of this environment.
    """
    with ExitStack() as stack:
        store = store or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="loadtest-store-")))
        log.parent.mkdir(parents=True, exist_ok=True)
        output = stack.enter_context(log.open("wb"))
        port = free_port()
        program = program or own_program()
        line = [*program.serve(port, base, store), *arguments]
        process = subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=program.environ)
        stack.callback(stop, process)
        server = Server(f"http://127.0.0.1:{port}", process.pid)
        try:
            wait_until_ready(server, process)
        except LoadTestError as error:
            raise LoadTestError(f"{error}; its output is in {log}") from error
        yield server


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_ready(server: Server, process: subprocess.Popen[bytes]) -> None:
    """Returns when /ready says so; raises LoadTestError if the process ends or START_SECONDS pass before."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise LoadTestError(f"the server ended with status {process.returncode} before it was ready")
        try:
            server.call("GET", "/ready")
            return
        except LoadTestError:
            time.sleep(POLL_SECONDS)
    raise LoadTestError(f"the server was not ready within {START_SECONDS:.0f} s")


def stop(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, and SIGKILL if that does not end it in time."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
