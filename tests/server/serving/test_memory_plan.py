"""What the start-up report says of how a step runs, and why not in one call."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loramux_adapters.device.cuda import CudaDevice
from loramux_server.base.loader import BaseModel, load_base_model
from loramux_server.kernels import choice
from loramux_server.kernels.choice import Kernels, choose_kernels
from loramux_server.kernels.compiled.library import native_library
from loramux_server.serving.memory_plan import compiled_lines, how_a_step_runs, unpacked_layers
from support.stepping import CPU, Stepper
from support.tiny_models import save_tiny_model

needs_kernels = pytest.mark.skipif(native_library() is None, reason="there are no compiled kernels")


def base_of(tmp_path: Path, architecture: str = "llama", kernels: str = "native", **changes: int) -> BaseModel:
    return load_base_model(
        str(save_tiny_model(tmp_path / "base", architecture, **changes)),
        device=CPU,
        cache_dir=tmp_path / "cache",
        report=lambda line: None,
        kernels=choose_kernels(CPU, kernels),
    )


@needs_kernels
@pytest.mark.parametrize(
    ("architecture", "kernels", "said"),
    [
        ("llama", "native", "a step is one compiled call"),
        ("llama", "modules", "a step is run module by module, because the kernels 'modules' have no whole step"),
        ("llama", "tensor", "a step is run module by module, because the kernels 'tensor' have no whole step"),
        ("gpt_neox", "native", "a step is run module by module, because "),
    ],
)
def test_it_says_how_a_step_runs_and_why(architecture: str, kernels: str, said: str, tmp_path: Path) -> None:
    runner = Stepper(base_of(tmp_path, architecture, kernels).model, kernels=kernels).runner
    line = how_a_step_runs(runner)
    assert line == said if not said.endswith("because ") else line.startswith(said) and len(line) > len(said) + 10


@needs_kernels
def test_layers_that_cannot_be_packed_are_told_with_their_sizes(tmp_path: Path) -> None:
    assert unpacked_layers(base_of(tmp_path / "fits").model) == []
    base = base_of(tmp_path / "odd", intermediate_size=96)
    assert unpacked_layers(base.model) == [
        "2 layers have no compiled kernel and are slow; model.layers.0.mlp.down_proj: it takes 96 numbers to 64, and "
        "they take a multiple of 64 to a multiple of 32"
    ]
    why = "because down_proj of layer 0 (Linear4bit) has no compiled kernel: it takes 96 numbers to 64, and"
    assert why in how_a_step_runs(Stepper(base.model).runner)


@pytest.mark.parametrize(
    ("why", "todo"),
    [
        ("they were not built at installation (is there a C++ compiler?)", "install g++ and then loramux again"),
        ("_kernels.so does not load: no such symbol", "install loramux again"),
    ],
)
def test_a_server_without_compiled_kernels_says_why_what_it_costs_and_what_to_do(
    why: str, todo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "why_unusable", lambda: why)
    tensor = Kernels("tensor")
    first, second = compiled_lines(tensor, CPU)
    assert first == f"NO compiled kernels: {why}"
    assert "times as long, the start too" in second and second.endswith(f"; {todo}")
    assert compiled_lines(tensor, CudaDevice(torch.device("cuda"))) == []


def test_a_server_names_the_instruction_set_or_who_asked_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "why_unusable", lambda: "")
    assert compiled_lines(Kernels("native", isa="avx512-vnni"), CPU) == ["compiled kernels on AVX512-VNNI"]
    first, second = compiled_lines(Kernels("tensor"), CPU)
    assert first == "NO compiled kernels: LORAMUX_KERNELS asks for 'tensor'" and second.endswith("; unset it")


def test_whoever_loads_a_base_is_told_before_it_takes_long(tmp_path: Path) -> None:
    told: list[str] = []
    load_base_model(
        str(save_tiny_model(tmp_path / "base")),
        device=CPU,
        cache_dir=tmp_path / "cache",
        report=told.append,
        kernels=choose_kernels(CPU, "tensor"),
    )
    assert told[0].startswith("NO compiled kernels: ")
