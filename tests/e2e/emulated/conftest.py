"""A server on an emulated device with a tiny random base: what a graphics processor runs, in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from support import triton_interpreter

if triton_interpreter.INSTALLED:
    triton_interpreter.prepare()
else:
    collect_ignore_glob = ["test_*.py"]

from support.adapter_files import write_adapter
from support.emulated import EmulatedDevice
from support.emulated_server import EmulatedServer, emulated_server, settings
from support.shapes import llama_linears
from support.tiny_models import save_tiny_model

LINEARS = llama_linears(1, 64, 32, 128, 320)
RANKS = {"eight": 8, "sixteen": 16, "thirty-two": 32}


@dataclass(frozen=True)
class Place:
    """Where everything lies: the base, and a directory for each test's files."""

    base: Path
    files: Path

    def adapter(self, name: str, *, rank: int = 8, seed: int = 0) -> Path:
        """The files of an adapter, made where there are none yet."""
        directory = self.files / f"{name}-{rank}-{seed}"
        if not directory.exists():
            targets = None if rank == 8 else [path.rpartition(".")[2] for path in LINEARS if path != "lm_head"]
            write_adapter(directory, LINEARS, rank=rank, alpha=rank, targets=targets, seed=seed, std_b=1.0 / rank**0.5)
        return directory


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("emulated")
    return Place(save_tiny_model(root / "base", num_hidden_layers=1), root)


@pytest.fixture(scope="session")
def server(place: Place) -> Iterator[EmulatedServer]:
    """Work is done as late as it may be. There is room for few adapters: one of rank 256, or two of 128, and so on."""
    device = EmulatedDevice(kernels="triton")
    config = settings(
        place.base, place.files / "store", cache_dir=place.files / "cache", adapter_memory_mib=1, max_lora_rank=256
    )
    with emulated_server(device, config) as server:
        for name, rank in RANKS.items():
            response = server.upload(name, place.adapter(name, rank=rank, seed=rank))
            assert response.status_code == 201, response.text
        yield server
