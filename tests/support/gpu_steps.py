"""A tiny random model whose steps run on the Triton kernels of a device, and steps to run on it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from loramux_adapters.device.cpu import CpuDevice
from loramux_adapters.device.device import ON_CARD, Device
from loramux_adapters.lora.lora_linear import AdapterSlots, head_path
from loramux_adapters.lora.ops import HAS_AFFINE, HAS_DELTA, LoraRows, add_lora_segments
from loramux_adapters.lora.slot_copy import copy_slot
from loramux_adapters.lora.slots import ScaledSlot, Slot
from loramux_server.kernels.attention.kv_cache import KVCache, KVShape
from loramux_server.kernels.attention.paged_attention import AttentionParams, AttentionStep, attend_reference
from loramux_server.kernels.compiled.library import native_library
from loramux_server.kernels.decoder.asks import Ask
from loramux_server.kernels.decoder.description import describe
from loramux_server.kernels.gpu.nf4 import Nf4Weights
from loramux_server.kernels.gpu.step.answers import StepAnswers
from loramux_server.kernels.gpu.step.decoder import GpuDecoder
from loramux_server.kernels.gpu.step.nf4_linear import TritonNF4Linear, kinds_of, pack
from loramux_server.kernels.gpu.step.tables import StepSizes
from loramux_server.kernels.layers.recognition import RMSNorm, recognize
from loramux_server.kernels.layers.rotary import use_angles
from support.decoders import random_model

SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}
BLOCKS = 3  # of a sequence
NO_ADAPTERS = ((), (), ())
MIXED = (
    (ScaledSlot(Slot(16, 16)), ScaledSlot(Slot(0, 8), -0.7)),
    (),
    (ScaledSlot(Slot(0, 8), 0.5),),
)


class AtOnce(CpuDevice):
    """Triton's interpreter as a card: fp16, and everything is done at once."""

    layout, is_host, kernels = ON_CARD, False, "cuda"

    @property
    def activations(self) -> torch.dtype:
        return torch.float16


@dataclass(frozen=True, slots=True)
class Row:
    """Of a step: `count` tokens of a sequence from a position on, and what is asked of the last one's logits.

    Attributes:
        tokens: -(1 + i): what ask i of the step before chose.
        ask: None: nobody wants its logits. `Ask.row` is filled in.
    """

    sequence: int
    position: int
    tokens: tuple[int, ...]
    ask: Ask | None = Ask(0)


class TinySteps:
    """A model on a device, with `sequences` sequences of BLOCKS blocks; adapters are in its slots after `load`.

    Attributes:
        decoder: its whole step.
        tables: [sequences, BLOCKS] int32, which block of the cache is whose; the last block is nobody's.
    """

    def __init__(
        self,
        device: Device,
        *,
        sequences: int = 3,
        samples: int = 6,
        heads: int = 2,
        vocabulary: int = 300,
        affine: bool = False,
    ) -> None:
        self.device = device
        self.model = random_model("Llama", **(SIZES | {"num_attention_heads": heads, "vocab_size": vocabulary}))
        pack(self.model, AtOnce())
        library = native_library()
        assert library is not None
        recognize(self.model, AtOnce())
        use_angles(self.model, library)
        with device.used(), torch.inference_mode():
            _put(self.model, device)
            shape = KVShape(2, 1, 32, device.activations)
            self.slots = AdapterSlots(
                self.model,
                32,
                add_lora_segments,
                copy_slot,
                head=head_path(self.model),
                device=device,
                affine=affine,
            )
            asked = [AttentionParams(32**-0.5), AttentionParams(32**-0.5, window=20)]
            description = describe(self.model, shape, asked, kinds_of(device.activations))
            self.cache = KVCache(shape, sequences * BLOCKS + 1, device)
            sizes = StepSizes(
                rows=24, samples=samples, sequences=sequences, blocks=BLOCKS, entries=2, ranks=32, programs=2
            )
            self.decoder = GpuDecoder(device, description, self.cache, sizes, spare_block=sequences * BLOCKS)
        self.tables = torch.arange(sequences * BLOCKS, dtype=torch.int32).view(sequences, BLOCKS).flip(0).contiguous()

    def load(self) -> None:
        """Random adapters into all slots; where there is room, the first has gain and shift too, the second
        nothing else.
        """
        generator = torch.Generator().manual_seed(2)
        with self.device.used(), torch.inference_mode():
            for layer in self.slots.layers.values():
                for weights in (layer.arena.a, layer.arena.bt):
                    weights.copy_(torch.randn(weights.shape, generator=generator).to(weights.dtype) * 0.1)
                layer.arena.targeted.fill_(HAS_DELTA)
                affine = layer.arena.affine
                if affine is not None:
                    affine.copy_(torch.randn(affine.shape, generator=generator) * 0.1)
                    layer.arena.targeted[0] = HAS_DELTA | HAS_AFFINE
                    layer.arena.targeted[1] = HAS_AFFINE

    def given(self, rows: Sequence[Row], adapters: Sequence[tuple[ScaledSlot, ...]]) -> tuple[Any, ...]:
        """What `GpuDecoder.start` is given; all but the last is what `forward` is."""
        heads, runs, at = [], [], 0
        for index, row in enumerate(rows):
            runs.append((index, at, len(row.tokens), row.position))
            at += len(row.tokens)
            if row.ask is not None:
                heads.append(at - 1)
        wanted = [row for row in rows if row.ask is not None]
        asks = [row.ask._replace(row=index) for index, row in enumerate(wanted) if row.ask is not None]
        none = torch.zeros(0, dtype=torch.int32)
        tables = self.tables[[row.sequence for row in rows]]
        step = AttentionStep(self.cache, attend_reference, tables, none, none, tuple(runs))
        lora = LoraRows.build([(adapters[row.sequence], len(row.tokens)) for row in rows])
        head = LoraRows.build([(adapters[row.sequence], 1) for row in wanted])
        return [token for row in rows for token in row.tokens], heads, step, lora, head, asks

    def start(
        self, rows: Sequence[Row], adapters: Sequence[tuple[ScaledSlot, ...]] = NO_ADAPTERS, *, plain: bool = False
    ) -> StepAnswers:
        """`adapters`: of each sequence. `plain`: as launches, whatever was captured."""
        graphs = self.decoder.graphs
        self.decoder.graphs = None if plain else graphs
        try:
            with self.device.used(), torch.inference_mode():
                return self.decoder.start(*self.given(rows, adapters))
        finally:
            self.decoder.graphs = graphs

    def forward(self, rows: Sequence[Row], adapters: Sequence[tuple[ScaledSlot, ...]] = NO_ADAPTERS) -> torch.Tensor:
        """Logits of the rows of which something is asked, in host memory."""
        with self.device.used(), torch.inference_mode():
            return self.device.take(self.decoder.forward(*self.given(rows, adapters)[:-1]))

    def logits(self, rows: int) -> torch.Tensor:
        """Of the step that was started last, in host memory."""
        return self.device.take(self.decoder.logits[:rows])


def prompts(lengths: Iterable[int] = (19, 2, 1)) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(300, (length,), generator=generator).tolist() for length in lengths]


def _put(model: nn.Module, device: Device) -> None:
    """A model's tensors onto the device."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(device.put(parameter.data), requires_grad=False)
        norm = module.__dict__.get("loramux_norm")
        if norm is not None:
            module.__dict__["loramux_norm"] = RMSNorm(device.put(norm.weight), norm.eps)
        if isinstance(module, TritonNF4Linear):
            module.nf4 = Nf4Weights(device.put(module.nf4.codes), device.put(module.nf4.scales))
