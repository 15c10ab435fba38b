"""Sets of kernels by name: what each is made of, and that each computes what the reference computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from loramux_adapters.lora.ops import Arena, LoraRows
from loramux_adapters.lora.slots import ScaledSlot, Slot
from loramux_adapters.lora.weights import load_host_adapter
from loramux_server.base.loader import BaseModel, load_base_model
from loramux_server.config.environment import kernels_of
from loramux_server.config.load import load
from loramux_server.config.serve import ServeConfig
from loramux_server.errors import ConfigError
from loramux_server.kernels.attention.kv_cache import KVShape
from loramux_server.kernels.choice import available_kernels, choose_kernels
from loramux_server.kernels.compiled import library as native
from loramux_server.kernels.compiled.adapter_kernels import NativeAddLora
from loramux_server.kernels.numerics import library_operations, numerics_id
from support.adapter_files import write_adapter
from support.meta_device import MetaDevice
from support.stepping import CPU, Stepper, relative_difference
from support.tiny_models import save_tiny_model

SHAPE = KVShape(2, 2, 16, torch.int16)
HERE = available_kernels(CPU)
LIBRARY = native.native_library()
NATIVE = [name for name in HERE if name.startswith("native")]
BY_MODULES = [name for name in HERE if name.startswith("modules")]
COMPUTING = [
    name for name in HERE if name not in BY_MODULES[1:]
]  # by modules every instruction set is a matter of names
needs_library = pytest.mark.skipif(LIBRARY is None, reason="no compiler was there at installation")
Load = Callable[[str], BaseModel]


@pytest.fixture
def load_for(tmp_path: Path) -> Load:
    return loader_of(tmp_path, "llama")


def loader_of(tmp_path: Path, architecture: str) -> Load:
    """The same base, laid out for a set of kernels."""
    directory = save_tiny_model(tmp_path / "base", architecture)

    def load_for(name: str) -> BaseModel:
        return load_base_model(
            str(directory),
            device=CPU,
            cache_dir=tmp_path / "cache",
            report=lambda line: None,
            kernels=choose_kernels(CPU, name),
        )

    return load_for


def id_of(model: nn.Module, name: str) -> str:
    stepper = Stepper(model, kernels=name)
    return numerics_id(model, CPU, stepper.kernels, stepper.runner.decoder)


def test_sets_that_run_here_are_found() -> None:
    labels = [] if LIBRARY is None else [isa.label for isa in LIBRARY.isas]
    kinds = ("native", "modules") if labels else ()
    compiled = [name for kind in kinds for name in (kind, *(f"{kind}-{label}" for label in reversed(labels)))]
    assert HERE == [*compiled, "tensor", "reference"]
    assert choose_kernels(CPU).name == HERE[0], "the fastest is the default"
    assert not labels or choose_kernels(CPU).isa == labels[-1] and labels[0] == "portable"
    assert choose_kernels(MetaDevice()).name == "tensor"


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3_text", "phi3", "olmo2", "gpt_neox"])
def test_each_set_gives_the_logits_of_the_reference(architecture: str, tmp_path: Path) -> None:
    """A mixed batch with adapters on every layer: a prompt in chunks, then decodes."""
    load_for = loader_of(tmp_path, architecture)

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

    found = {name: run(name) for name in COMPUTING}
    for name, logits in found.items():
        assert relative_difference(logits, found["reference"]) < (5e-3 if name in NATIVE + BY_MODULES else 1e-5), name
    for name in NATIVE + BY_MODULES[:1]:
        assert torch.equal(found[name], found["native"]), "the same bits on every instruction set and by modules"


@pytest.mark.parametrize("name", COMPUTING)
def test_each_set_reads_copies_and_chooses_as_the_reference_does(name: str, tmp_path: Path) -> None:
    ours, reference = choose_kernels(CPU, name, SHAPE), choose_kernels(CPU, "reference", SHAPE)
    directory = write_adapter(tmp_path, {"layer": (64, 48)}, rank=6, dtype="F16", std_b=0.2)
    (a, bt), (a_reference, bt_reference) = (
        load_host_adapter(directory, kernels.convert).modules["layer"] for kernels in (ours, reference)
    )
    assert torch.equal(a, a_reference) and torch.equal(bt, bt_reference)
    logits = torch.randn(5, 320)
    logits[2, 7] = float("nan")
    (tokens, finite), (expected, expected_finite) = (kernels.sampling.search(logits) for kernels in (ours, reference))
    assert finite == expected_finite == [True, True, False, True, True]
    assert [token for token, good in zip(tokens, finite, strict=True) if good] == [
        token for token, good in zip(expected, finite, strict=True) if good
    ]


def test_what_a_set_runs_on_is_named_in_the_numerics_id(load_for: Load) -> None:
    names = {}
    for name in COMPUTING:
        names[name] = id_of(load_for(name).model, name)
    ours = [names[name] for name in COMPUTING if name in NATIVE + BY_MODULES]
    assert len(set(ours)) <= 1, "neither the instruction set nor the whole step changes a bit"
    assert len(set(names.values())) == len(COMPUTING) - max(0, len(ours) - 1)
    assert "; NF4 dequantize; compiled none; attention reference; LoRA reference; cpu " in names["reference"]
    if NATIVE:
        paths = "; NF4 native, head native; compiled 2 MLPs, 1 embedding, 5 norms; attention native; LoRA native; "
        assert paths in names["native"]


@needs_library
@pytest.mark.parametrize(
    ("architecture", "name", "its"),
    [
        ("llama", "native", []),
        ("llama", "modules", []),
        ("gemma3_text", "modules", []),
        ("gemma2", "native", []),  # the soft cap of its logits is ours in the whole step,
        ("gemma2", "modules", ["tanh"]),  # and PyTorch's in transformers' code
        ("gpt_neox", "native", ["gelu", "native_layer_norm"]),
        ("qwen2_moe", "native", []),
        ("glm4_moe", "native", []),
    ],
)
def test_a_processor_is_named_only_where_a_library_computes(
    architecture: str, name: str, its: list[str], tmp_path: Path
) -> None:
    model = loader_of(tmp_path, architecture)(name).model
    assert id_of(model, name).endswith("; any cpu") == (not its)
    assert architecture == "gemma2" or library_operations(model) == its
    floats = choose_kernels(CPU, "native", KVShape(2, 2, 16, torch.float32))
    found = numerics_id(model, CPU, floats, None)
    assert "; attention tensor; " in found and "; cpu " in found


@needs_library
@pytest.mark.parametrize("architecture", ["cohere", "llama"])
def test_bases_that_were_once_turned_in_another_way_have_another_numerics_id(architecture: str, tmp_path: Path) -> None:
    """A fingerprint of Cohere's from then is not compared bit by bit; those of other bases are as good as they were."""
    found = id_of(loader_of(tmp_path, architecture)("native").model, "native")
    assert ("; neighbours turned; " in found) == (architecture == "cohere")


