"""A whole step on kernels in Triton: near fp32 for every family, and a row's bits are its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from loramux_adapters.lora.lora_linear import AdapterSlots, head_path
from loramux_adapters.lora.ops import LoraRows, add_lora_segments
from loramux_adapters.lora.slot_copy import copy_slot
from loramux_adapters.lora.slots import ScaledSlot, Slot
from loramux_server.kernels.attention.kv_cache import BLOCK_SIZE, KVCache
from loramux_server.kernels.attention.paged_attention import (
    AttentionParams,
    AttentionStep,
    attend_reference,
    probe_kv_shape,
)
from loramux_server.kernels.compiled.library import native_library
from loramux_server.kernels.decoder.description import describe
from loramux_server.kernels.decoder.trial import Trial
from loramux_server.kernels.gpu.step.decoder import GpuDecoder
from loramux_server.kernels.gpu.step.nf4_linear import kinds_of, pack
from loramux_server.kernels.gpu.step.tables import StepSizes
from loramux_server.kernels.layers.recognition import recognize
from loramux_server.kernels.layers.rotary import use_angles
from support.decoders import random_model, slow_twin
from support.gpu_steps import AtOnce
from support.stepping import relative_difference

FAMILIES = ["Llama 3", "Qwen3", "Gemma 2", "Gemma 3", "Phi-4", "Granite", "OLMo 2", "SmolLM3", "one key for all"]
LENGTHS = (20, 3, 1)
ADAPTERS = [
    (ScaledSlot(Slot(0, 8)), ScaledSlot(Slot(32, 32), -0.7)),
    (ScaledSlot(Slot(0, 8)),),
    (),
]
WIDTH = -(-max(LENGTHS) // BLOCK_SIZE)


DEVICE = AtOnce()


class Served:
    """A random model with adapters in its slots.

    Attributes:
        expected: logits of each sequence by transformers in fp32.
    """

    def __init__(self, family: str) -> None:
        self.model = random_model(family)
        twin = slow_twin(self.model)
        with torch.no_grad():
            self.expected = [twin(input_ids=torch.tensor([ids]), use_cache=False).logits[0] for ids in sequences()]
        library = native_library()
        assert library is not None
        pack(self.model, DEVICE)
        recognize(self.model, DEVICE)
        use_angles(self.model, library)
        self.shape = probe_kv_shape(self.model, DEVICE, whole_numbers=False)
        self.slots = AdapterSlots(
            self.model, 64, add_lora_segments, copy_slot, head=head_path(self.model), device=DEVICE
        )
        generator = torch.Generator().manual_seed(2)
        for layer in self.slots.layers.values():
            for weights in (layer.arena.a, layer.arena.bt):
                weights.copy_(torch.randn(weights.shape, generator=generator) * 0.1)
            layer.arena.targeted.fill_(1)
        with torch.inference_mode():
            asked: list[AttentionParams] = Trial(attend_reference, self.model, KVCache(self.shape, 8, DEVICE)).asked
        self.description = describe(self.model, self.shape, asked, kinds_of(DEVICE.activations))
        self.cache = KVCache(self.shape, len(LENGTHS) * WIDTH, DEVICE)
        sizes = StepSizes(rows=64, samples=64, sequences=3, blocks=WIDTH, entries=2, ranks=64, programs=3)
        self.decoder = GpuDecoder(DEVICE, self.description, self.cache, sizes)

    def feed(self, which: list[int], chunk: int, adapters: list[Any] | None = None) -> dict[int, torch.Tensor]:
        """Logits of all tokens of the sequences that are named, fed `chunk` tokens of each a step."""
        found: dict[int, list[torch.Tensor]] = {index: [] for index in which}
        tables = torch.arange(len(LENGTHS) * WIDTH, dtype=torch.int32).view(-1, WIDTH).flip(0).contiguous()
        for first in range(0, max(LENGTHS[i] for i in which), chunk):
            parts = {i: sequences()[i][first : first + chunk] for i in which if LENGTHS[i] > first}
            runs, row = [], 0
            for i, part in parts.items():
                runs.append((i, row, len(part), first))
                row += len(part)
            none = torch.zeros(0, dtype=torch.int32)
            step = AttentionStep(self.cache, attend_reference, tables, none, none, tuple(runs))
            lora = LoraRows.build([(adapters[i] if adapters else (), len(part)) for i, part in parts.items()])
            tokens = [token for part in parts.values() for token in part]
            logits = self.decoder.forward(tokens, list(range(row)), step, lora, lora)
            for i, part in zip(parts, logits.split([len(part) for part in parts.values()]), strict=True):
                found[i].append(part.clone())
        return {i: torch.cat(parts) for i, parts in found.items()}


def sequences() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(333, (length,), generator=generator).tolist() for length in LENGTHS]


@pytest.fixture(scope="module", params=FAMILIES)
def served(request: pytest.FixtureRequest) -> Served:
    return Served(request.param)


def test_it_is_near_transformers_own_code_in_fp32(served: Served) -> None:
    got = served.feed([0, 1, 2], chunk=13)
    assert relative_difference(torch.cat(list(got.values())), torch.cat(served.expected)) < 0.01


@pytest.mark.parametrize("served", FAMILIES[:3], indirect=True)  # the interpreter is slow
def test_a_row_has_its_bits_alone_and_in_company_with_any_adapters(served: Served) -> None:
    together = served.feed([0, 1, 2], chunk=13, adapters=ADAPTERS)
    assert relative_difference(together[1], served.feed([1], chunk=5)[1]) > 0.01, "adapters change replies"
    for index in (0, 2):
        alone = served.feed([index], chunk=17, adapters=ADAPTERS)
        assert torch.equal(alone[index], together[index])
