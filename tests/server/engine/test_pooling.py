"""What the output head reads of a prompt, pooled: alone as in company, whatever the chunks, and by any kernels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from loramux_adapters.device.cpu import CpuDevice
from loramux_server.base.loader import BaseModel, load_base_model
from loramux_server.engine.local_engine import LocalEngine
from loramux_server.engine.scheduling.sequence import AdapterUse, Pooling, SamplingParams, TokenOutput
from loramux_server.engine.scheduling.sequence import Sequence as EngineSequence
from loramux_server.kernels.choice import choose_kernels
from support.adapter_files import write_adapter
from support.tiny_models import save_tiny_model

CPU = CpuDevice()
POOLINGS: list[Pooling] = ["last", "mean"]


def load(tmp_path: Path, kernels: str | None = None) -> BaseModel:
    directory = tmp_path / "base"
    if not directory.exists():
        save_tiny_model(directory)
    chosen = None if kernels is None else choose_kernels(CPU, kernels)
    return load_base_model(
        str(directory), device=CPU, cache_dir=tmp_path / "cache", report=lambda line: None, kernels=chosen
    )


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (length,), generator=generator).tolist() for length in (40, 7, 300, 1, 33)]


def run(engine: LocalEngine, sequences: list[EngineSequence]) -> dict[str, list[TokenOutput]]:
    return engine._run(sequences)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_it_is_what_the_base_gives_its_output_head(tmp_path: Path, pooling: Pooling) -> None:
    engine = LocalEngine.open(load(tmp_path), rows=4, tokens=2048, max_rank=16)
    exact = load_base_model(
        str(tmp_path / "base"), device=CPU, cache_dir=tmp_path / "cache", report=lambda line: None, exact=True
    )

    found = engine.embed(prompts(), None, pooling)

    for prompt, pooled in zip(prompts(), found, strict=True):
        with torch.inference_mode():
            states = exact.model.model(input_ids=torch.tensor([prompt])).last_hidden_state[0].double().numpy()
        expected = states[-1] if pooling == "last" else states.mean(axis=0)
        assert np.abs(pooled - expected).max() <= 5e-3 * np.abs(expected).max()


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_whole_step_and_the_modules_give_the_same_bits(tmp_path: Path, pooling: Pooling) -> None:
    found = []
    for kernels in ("native", "modules"):
        engine = LocalEngine.open(load(tmp_path, kernels), rows=4, tokens=2048, max_rank=16)
        adapter = engine.load(write_adapter(tmp_path / "a", engine.base.linears, std_b=0.2))
        found.append(engine.embed(prompts(), adapter, pooling))

    assert all(np.array_equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("kernels", ["native", "modules", "tensor"])
def test_a_pooled_prompt_has_the_bits_of_one_alone_whoever_else_is_served(tmp_path: Path, kernels: str) -> None:
    engine = LocalEngine.open(load(tmp_path, kernels), rows=8, tokens=4096, max_rank=16)
    versions = [
        engine.load(write_adapter(tmp_path / f"a{seed}", engine.base.linears, seed=seed, std_b=0.2)) for seed in (1, 2)
    ]
    kinds = [
        SamplingParams(max_tokens=0, pooling="mean"),
        SamplingParams(max_tokens=0, pooling="last"),
        SamplingParams(temperature=0.0, max_tokens=5, logprobs=2),
        SamplingParams(max_tokens=0, prompt_logprobs=0),
    ]
    uses = [(), *((AdapterUse(one.version, one.rank),) for one in versions)]

    def sequences() -> list[EngineSequence]:
        return [
            EngineSequence(f"{at}-{kind}-{use}", list(prompt), params, adapters)
            for at, prompt in enumerate(prompts())
            for kind, params in enumerate(kinds)
            for use, adapters in enumerate(uses)
        ]

    together = run(engine, sequences())

    for sequence in sequences():
        alone = run(engine, [sequence])[sequence.id]
        others = together[sequence.id]
        assert [(one.token_id, one.logprob) for one in alone] == [(one.token_id, one.logprob) for one in others]
        assert alone[-1].prompt_logprobs == others[-1].prompt_logprobs
        assert np.array_equal(alone[-1].pooled, others[-1].pooled) or alone[-1].pooled is None is others[-1].pooled
    assert len({together[f"0-0-{use}"][-1].pooled.tobytes() for use in range(3)}) == 3  # type: ignore[union-attr]


def test_a_mean_is_computed_whole_and_a_last_token_finds_what_it_left(tmp_path: Path) -> None:
    engine = LocalEngine.open(load(tmp_path), rows=4, tokens=4096, max_rank=16)
    prompt = prompts()[2]
    (mean,) = run(engine, [EngineSequence("mean", prompt, SamplingParams(max_tokens=0, pooling="mean"))]).values()
    (last,) = run(engine, [EngineSequence("last", prompt, SamplingParams(max_tokens=0, pooling="last"))]).values()
    (again,) = run(engine, [EngineSequence("again", prompt, SamplingParams(max_tokens=0, pooling="mean"))]).values()

    assert [mean[-1].cached_tokens, last[-1].cached_tokens, again[-1].cached_tokens] == [0, 288, 0]
    assert np.array_equal(mean[-1].pooled, again[-1].pooled)
