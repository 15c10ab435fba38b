"""Pooled states of steps in Triton on a late device: those of the CPU, and the same bits whoever is served beside."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from support import triton_interpreter

if triton_interpreter.INSTALLED:
    triton_interpreter.prepare()
else:
    pytest.skip(triton_interpreter.WHY_NOT, allow_module_level=True)

from loramux_adapters.device.cpu import CpuDevice
from loramux_adapters.device.device import Device
from loramux_server.base.loader import load_base_model
from loramux_server.engine.local_engine import LocalAdapter, LocalEngine
from loramux_server.engine.scheduling.sequence import AdapterUse, Pooling, SamplingParams, TokenOutput
from loramux_server.engine.scheduling.sequence import Sequence as EngineSequence
from loramux_server.kernels.gpu.step.decoder import GpuDecoder
from support.adapter_files import write_adapter
from support.emulated import EmulatedDevice
from support.tiny_models import save_tiny_model

PROMPTS = [list(range(start, start + length)) for start, length in ((3, 36), (90, 5), (200, 1))]
POOLINGS: list[Pooling] = ["last", "mean"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pooling")
    save_tiny_model(directory / "base", num_hidden_layers=1, initializer_range=0.2)
    return directory


def engine_on(device: Device, files: Path) -> LocalEngine:
    base = load_base_model(str(files / "base"), device=device, cache_dir=files / "cache", report=lambda _: None)
    return LocalEngine.open(base, rows=8, tokens=1024, max_rank=8, check=False)


def adapter_of(engine: LocalEngine, files: Path) -> LocalAdapter:
    directory = files / "adapter"
    if not directory.exists():
        write_adapter(directory, dict(engine.base.linears), rank=8, seed=1, std_b=0.3)
    return engine.load(directory)


@pytest.fixture(scope="module")
def card(files: Path) -> LocalEngine:
    engine = engine_on(EmulatedDevice(kernels="triton"), files)
    assert isinstance(engine._engine._runner.decoder, GpuDecoder)
    return engine


def difference(found: npt.NDArray[np.float64], expected: npt.NDArray[np.float64]) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_they_are_near_those_of_the_cpu(card: LocalEngine, files: Path) -> None:
    cpu = engine_on(CpuDevice(), files)
    on_card, on_cpu = (adapter_of(engine, files) for engine in (card, cpu))
    for pooling in POOLINGS:
        base, adapted = (cpu.embed(PROMPTS, adapter, pooling) for adapter in (None, on_cpu))
        assert min(map(difference, adapted, base)) > 0.1, "the adapter changes nothing"
        assert max(map(difference, card.embed(PROMPTS, None, pooling), base)) < 0.02
        assert max(map(difference, card.embed(PROMPTS, on_card, pooling), adapted)) < 0.02


def test_a_pooled_prompt_has_the_bits_of_one_alone(card: LocalEngine, files: Path) -> None:
    """Beside a reply that the device chooses, one with changed logits, and scored text; so have these."""
    adapter = adapter_of(card, files)
    uses = (AdapterUse(adapter.version, adapter.rank),)
    last, mean = (SamplingParams(max_tokens=0, pooling=pooling) for pooling in POOLINGS)
    asked: dict[str, tuple[list[int], SamplingParams, tuple[AdapterUse, ...]]] = {
        "mean": (PROMPTS[0], mean, ()),
        "mean of an adapter": (PROMPTS[0], mean, uses),
        "last": (PROMPTS[1], last, ()),
        "last of an adapter": (PROMPTS[1], last, uses),
        "chosen": (PROMPTS[2], SamplingParams(temperature=0.0, max_tokens=2, logprobs=2), uses),
        "changed": (PROMPTS[2], SamplingParams(temperature=0.9, seed=3, max_tokens=2, repetition_penalty=1.5), ()),
        "scored": (PROMPTS[1], SamplingParams(max_tokens=0, prompt_logprobs=0), ()),
    }

    def sequence(name: str) -> EngineSequence:
        prompt, params, adapters = asked[name]
        return EngineSequence(name, list(prompt), params, adapters)

    together = card._run([sequence(name) for name in asked])

    for name, (_, params, _) in asked.items():
        alone = card._run([sequence(name)])[name]
        assert list(map(told, alone)) == list(map(told, together[name])), name
        assert (alone[-1].pooled is None) == (params.pooling is None)
    pooled = [found[-1].pooled for found in together.values()]
    assert len({each.tobytes() for each in pooled if each is not None}) == 4


def told(output: TokenOutput) -> tuple[object, ...]:
    pooled = None if output.pooled is None else output.pooled.tobytes()
    return output.token_id, output.logprob, output.prompt_logprobs, pooled
