"""The compiled step: every logit has the bits that transformers' modules give, adapters included."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loramux_adapters.lora.slots import ScaledSlot, Slot
from loramux_adapters.lora.weights import load_host_adapter
from loramux_server.base.loader import BaseModel, load_base_model
from loramux_server.kernels.abi import Isa
from loramux_server.kernels.attention import attend_reference
from loramux_server.kernels.native import native_library
from support.adapter_files import write_adapter
from support.stepping import Stepper
from support.tiny_models import ARCHITECTURES, save_tiny_model

LIBRARY = native_library()
needs_kernels = pytest.mark.skipif(
    LIBRARY is None or LIBRARY.best_isa < Isa.AVX512_BF16, reason="the compiled step needs AVX512-BF16"
)
OF_LLAMAS_SHAPE = {"llama", "qwen2", "qwen3", "mistral", "smollm3"}
Load = Callable[..., BaseModel]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def load(architecture: str, **changes: Any) -> BaseModel:
        directory = save_tiny_model(tmp_path / "base", architecture, **changes)
        return load_base_model(
            str(directory), device=torch.device("cpu"), cache_dir=tmp_path / "cache", report=lambda line: None
        )

    return load


@needs_kernels
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_runs_what_it_computes_exactly_and_leaves_the_rest_to_the_modules(architecture: str, load: Load) -> None:
    stepper = Stepper(load(architecture).model)
    assert (stepper.runner.decoder is not None) == (architecture in OF_LLAMAS_SHAPE)


@needs_kernels
@pytest.mark.parametrize("architecture", sorted(OF_LLAMAS_SHAPE))
def test_a_mixed_batch_has_the_bits_of_the_modules(architecture: str, load: Load, tmp_path: Path) -> None:
    base = load(architecture)
    stepper = Stepper(base.model)
    slots = [Slot(0, 8), Slot(16, 16), Slot(32, 32)]
    kinds: list[dict[str, Any]] = [{"rank": 5}, {"rank": 16, "targets": ["q_proj", "down_proj"]}, {"rank": 32}]
    for index, (slot, kind) in enumerate(zip(slots, kinds, strict=True)):
        directory = write_adapter(tmp_path / str(index), dict(base.linears), seed=index, std_b=0.2, **kind)
        stepper.load(slot, load_host_adapter(directory))
    both = (ScaledSlot(slots[0], 0.5), ScaledSlot(slots[2], -0.7))
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 256, (n,), generator=generator).tolist() for n in (40, 7, 1, 33, 12)]

    def run() -> list[torch.Tensor]:
        sequences = [
            stepper.sequence(f"s-{index}", prompt, slot)
            for index, (prompt, slot) in enumerate(zip(prompts, [None, *slots, both], strict=True))
        ]
        seen = []
        for step in range(9):  # prompts in chunks beside sequences that decode
            rows = [(one, min(one.num_uncomputed, 3 + 5 * (step % 3)) or 1) for one in sequences]
            logits = stepper.logits(rows)
            for one, row in zip(sequences, logits, strict=True):
                if not one.num_uncomputed:
                    one.output.append(int(row.argmax()))
            seen.append(logits)
        for one in sequences:
            stepper.release(one)
        return seen

    compiled, stepper.runner.decoder = run(), None
    for ours, theirs in zip(compiled, run(), strict=True):
        assert torch.equal(ours, theirs)


@needs_kernels
@pytest.mark.parametrize("changes", [{}, {"attention_bias": True}, {"head_dim": 32}, {"tie_word_embeddings": True}])
def test_without_adapters_and_with_other_sizes_too(changes: dict[str, Any], load: Load) -> None:
    base = load("llama", **changes)
    for module in base.model.modules():
        if getattr(module, "bias", None) is not None:
            module.bias.data.normal_()  # type: ignore[union-attr,operator]
    stepper = Stepper(base.model, rows=0)
    assert stepper.runner.decoder is not None
    prompt = list(range(3, 50))
    compiled = torch.stack(stepper.greedy(stepper.sequence("compiled", prompt), 4, chunk=9))
    stepper.runner.decoder = None
    assert torch.equal(compiled, torch.stack(stepper.greedy(stepper.sequence("modules", prompt), 4, chunk=9)))


@needs_kernels
def test_a_chunk_of_which_nothing_is_sampled_fills_the_cache_all_the_same(load: Load) -> None:
    stepper = Stepper(load("llama").model)
    prompt = list(range(3, 40))
    whole = stepper.prefill(stepper.sequence("whole", prompt), 99)
    assert torch.equal(stepper.prefill(stepper.sequence("pieces", prompt), 5), whole)


def test_a_base_on_other_kernels_is_run_by_its_modules(load: Load) -> None:
    assert Stepper(load("llama").model, attend=attend_reference).runner.decoder is None


@needs_kernels
def test_a_layer_that_leaves_something_out_is_found_out(load: Load) -> None:
    """This kind of layer does not rotate its queries and keys; nothing but its numbers says so."""
    assert Stepper(load("smollm3", no_rope_layers=[1, 0]).model).runner.decoder is None


@needs_kernels
def test_a_layer_that_does_more_than_its_parts_say_is_found_out(load: Load) -> None:
    model: Any = load("llama").model
    layer = model.model.layers[1].post_attention_layernorm
    own = layer.forward
    layer.forward = lambda x: own(x) * 1.01
    assert Stepper(model).runner.decoder is None
