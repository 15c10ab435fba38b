"""The engine on a device whose work is late: all that reaches it goes through `Device`; nothing is read too early.

The base's modules run on PyTorch's operations here, as on a CUDA device without our own kernels.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from loramux_adapters.device.cpu import CpuDevice
from loramux_adapters.device.device import ON_CARD, Device
from loramux_adapters.errors import MemoryShort
from loramux_server.base.loader import BaseModel, load_base_model
from loramux_server.engine.local_engine import LocalEngine
from support.adapter_files import write_adapter
from support.emulated import EmulatedDevice
from support.tiny_models import save_tiny_model

ROWS = [(list(range(3, 40)), [1, 2, 3]), ([5, 6, 7], [4]), (list(range(100, 133)), [5, 6])]


class PromptDevice(CpuDevice):
    """The same kernels where everything is done at once."""

    kernels, layout, is_host = "cuda", ON_CARD, False


def load(tmp_path: Path, device: Device) -> BaseModel:
    directory = tmp_path / "base"
    if not directory.exists():
        save_tiny_model(directory)
    return load_base_model(
        str(directory),
        device=device,
        cache_dir=tmp_path / "cache",
        report=lambda line: None,
    )


def scores(engine: LocalEngine, tmp_path: Path) -> list[float]:
    """Of the bare base, then of adapters one after another in the same two slots, each asked twice."""
    found = [each for row in engine.score(ROWS, None) for each in row]
    for seed in range(4):
        directory = tmp_path / f"adapter-{seed}"
        if not directory.exists():
            write_adapter(directory, dict(engine.base.linears), rank=8, seed=seed, std_b=0.3)
        adapter = engine.load(directory)
        for _ in range(2):
            found += [each for row in engine.score(ROWS, adapter) for each in row]
        engine.unload(adapter)
    return found


def test_late_work_gives_the_bits_of_work_that_is_done_at_once(tmp_path: Path) -> None:
    expected = scores(LocalEngine.open(load(tmp_path, PromptDevice()), rows=4, tokens=512, max_rank=8), tmp_path)
    for early, seed in ((0.0, 0), (0.3, 1)):
        device = EmulatedDevice(early=early, seed=seed)
        base = load(tmp_path, device)
        assert base.kernels.name == "cuda"
        engine = LocalEngine.open(base, rows=4, tokens=512, max_rank=8)
        assert scores(engine, tmp_path) == expected
        assert {kind for kind, _ in device.started} == {"copy", "fill"}


def test_a_device_that_is_too_small_is_named(tmp_path: Path) -> None:
    base = load(tmp_path, EmulatedDevice(total=200_000))
    with pytest.raises(MemoryShort, match="no room on emulated for a cache of 512 tokens and adapters of 16 ranks"):
        LocalEngine.open(base, rows=4, tokens=512, max_rank=8)
