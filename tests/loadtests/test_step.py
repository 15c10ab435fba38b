"""The load test of the whole step: its random bases are the families', and its figures follow from the replies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from loadtests.client import Outcome, Run
from loadtests.errors import LoadTestError
from loadtests.random_base import RandomBase
from loadtests.step import CASES, MODULES, STEP, Measured, add_round, show, told
from transformers import AutoModelForCausalLM, AutoTokenizer

from loramux_server.base.loader import load_base_model
from loramux_server.kernels.choice import choose_kernels
from loramux_server.kernels.compiled.library import native_library
from support.stepping import CPU, Stepper
from support.tiny_models import save_tiny_model

SMALL = [
    RandomBase("Qwen3", "qwen3", 64, 128, 2, 4, 2, 32),
    RandomBase("Gemma 3", "gemma3_text", 64, 128, 7, 4, 1, 32),
]


def run_of(texts: dict[str, str], seconds: float, error: str | None = None) -> Run:
    outcomes = [
        Outcome(adapter=None, prompt=prompt, started=0.0, ended=1.0, text=text, tokens=10, error=error)
        for prompt, text in texts.items()
    ]
    return Run(32, outcomes, 0.0, seconds, 0.0, 0)


@pytest.mark.parametrize("small", SMALL, ids=lambda small: small.label)
def test_a_random_base_is_a_checkpoint_of_its_family(small: RandomBase, tmp_path: Path) -> None:
    tokenizer_of = save_tiny_model(tmp_path / "base")
    directory = small.write(tmp_path / "random", tokenizer_of)
    model, told = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    weights = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    assert all(0.01 < float(weight.detach().float().std()) < 0.03 for weight in weights)
    assert (
        AutoTokenizer.from_pretrained(directory)("ab")["input_ids"]
        == AutoTokenizer.from_pretrained(tokenizer_of)("ab")["input_ids"]
    )
    assert model.config.vocab_size == 320 and model.config.eos_token_id == 257


@pytest.mark.skipif(native_library() is None, reason="there are no compiled kernels")
@pytest.mark.parametrize("small", SMALL, ids=lambda small: small.label)
def test_a_random_base_runs_in_one_call_and_by_modules(small: RandomBase, tmp_path: Path) -> None:
    directory = small.write(tmp_path / "random", save_tiny_model(tmp_path / "base"))
    for name in ("native", "modules"):
        kernels = choose_kernels(CPU, name)
        base = load_base_model(
            str(directory), device=CPU, cache_dir=tmp_path / "cache", report=lambda line: None, kernels=kernels
        )
        assert (Stepper(base.model, kernels=name).runner.decoder is not None) == (name == "native")


def test_the_large_ones_have_half_a_billion_weights() -> None:
    for case in CASES:
        total = sum(shape[0] * shape[-1] for _, shape in case.base.shapes(49152) if len(shape) == 2)
        assert (0.45e9 < total < 0.6e9) == (case.size == "0.5b"), case


def test_a_base_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(LoadTestError, match=r"has no config.json with a vocab_size"):
        SMALL[0].write(tmp_path / "a", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 10}))
    with pytest.raises(LoadTestError, match=r"has no tokenizer.json"):
        SMALL[0].write(tmp_path / "b", tmp_path)


def test_ratios_other_replies_and_errors_are_counted() -> None:
    found = Measured("x")
    add_round(found, {MODULES: run_of({"a": "1", "b": "2"}, 2.0), STEP: run_of({"a": "1", "b": "2"}, 0.8)})
    assert found.rates == {MODULES: [10.0], STEP: [25.0]} and found.ratios == [2.5] and found.reached
    add_round(found, {MODULES: run_of({"a": "1"}, 1.0), STEP: run_of({"a": "other"}, 0.4)})
    assert found.different == 1 and not found.reached
    assert "2.50 (2.50 .. 2.50)" in show([found]) and "NO" in show([found])
    failing = Measured("y")
    add_round(failing, {MODULES: run_of({"a": "1"}, 1.0, error="no"), STEP: run_of({"a": "1"}, 0.4)})
    assert failing.errors == ["y, by modules: 1 x no"] and not failing.reached


def test_a_server_that_runs_something_else_is_not_measured() -> None:
    whole = "device   cpu, 2 threads; a step is one compiled call\n  compiled kernels on AVX2\n"
    assert told(whole, STEP) == "AVX2"
    with pytest.raises(
        LoadTestError, match="should run by modules does not; it says: device   cpu, 2 threads; a step is"
    ):
        told(whole, MODULES)
    with pytest.raises(LoadTestError, match="no line on its device"):
        told("", STEP)
