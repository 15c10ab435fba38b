"""A whole step of a decoder on a graphics processor: which kernels are launched, in which order, on which tensors.

Semantics are those of `Layer` in decoder/description.py, with the residual stream in fp32 and what products read in the
device's activations (bf16, or fp16). Projections that read the same rows are one product and one LoRA call. In the last
layer only sampled rows go on behind the attention, as nobody looks at the others.

All memory is taken when the decoder is made, for the largest step. What differs from step to step lies in tables that
are filled on the host and copied in front of the launches (tables.py), so the launches of one shape can be captured as
a graph and replayed for any step that fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loramux_adapters.device.device import Device
from loramux_adapters.lora.ops import LoraRows
from loramux_server.kernels.attention.kv_cache import BLOCK_SIZE, KVCache
from loramux_server.kernels.attention.paged_attention import AttentionStep
from loramux_server.kernels.decoder.description import Description, Layer
from loramux_server.kernels.gpu import rows as elementwise
from loramux_server.kernels.gpu.attention import AttentionScratch, attend, attention_scratch
from loramux_server.kernels.gpu.dense import dense_product
from loramux_server.kernels.gpu.lora import add_lora, lora_scratch
from loramux_server.kernels.gpu.lora_tables import LoraTables
from loramux_server.kernels.gpu.nf4 import Nf4Weights, nf4_product
from loramux_server.kernels.gpu.rotary import rotate_and_write
from loramux_server.kernels.gpu.split_sums import scratch_numbers
from loramux_server.kernels.gpu.step.stacks import Stack, head_stack, stack_of
from loramux_server.kernels.gpu.step.tables import StepSizes, StepTables
from loramux_server.kernels.layers.recognition import RMSNorm

PRODUCT_ROWS = 256  # rows of one product's launches: its scratch grows with them


@dataclass(frozen=True, slots=True)
class StepShape:
    """What the launches of a step follow from.

    Attributes:
        rows, samples: token rows, and rows whose logits are wanted.
        lora: some row has an adapter.
        prompts: some sequence has rows enough for the attention's large tiles.
    """

    rows: int
    samples: int
    lora: bool
    prompts: bool


@dataclass(frozen=True, slots=True)
class _Stacks:
    """The products of one layer."""

    qkv: Stack
    o: Stack
    gate_up: Stack
    down: Stack


class GpuDecoder:
    """Runs steps of one model. Owner: the engine thread.

    The model's weights and the arenas of its adapters are read where they lie; they must outlive this object.

    Attributes:
        description: the model.
        sizes: the largest step.
        tables: what differs from step to step.
        logits: [sizes.samples, vocabulary] fp32, of the step that ran last.
    """

    def __init__(self, device: Device, description: Description, cache: KVCache, sizes: StepSizes) -> None:
        """Raises DeviceFull: there is no room for what a step works in."""
        self.description, self.sizes = description, sizes
        self._device, self._launch, self._cache = device, device.launch, cache
        self._stacks = [_stacks_of(layer) for layer in description.layers]
        self._head = head_stack(description.head)
        self.tables = StepTables(device, sizes, description)
        self._angles = self._known_angles()
        self._take_memory()

    def _known_angles(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """cos and sin of every position that a sequence can have, by table."""
        positions = min(self.sizes.blocks, self._cache.num_blocks) * BLOCK_SIZE
        for table in self.description.angles:
            table.know(positions)
        return [(self._device.put(table.cos), self._device.put(table.sin)) for table in self.description.angles]

    def _take_memory(self) -> None:
        of, rows, samples, device = self.description, self.sizes.rows, self.sizes.samples, self._device
        act, fp32 = self._cache.k[0].dtype, torch.float32
        widest = max(max(s.qkv.outputs, s.gate_up.outputs) for s in self._stacks)
        inner, queries = max(s.down.inputs for s in self._stacks), of.heads * of.head_dim
        self._x, self._part = (device.scratch((rows, of.hidden), fp32) for _ in range(2))
        self._n = device.scratch((rows, of.hidden), act)
        self._wide, self._gated = device.scratch((rows * widest,), act), device.scratch((rows * inner,), act)
        self._q, self._attended = (device.scratch((rows, queries), act) for _ in range(2))
        self._sampled_x = device.scratch((samples, of.hidden), fp32)
        self._sampled = device.scratch((samples, queries), act)
        self.logits = device.scratch((samples, of.vocabulary), fp32)
        together = min(rows, PRODUCT_ROWS)
        products = [stack for s in self._stacks for stack in (s.qkv, s.o, s.gate_up, s.down)] + [self._head]
        sums = max(scratch_numbers(together, stack.inputs, stack.outputs) for stack in products)
        deltas = max(
            [
                lora_scratch(tables, stack.inputs, len(stack.targets))
                for tables, stacks in ((self.tables.lora, products[:-1]), (self.tables.head_lora, products))
                for stack in stacks
                if stack.targets
            ],
            default=1,
        )
        self._sums, self._deltas = device.scratch((max(sums, 1),), fp32), device.scratch((max(deltas, 1),), fp32)
        shapes = attention_scratch(self.tables.attention.sizes, of.heads, of.head_dim)
        self._attention = AttentionScratch(*(device.scratch(shape, fp32) for shape in shapes))

    def forward(
        self,
        tokens: Sequence[int],
        heads: Sequence[int],
        step: AttentionStep,
        lora: LoraRows | None,
        head: LoraRows | None,
    ) -> torch.Tensor:
        """Logits [len(heads), vocabulary] fp32, a view; keys and values of all rows are in the cache afterwards.

        Args:
            tokens: the token of each row.
            heads: the rows, in order, whose logits are wanted.
            step: its block tables in host memory.
            lora, head: adapters of all rows, and of the rows in `heads`.
        """
        prompts = self.tables.fill(tokens, heads, step, lora, head)
        self.run(StepShape(len(tokens), len(heads), lora is not None, prompts))
        return self.logits[: len(heads)]

    def run(self, shape: StepShape) -> None:
        """Launches a step of this shape on what the tables hold. Can be captured."""
        of, launch, rows = self.description, self._launch, shape.rows
        x = self._x[:rows]
        assert of.embedding is not None
        elementwise.embed(launch, x, self.tables.tokens[:rows], of.embedding, of.embedding_factor)
        part: torch.Tensor | None = None
        after: RMSNorm | None = None
        for index, layer in enumerate(of.layers):
            last = index + 1 == len(of.layers)
            n = self._normed(x, part, after, layer.before_attention)
            self._attend(index, layer, n, shape)
            attended = self._attended[:rows]
            if last:
                if shape.samples == 0:
                    return
                x, attended = self._only_sampled(x, attended, shape.samples)
            part = self._part[: len(x)]
            tables = (self.tables.head_lora if last else self.tables.lora) if shape.lora else None
            stacks = self._stacks[index]
            self._product(part, attended, stacks.o, tables)
            n = self._normed(x, part, layer.after_attention, layer.before_mlp)
            wide = _dense(self._wide, len(x), stacks.gate_up.outputs)
            self._product(wide, n, stacks.gate_up, tables)
            gated = _dense(self._gated, len(x), stacks.down.inputs)
            elementwise.gate(launch, gated, wide, gelu=layer.gelu)
            self._product(part, gated, stacks.down, tables)
            after = layer.after_mlp
        n = self._normed(x, part, after, of.norm)
        logits = self.logits[: shape.samples]
        self._product(logits, n, self._head, self.tables.head_lora if shape.lora else None)
        elementwise.finish_logits(launch, logits, divisor=of.logit_divisor, softcap=of.logit_softcap)

    def _normed(
        self, x: torch.Tensor, part: torch.Tensor | None, after: RMSNorm | None, norm: RMSNorm | None
    ) -> torch.Tensor:
        n = self._n[: len(x)]
        elementwise.add_norm(
            self._launch,
            n,
            x,
            part,
            norm=norm,
            after=after,
            factor=self.description.residual_factor,
        )
        return n

    def _attend(self, index: int, layer: Layer, n: torch.Tensor, shape: StepShape) -> None:
        stack = self._stacks[index].qkv
        qkv = _dense(self._wide, shape.rows, stack.outputs)
        self._product(qkv, n, stack, self.tables.lora if shape.lora else None)
        cos, sin = self._angles[layer.rotary] if layer.rotary >= 0 else (None, None)
        k, v = self._cache.k[index], self._cache.v[index]
        rotate_and_write(
            self._launch,
            *(self._q[: shape.rows], qkv, cos, sin, k, v, self.tables.attention),
            q_norm=layer.q_norm,
            k_norm=layer.k_norm,
        )
        attend(
            self._launch,
            *(self._attended[: shape.rows], self._q[: shape.rows], k, v, self.tables.attention),
            *(layer.asked, self._attention),
            large_tiles=shape.prompts,
        )

    def _only_sampled(self, x: torch.Tensor, attended: torch.Tensor, samples: int) -> tuple[torch.Tensor, torch.Tensor]:
        to = self._sampled_x[:samples], self._sampled[:samples]
        for wanted, all_rows in zip(to, (x, attended), strict=True):
            elementwise.gather_rows(self._launch, wanted, all_rows, self.tables.sampled[:samples])
        return to

    def _product(self, y: torch.Tensor, x: torch.Tensor, stack: Stack, tables: LoraTables | None) -> None:
        """y = x @ stack.T + bias, + the adapters' deltas; by PRODUCT_ROWS rows, which changes no bit."""
        for first in range(0, len(x), PRODUCT_ROWS):
            some = slice(first, first + PRODUCT_ROWS)
            if isinstance(stack.weights, Nf4Weights):
                nf4_product(self._launch, y[some], x[some], stack.weights, self._sums, bias=stack.bias)
            else:
                dense_product(self._launch, y[some], x[some], stack.weights, self._sums)
        if tables is not None and stack.targets:
            add_lora(self._launch, y, x, stack.targets, tables, self._deltas)


def _stacks_of(layer: Layer) -> _Stacks:
    return _Stacks(
        qkv=stack_of([layer.q, layer.k, layer.v]),
        o=stack_of([layer.o]),
        gate_up=stack_of([layer.gate, layer.up]),
        down=stack_of([layer.down]),
    )


def _dense(numbers: torch.Tensor, rows: int, width: int) -> torch.Tensor:
    """[rows, width] in the front of `numbers`."""
    return numbers[: rows * width].view(rows, width)
