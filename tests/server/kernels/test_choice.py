"""Sets of kernels by name: what each is made of, and that each computes what the reference computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from loramux_adapters.lora.ops import LoraRows
from loramux_adapters.lora.slots import ScaledSlot, Slot
from loramux_adapters.lora.weights import load_host_adapter
from loramux_server.base.loader import BaseModel, load_base_model
from loramux_server.config.environment import kernels_of
from loramux_server.config.load import load
from loramux_server.config.serve import ServeConfig
from loramux_server.errors import ConfigError
from loramux_server.kernels import native
from loramux_server.kernels.abi import Isa
from loramux_server.kernels.choice import available_kernels, choose_kernels
from loramux_server.kernels.kv_cache import KVShape
from loramux_server.kernels.numerics import numerics_id
from support.adapter_files import write_adapter
from support.stepping import CPU, Stepper, relative_difference
from support.tiny_models import save_tiny_model

SHAPE = KVShape(2, 2, 16)
HERE = available_kernels(CPU)
LIBRARY = native.native_library()
has_vectors = LIBRARY is not None and LIBRARY.best_isa is Isa.AVX512_BF16
Load = Callable[[str], BaseModel]


@pytest.fixture
def load_for(tmp_path: Path) -> Load:
    """The same base, laid out for a set of kernels."""
    directory = save_tiny_model(tmp_path / "base", "llama")

    def load_for(name: str) -> BaseModel:
        return load_base_model(
            str(directory),
            device=CPU,
            cache_dir=tmp_path / "cache",
            report=lambda line: None,
            kernels=choose_kernels(CPU, name),
        )

    return load_for


def test_sets_that_run_here_are_found() -> None:
    expected = ["tensor", "reference"] if LIBRARY is None else ["native", "portable", "tensor", "reference"]
    assert HERE == expected
    assert choose_kernels(CPU).name == expected[0], "the fastest is the default"
    assert choose_kernels(torch.device("meta")).name == "tensor"


@pytest.mark.parametrize("name", HERE)
def test_each_set_gives_the_logits_of_the_reference(name: str, load_for: Load, tmp_path: Path) -> None:
    """A mixed batch with adapters on every layer: a prompt in chunks, then decodes."""

    def run(name: str) -> torch.Tensor:
        base = load_for(name)
        stepper = Stepper(base.model, rows=64, kernels=name)
        assert stepper.kernels.name == name
        for index, slot in enumerate((Slot(0, 8), Slot(16, 16))):
            directory = write_adapter(tmp_path / f"{name}{index}", dict(base.linears), seed=index, rank=slot.rank - 1)
            stepper.load(slot, load_host_adapter(directory, stepper.kernels.convert))
        slots = [(), (ScaledSlot(Slot(0, 8)),), (ScaledSlot(Slot(0, 8), 0.5), ScaledSlot(Slot(16, 16), -0.7))]
        sequences = [stepper.sequence(str(i), range(3, 25 + i), each) for i, each in enumerate(slots)]
        seen = []
        for step in range(5):
            rows = [(one, min(one.num_uncomputed, 10) or 1) for one in sequences]
            seen.append(stepper.logits(rows))
            for one in sequences:
                if not one.num_uncomputed:
                    one.output.append(step)
        return torch.cat(seen)

    assert relative_difference(run(name), run("reference")) < 0.05


@pytest.mark.parametrize("name", HERE)
def test_each_set_reads_copies_and_chooses_as_the_reference_does(name: str, tmp_path: Path) -> None:
    ours, reference = choose_kernels(CPU, name, SHAPE), choose_kernels(CPU, "reference", SHAPE)
    directory = write_adapter(tmp_path, {"layer": (64, 48)}, rank=6, dtype="F16", std_b=0.2)
    (a, bt), (a_reference, bt_reference) = (
        load_host_adapter(directory, kernels.convert).modules["layer"] for kernels in (ours, reference)
    )
    assert torch.equal(a, a_reference) and torch.equal(bt, bt_reference)
    logits = torch.randn(5, 320).bfloat16()
    logits[2, 7] = float("nan")
    (tokens, finite), (expected, expected_finite) = ours.argmax(logits), reference.argmax(logits)
    assert finite == expected_finite == [True, True, False, True, True]
    assert [token for token, good in zip(tokens, finite, strict=True) if good] == [
        token for token, good in zip(expected, finite, strict=True) if good
    ]


def test_what_a_set_runs_on_is_named_in_the_numerics_id(load_for: Load) -> None:
    names = {}
    for name in HERE:
        base = load_for(name)
        names[name] = numerics_id(base.model, CPU, choose_kernels(CPU, name, SHAPE))
    assert len(set(names.values())) == len(HERE)
    assert "; NF4 dequantize; compiled none; attention reference; LoRA reference; cpu " in names["reference"]
    if has_vectors:
        paths = "; NF4 native AVX512-BF16; compiled 2 MLPs, 1 head, 5 norms; "
        assert paths + "attention native AVX512-BF16; LoRA native AVX512-BF16; cpu " in names["native"]
        assert "; compiled 2 MLPs, 5 norms; attention native portable; LoRA native portable; " in names["portable"]


@pytest.mark.skipif(not has_vectors, reason="the compiled step needs AVX512-BF16")
def test_only_a_set_with_its_instruction_set_compiles_whole_steps() -> None:
    steps = {name: choose_kernels(CPU, name, SHAPE).compile_step for name in HERE}
    assert [name for name, step in steps.items() if step is not None] == ["native"]
    assert choose_kernels(CPU, "native", KVShape(2, 2, 24)).compile_step is None
    assert choose_kernels(CPU, "native", KVShape(2, 2, 16, torch.float32)).lora == "tensor"


def test_a_set_that_is_not_known_is_refused_with_those_that_are() -> None:
    with pytest.raises(ConfigError, match="'fast'; choose one of native, portable, tensor, reference, cuda"):
        choose_kernels(CPU, "fast")


def test_a_set_that_does_not_run_here_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="'cuda' cannot be used here: .* the device is cpu"):
        choose_kernels(CPU, "cuda")
    with pytest.raises(ConfigError, match="'native' cannot be used here: .* the device is meta"):
        choose_kernels(torch.device("meta"), "native")
    native._found.cache_clear()
    monkeypatch.setattr(native, "LIBRARY", Path("/nowhere/_kernels.so"))
    try:
        with pytest.raises(ConfigError, match="'portable' cannot be used here: they were not built at installation"):
            choose_kernels(CPU, "portable")
        assert choose_kernels(CPU).name == "tensor", "without compiled code the tensor path serves"
        assert available_kernels(CPU) == ["tensor", "reference"]
    finally:
        native._found.cache_clear()


def test_the_environment_asks_for_a_set_by_name() -> None:
    assert kernels_of({}) is None and kernels_of({"LORAMUX_KERNELS": ""}) is None
    assert kernels_of({"LORAMUX_KERNELS": "tensor"}) == "tensor"
    load(ServeConfig, {}, {"LORAMUX_KERNELS": "tensor"})  # no setting of `serve`, and no unknown variable either


def test_rows_and_arenas_are_seen_again_as_long_as_they_live() -> None:
    """Compiled code keeps what it was told of a step only while the step lives."""
    if LIBRARY is None:
        pytest.skip("no compiler was there at installation")
    from loramux_adapters.lora.ops import Arena
    from loramux_server.kernels.adapter_kernels import NativeAddLora

    path = NativeAddLora(LIBRARY, Isa.PORTABLE)
    arena = Arena(torch.ones(8, 16).bfloat16(), torch.ones(8, 32).bfloat16(), torch.ones(1, dtype=torch.uint8))
    for _ in range(3):
        rows = LoraRows.build([((ScaledSlot(Slot(0, 8)),), 1)])
        assert rows is not None
        y = torch.zeros(1, 32).bfloat16()
        path(y, torch.ones(1, 16).bfloat16(), arena, rows)
        assert torch.equal(y, torch.full((1, 32), 128.0).bfloat16())
        assert len(path.addresses) == 2  # the arena and this step's rows
    del rows
    assert len(path.addresses) == 1