@needs_library
def test_every_operation_of_a_library_is_seen(load_for: Load) -> None:
    """In code between modules too, and of layers and rotations that are not ours."""
    model: Any = load_for("modules").model
    own = model.model.norm.forward
    for changed, seen in (
        (lambda x: own(x).sigmoid(), ["sigmoid"]),
        (lambda x: torch.add(own(x), x, alpha=0.5), ["add with a factor"]),
        (lambda x: own(x) * x.mean(-1, keepdim=True), ["mean"]),
        (lambda x: own(x).index_put((torch.tensor([0, 0]),), x[0], accumulate=True), ["index_put that adds"]),
        (lambda x: own(x).index_put((torch.tensor([0]),), x[0]), []),
        (lambda x: own(x) * 0.5 - x / 3, []),
    ):
        model.model.norm.forward = changed
        assert library_operations(model) == seen
    layer = model.model.layers[0].mlp
    layer.down_proj = nn.Linear(layer.down_proj.in_features, layer.down_proj.out_features, bias=False)
    assert library_operations(model) == ["mm"]


def test_a_set_that_is_not_known_is_refused_with_those_that_are() -> None:
    with pytest.raises(ConfigError, match=f"'fast'; choose one of {', '.join(HERE)}, triton, cuda"):
        choose_kernels(CPU, "fast")


