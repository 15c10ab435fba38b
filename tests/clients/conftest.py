"""One real server for all clients. Not collected by `make test`: `make clients` names the folder."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clients.environments import ADAPTER, PROGRAMS, Ask, environment
from loramux_server.base.source import EMBEDDED_NAME, resolve_base
from support.real_adapters import make_adapter
from support.real_server import BASE, RealServer, running_server

TIMEOUT = 600  # seconds, of one client's program


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    store = tmp_path_factory.mktemp("store")
    with running_server(store) as running:
        response = running.upload(ADAPTER, make_adapter(tmp_path_factory.mktemp("adapter") / ADAPTER, 1))
        assert response.status_code == 201, response.text
        yield running


@pytest.fixture(scope="session")
def base_directory() -> Path:
    """The embedded base's checkpoint, as clients read its tokenizer."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "loramux"
    return resolve_base(EMBEDDED_NAME, cache, print).directory


@pytest.fixture
def ask(server: RealServer) -> Ask:
    """Runs `programs/<client>.py`, or another program of its environment, and returns the JSON of its last line."""

    def run(client: str, *arguments: str, program: str = "python", parse: bool = True) -> Any:
        home = environment(client)
        command = [
            str(home / program),
            *(["-P", str(PROGRAMS / f"{client}.py"), server.url, BASE, ADAPTER] if parse else []),
        ]
        offline = {"HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "unused", "HF_HUB_DISABLE_TELEMETRY": "1"}
        path = f"{home}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            [*command, *arguments],
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            env=offline | {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PATH": path},
        )
        assert done.returncode == 0, f"{client}:\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
        return json.loads(done.stdout.splitlines()[-1]) if parse else done.stdout

    return run
