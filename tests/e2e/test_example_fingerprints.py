"""The fingerprints in the repository, made on some processor, replay to the last bit on every instruction set."""

from __future__ import annotations

from pathlib import Path

import pytest

from loramux_adapters.device.cpu import CpuDevice
from loramux_server.base.loader import load_base_model
from loramux_server.base.source import EMBEDDED_NAME
from loramux_server.engine.local_engine import LocalEngine
from loramux_server.fingerprint import fingerprint
from loramux_server.fingerprint.file import parse
from loramux_server.kernels.choice import available_kernels, choose_kernels

CPU = CpuDevice()
EXAMPLES = Path(__file__).parents[2] / "adapters" / "examples"
SETS = [name for name in available_kernels(CPU) if name.startswith("native-")]


@pytest.mark.skipif(not SETS, reason="no compiler was there at installation")
@pytest.mark.parametrize("kernels", SETS)
def test_the_examples_replay_bit_for_bit(kernels: str, embedded_cache: Path) -> None:
    base = load_base_model(
        EMBEDDED_NAME,
        device=CPU,
        cache_dir=embedded_cache,
        report=lambda line: None,
        kernels=choose_kernels(CPU, kernels),
    )
    engine = LocalEngine.open(base, rows=8, tokens=4096, check=False)
    for name in ("spam", "tweets"):
        directory = EXAMPLES / name
        kept = parse((directory / "fingerprint.json").read_bytes())
        adapter = engine.load(directory)
        assert (kept.numerics_id, kept.version) == (engine.numerics_id, adapter.version)
        count = 1 if kernels == "native-portable" else len(kept.prompts)  # it is slow, and no more proves no more
        agreement = fingerprint.compare(engine, kept.prompts[:count], adapter)
        assert agreement.equal, agreement.words()