def test_a_set_that_does_not_run_here_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="'cuda' cannot be used here: .* the device is cpu"):
        choose_kernels(CPU, "cuda")
    with pytest.raises(ConfigError, match="'native' cannot be used here: .* the device is meta"):
        choose_kernels(MetaDevice(), "native")
    native._found.cache_clear()
    monkeypatch.setattr(native, "LIBRARY", Path("/nowhere/_kernels.so"))
    try:
        with pytest.raises(ConfigError, match="'native' cannot be used here: they were not built at installation"):
            choose_kernels(CPU, "native")
        with pytest.raises(
            ConfigError, match="LORAMUX_ISA=avx2: there are no compiled kernels here: they were not built"
        ):
            kernels_of({"LORAMUX_ISA": "avx2"})
        assert choose_kernels(CPU).name == "tensor", "without compiled code the tensor path serves"
        assert available_kernels(CPU) == ["tensor", "reference"]
    finally:
        native._found.cache_clear()


def test_the_environment_asks_for_a_set_by_name() -> None:
    assert kernels_of({}) is None and kernels_of({"LORAMUX_KERNELS": ""}) is None
    assert kernels_of({"LORAMUX_KERNELS": "tensor"}) == "tensor"
    # no settings of `serve`, and no unknown variables either
    load(ServeConfig, {}, {"LORAMUX_KERNELS": "tensor", "LORAMUX_ISA": "portable"})


@needs_library
def test_the_environment_asks_for_an_instruction_set() -> None:
    assert LIBRARY is not None
    for isa in LIBRARY.isas:
        request = kernels_of({"LORAMUX_ISA": isa.label})
        assert choose_kernels(CPU, request).isa == isa.label
    both = {"native": "native-portable", "modules": "modules-portable", "modules-portable": "modules-portable"}
    for asked, request in both.items():
        assert kernels_of({"LORAMUX_ISA": "portable", "LORAMUX_KERNELS": asked}) == request
        assert choose_kernels(CPU, request).isa == "portable"
    labels = ", ".join(isa.label for isa in reversed(LIBRARY.isas))
    with pytest.raises(ConfigError, match=f"LORAMUX_ISA must be one of {labels}: .*'portabel'; .*portable"):
        kernels_of({"LORAMUX_ISA": "portabel"})
    for other in ("tensor", "modules-avx2", "modulesportable"):
        with pytest.raises(ConfigError, match=f"LORAMUX_KERNELS={other} for others: unset one"):
            kernels_of({"LORAMUX_ISA": "portable", "LORAMUX_KERNELS": other})
    elsewhere = "for the CPU, and the device is meta: give --device cpu, or unset LORAMUX_KERNELS and LORAMUX_ISA"
    with pytest.raises(ConfigError, match=f"'native-portable' cannot be used here: they are {elsewhere}"):
        choose_kernels(MetaDevice(), kernels_of({"LORAMUX_ISA": "portable"}))


@needs_library
def test_rows_and_arenas_are_seen_again_as_long_as_they_live() -> None:
    """Compiled code keeps what it was told of a step only while the step lives."""
    assert LIBRARY is not None
    path = NativeAddLora(LIBRARY.best)
    arena = Arena(torch.ones(8, 16).bfloat16(), torch.ones(8, 32).bfloat16(), torch.ones(1, dtype=torch.uint8))
    for _ in range(3):
        rows = LoraRows.build([((ScaledSlot(Slot(0, 8)),), 1)])
        assert rows is not None
        y = torch.zeros(1, 32)
        path(y, torch.ones(1, 16), arena, rows)
        assert torch.equal(y, torch.full((1, 32), 128.0))
        assert len(path.addresses) == 2  # the arena and this step's rows
    del rows
    assert len(path.addresses) == 1
