"""One real server for all tests that can share it, with sixteen adapters of different rank and targets."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.real_adapters import ADAPTERS, make_adapter
from support.real_server import RealServer, running_server


@pytest.fixture(scope="session")
def embedded_cache() -> Path:
    """Where converted bases are kept: the same place as the server's, so that it is converted once."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "loramux"


@pytest.fixture(scope="session")
def adapter_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {name: make_adapter(root / name, index) for index, name in enumerate(ADAPTERS)}


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, adapter_dirs: dict[str, Path]) -> Iterator[RealServer]:
    """With all sixteen adapters uploaded, and memory for all of them at once."""
    store = tmp_path_factory.mktemp("store")
    with running_server(store, "--adapter-memory-mib", "640", "--device-memory-mib", "896") as running:
        for name, directory in adapter_dirs.items():
            response = running.upload(name, directory)
            assert response.status_code == 201, response.text
        yield running
