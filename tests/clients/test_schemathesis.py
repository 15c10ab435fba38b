"""schemathesis asks everything that the OpenAPI document allows, and much that it forbids: it may find nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from clients.environments import ADAPTER, PROGRAMS, Ask
from support.real_adapters import make_adapter
from support.real_server import BASE, RealServer, running_server

EXAMPLES = os.environ.get("SCHEMATHESIS_EXAMPLES", "25")  # of each operation


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[RealServer]:
    """One that it may fill and empty."""
    with running_server(tmp_path / "store", "--request-timeout", "60", "--default-max-tokens", "4") as running:
        assert running.upload(ADAPTER, make_adapter(tmp_path / ADAPTER, 1)).status_code == 201
        yield running


def test_it_finds_nothing(ask: Ask, own_server: RealServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # it keeps what it learns in the working directory
    monkeypatch.setenv("SCHEMATHESIS_HOOKS", str(PROGRAMS / "schemathesis_hooks.py"))
    monkeypatch.setenv("LORAMUX_TEST_BASE", BASE)
    ask(
        "schemathesis",
        *("run", f"{own_server.url}/openapi.json", "--checks", "all", "--max-examples", EXAMPLES, "--seed", "22"),
        *("--exclude-checks", "positive_data_acceptance"),  # the hooks have another in its place
        *("--phases", "examples,coverage,fuzzing,stateful", "--no-color", "--request-timeout", "60"),
        program="st",
        parse=False,
    )
    assert own_server.process.poll() is None
