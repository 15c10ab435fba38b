"""What the start-up report says of how a step runs, and why not in one call."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from loramux_adapters.device.cuda import CudaDevice
from loramux_adapters.device.defaults import CARD_SIZES, HOST_SIZES
from loramux_server.base.loader import BaseModel, load_base_model
from loramux_server.config.sizes import AsksForSizes
from loramux_server.kernels import choice
from loramux_server.kernels.attention.kv_cache import KVShape
from loramux_server.kernels.choice import Kernels, choose_kernels
from loramux_server.kernels.compiled.library import native_library
from loramux_server.kernels.layers.served_weights import ServedWeights
from loramux_server.serving.device_sizes import MIB, BaseSizes, Room, sizes_of
from loramux_server.serving.memory_plan import compiled_lines, how_a_step_runs, memory_table, unpacked_layers
from support.emulated import EmulatedDevice
from support.stepping import CPU, Stepper
from support.tiny_models import save_tiny_model

HOST = Room(1 << 34, 1 << 33, HOST_SIZES)

needs_kernels = pytest.mark.skipif(native_library() is None, reason="there are no compiled kernels")


class AskedSizes(AsksForSizes):
    table = "asked"


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


def test_a_card_without_our_kernels_says_why_and_what_that_means(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "native_library", lambda: object())
    card = CudaDevice(torch.device("cuda"))
    assert compiled_lines(Kernels("triton"), card) == []
    monkeypatch.setattr(choice, "why_no_triton", lambda device, again: "there is no C compiler: install gcc")
    first, second = compiled_lines(Kernels("cuda"), card)
    assert first == "NO kernels of our own: there is no C compiler: install gcc" and "one by one" in second
    monkeypatch.setattr(choice, "why_no_triton", lambda device, again: "")
    assert compiled_lines(Kernels("cuda"), card)[0].endswith("LORAMUX_KERNELS asks for 'cuda'; unset it")


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


def test_a_card_is_told_what_steps_and_graphs_take_and_its_own_sum(tmp_path: Path) -> None:
    base = base_of(tmp_path, kernels="tensor")
    kv = KVShape(2, 2, 16)
    room = Room(1 << 30, 1 << 29, CARD_SIZES)
    sizes = sizes_of(AskedSizes(max_num_seqs=8), BaseSizes(base.linears, kv, 512, None), room)
    device = EmulatedDevice(total=1 << 30)
    lines = memory_table(replace(base, device=device), sizes, 64 * MIB, 100 * MIB)
    told = {line[2:26].strip(): float(line[26:36].replace(",", "")) for line in lines}
    of_device = ("base in NF4", "KV cache", "adapters", "tokens of adapters", "work of a step", "graphs of steps")
    assert told["together"] == pytest.approx(sum(told[name] for name in of_device), abs=3)
    assert told["work of a step"] > 0 and told["graphs of steps"] == 32
    assert "of 1,024 MiB on the device" in lines[6] and told["adapters in host memory"] == 64
    assert max(map(len, lines)) <= 100
    assert "of rank 16 with DoRA or biases" in lines[2]
    weights = ServedWeights(base.model, vectors=False)
    assert "of rank 16 on every layer" in memory_table(replace(base, device=device, weights=weights), sizes, 0, 0)[2]

    on_cpu = memory_table(
        base, sizes_of(AskedSizes(), BaseSizes(base.linears, kv, 512, None), HOST), 64 * MIB, 100 * MIB
    )
    told = {line[2:26].strip(): float(line[26:36].replace(",", "")) for line in on_cpu}
    assert "work of a step" not in told and told["together"] == pytest.approx(sum(told.values()) / 2, abs=3)
