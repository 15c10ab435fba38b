"""A whole step of a decoder on a graphics processor: which kernels are launched, in which order, on which tensors.

Semantics are those of `Layer` in decoder/description.py, with the residual stream in fp32 and what products read in the
device's activations (bf16, or fp16). Projections that read the same rows are one product and one LoRA call. In the last
layer only sampled rows go on behind the attention, as nobody looks at the others.

All memory is taken when the decoder is made, for the largest step. What differs from step to step lies in tables that
are filled on the host and copied in front of the launches (tables.py), so the launches of one shape can be captured as
a graph (graphs.py) and replayed for any step that fits.

`start` also chooses tokens on the device and does not wait for them (answers.py): the host may prepare and start the
next step, of whose tokens it knows only whose answers they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from loramux_adapters.device.device import Device
from loramux_adapters.lora.ops import LoraRows
from loramux_adapters.lora.token_rows import StepTokens
from loramux_server.kernels.attention.kv_cache import BLOCK_SIZE, KVCache
from loramux_server.kernels.attention.paged_attention import AttentionStep
from loramux_server.kernels.compiled.logit_changes import MOST_CHANGES, RowChange
from loramux_server.kernels.decoder.asks import Ask, ChangedAsk
from loramux_server.kernels.decoder.description import Description, Layer
from loramux_server.kernels.gpu.attention import AttentionScratch, attention_scratch
from loramux_server.kernels.gpu.cuts import ChangeSizes
from loramux_server.kernels.gpu.lora import LoraTarget, lora_scratch
from loramux_server.kernels.gpu.lora_tables import LoraTables
from loramux_server.kernels.gpu.nf4 import Nf4Weights
from loramux_server.kernels.gpu.sampling import LARGEST_VOCABULARY, SamplingError, SamplingSizes
from loramux_server.kernels.gpu.split_sums import row_tiles_of, scratch_numbers
from loramux_server.kernels.gpu.step.answers import StepAnswers, StepSampling
from loramux_server.kernels.gpu.step.changes import StepChanges
from loramux_server.kernels.gpu.step.operations import TRITON, Operations
from loramux_server.kernels.gpu.step.stacks import Stack, head_stack, stack_of
from loramux_server.kernels.gpu.step.tables import StepShape, StepSizes, StepTables
from loramux_server.kernels.gpu.step.token_rows import OwnRowsOfStep
from loramux_server.kernels.gpu.step.workspace import PRODUCT_ROWS
from loramux_server.kernels.layers.recognition import RMSNorm


class Graphs(Protocol):
    """Steps of some shapes that were captured (graphs.py)."""

    def shape_for(self, shape: StepShape) -> StepShape:
        """The smallest captured shape that holds a step of this one; this one itself where there is none."""

    def run(self, shape: StepShape) -> bool:
        """Replays the graph of a captured shape; False: it is none."""


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
        device: where it runs.
        description: the model.
        cache: of keys and values.
        sizes: the largest step.
        spare_block: of the cache, which no sequence has while graphs are captured: they write to it. None: no graph can
            be captured.
        tables: what differs from step to step.
        logits: [sizes.samples, vocabulary] fp32, of the step that ran last.
        operations: what a step is made of; may be changed between steps, before any is captured.
        row_tiles: rows of a product's programs.
        angles: cos and sin [positions, pairs] fp32 of each table that layers name.
        sampling: what `start` chooses tokens with; None where the vocabulary is larger than LARGEST_VOCABULARY.
        chooses: there is `start`; False: there is `forward` alone, as `sampling` is None.
        most_asks: of one `start`.
        graphs: what `start` replays where it can.
        in_words, notes, equal_bits, replaced: as `WholeStep` has them.
    """

    in_words = "a step is our own kernels in Triton, one launch after the other"

    def __init__(
        self,
        device: Device,
        description: Description,
        cache: KVCache,
        sizes: StepSizes,
        *,
        spare_block: int | None = None,
        operations: Operations = TRITON,
    ) -> None:
        """Raises DeviceFull: there is no room for what a step works in."""
        self.device, self.description, self.sizes, self.spare_block = device, description, sizes, spare_block
        self.cache, self._launch = cache, device.launch
        self.graphs: Graphs | None = None
        self.notes: tuple[str, ...] = ()
        self.equal_bits = True
        self.operations, self.row_tiles = operations, row_tiles_of(device.capability)
        self._stacks = [_stacks_of(layer) for layer in description.layers]
        self._head = head_stack(description.head)
        self.tables = StepTables(device, sizes, description)
        self.sampling: StepSampling | None = None
        if description.vocabulary <= LARGEST_VOCABULARY:
            self.sampling = StepSampling(device, SamplingSizes(sizes.samples, description.vocabulary), self.tables.asks)
        self.chooses, self.most_asks = self.sampling is not None, sizes.samples
        self.angles = self._known_angles()
        self._with_logits = 0  # rows of the last `forward`
        self._take_memory()

    def _known_angles(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """cos and sin of every position that a sequence can have, by table."""
        positions = min(self.sizes.blocks, self.cache.num_blocks) * BLOCK_SIZE
        for table in self.description.angles:
            table.know(positions)
        put = self.device.put
        return [(put(table.cos[:positions]), put(table.sin[:positions])) for table in self.description.angles]

    def _take_memory(self) -> None:
        of, rows, samples, device = self.description, self.sizes.rows, self.sizes.samples, self.device
        act, fp32 = self.activations, torch.float32
        widest = max(max(s.qkv.outputs, s.gate_up.outputs) for s in self._stacks)
        inner, queries = max(s.down.inputs for s in self._stacks), of.heads * of.head_dim
        self._tokens = device.scratch((rows,), torch.int32)
        self._x, self._part = (device.scratch((rows, of.hidden), fp32) for _ in range(2))
        self._n = device.scratch((rows, of.hidden), act)
        changes = ChangeSizes.of(samples if self.sampling else 0, of.vocabulary)
        wide = max(rows * widest, changes.rows * of.vocabulary * 2)
        self._wide, self._gated = device.scratch((wide,), act), device.scratch((rows * inner,), act)
        self._changes: StepChanges | None = None
        if self.sampling is not None:  # what is changed between two steps lies where both of them work
            changed = _dense(self._wide, changes.rows, 2 * of.vocabulary).view(fp32)
            # for all rows of a step, and the first of the next
            self._changes = StepChanges(device, changes, changed, staged=-(-samples // MOST_CHANGES) + 1)
            self._of_changed = self.sampling.beside(self._changes.tables.asks)
        self._q, self._attended = (device.scratch((rows, queries), act) for _ in range(2))
        self._sampled_x = device.scratch((samples, of.hidden), fp32)
        self._sampled = device.scratch((samples, queries), act)
        self.logits = device.scratch((samples, of.vocabulary), fp32)
        together = min(rows, PRODUCT_ROWS)
        products = self._all_stacks
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

    @property
    def replaced(self) -> tuple[str, ...]:
        """As `WholeStep` has it."""
        return self.operations.replaced

    @property
    def activations(self) -> torch.dtype:
        """What lies between kernels."""
        return self.cache.k[0].dtype

    @property
    def products(self) -> list[tuple[str, Stack, torch.dtype]]:
        """All of a step, each with the name of its layers and the dtype of its results; the output head is the last."""
        found = []
        for layer in self._stacks:
            for name, stack in (("q, k, v", layer.qkv), ("gate, up", layer.gate_up)):
                found.append((name, stack, self._wide.dtype))
            for name, stack in (("o", layer.o), ("down", layer.down)):
                found.append((name, stack, self._part.dtype))
        return [*found, ("the output head", self._head, self.logits.dtype)]

    @property
    def targets(self) -> list[LoraTarget]:
        """The adapters' memory of all layers that adapters can target, in the order of the layers."""
        return [target for stack in self._all_stacks for target in stack.targets]

    @property
    def _all_stacks(self) -> list[Stack]:
        """In the order of the layers, the output head last."""
        return [*(stack for s in self._stacks for stack in (s.qkv, s.o, s.gate_up, s.down)), self._head]

    def start(
        self,
        tokens: Sequence[int],
        heads: Sequence[int],
        step: AttentionStep,
        lora: LoraRows | None,
        head: LoraRows | None,
        asks: Sequence[Ask],
        changed: Callable[[], Sequence[ChangedAsk]] | None = None,
    ) -> StepAnswers:
        """Starts a step that chooses tokens; what they are is told by the answers, when they are read.

        Args:
            tokens: as for `forward`; -(1 + i) is the token that ask i of the step that was started before chooses,
                whether or not its answers were read.
            heads, step, lora, head: as for `forward`.
            asks: of rows that count in `heads`, at most sizes.samples. `Ask.row` is the place in `heads`.
            changed: as `ChoosingStep.start` has it.
        Raises:
            ValueError: the step is larger than the tables, or a token is none that a step chooses.
            SamplingError: something that cannot be asked; or `sampling` is None.
        """
        if self.sampling is None:
            raise SamplingError(
                f"a vocabulary of {self.description.vocabulary} tokens is sampled on the host: use `forward`"
            )
        if asks and not 0 <= min(ask.row for ask in asks) <= max(ask.row for ask in asks) < len(heads):
            raise SamplingError(f"something is asked of a row that is none of the {len(heads)} with logits")
        self._fill_and_run(tokens, heads, step, lora, head, asks)
        if changed is not None:
            self._choose_changed(self.sampling, asks, changed())
        return self.sampling.hand_over(len(asks))

    @torch.inference_mode()
    def _choose_changed(self, sampling: StepSampling, asks: Sequence[Ask], changed: Sequence[ChangedAsk]) -> None:
        """Behind a step that has answered `asks`. Raises SamplingError."""
        assert self._changes is not None
        if any(asks[one.ask].row != one.change.row for one in changed):
            raise SamplingError("a token is chosen from another row than the one that its ask is about")
        self._changes.choose(self.operations, self._of_changed, sampling.tables, self.logits, changed)

    def forward(
        self,
        tokens: Sequence[int],
        heads: Sequence[int],
        step: AttentionStep,
        lora: LoraRows | None,
        head: LoraRows | None,
        *,
        states: int = 0,
        own: StepTokens | None = None,
    ) -> torch.Tensor:
        """Logits [len(heads) - states, vocabulary] fp32, a view; keys and values of all rows are in the cache
        afterwards. Logits of the last `states` rows are computed too: that leaves graphs as they are.

        Args:
            tokens: the token of each row; -(1 + i) is the one that ask i of the last `start` chose.
            heads: the rows, in order, whose logits are wanted.
            step: its block tables in host memory.
            lora, head: adapters of all rows, and of the rows in `heads`.
            states: as `WholeStep.forward` has it.
            own: as `WholeStep.forward` has it; such a step is no graph.
        """
        logits = self._fill_and_run(tokens, heads, step, lora, head, (), own)
        self._with_logits = len(heads) - states
        return logits[: self._with_logits]

    def states(self, count: int) -> torch.Tensor:
        """As `WholeStep.states` says."""
        return self.device.take(self._n[self._with_logits : self._with_logits + count].float())

    @torch.inference_mode()
    def answer(self, logits: torch.Tensor, asks: Sequence[Ask]) -> npt.NDArray[np.void]:
        """What a step of `start` would answer to these, about logits that `forward` gave; waits for it.

        Args:
            logits: [rows, vocabulary], what `forward` returned.
            asks: at most sizes.samples.
        Raises:
            SamplingError: something that cannot be asked; or `sampling` is None.
        """
        if self.sampling is None:
            raise SamplingError(f"a vocabulary of {self.description.vocabulary} tokens is sampled on the host")
        self.tables.fill_asks(asks)
        self.operations.sample(self._launch, self.sampling.tables, logits, len(asks))
        return self.sampling.hand_over(len(asks)).read()

    @torch.inference_mode()
    def changed(self, logits: torch.Tensor, changes: Sequence[RowChange]) -> torch.Tensor:
        """As `ChoosingStep.changed`. Raises SamplingError: too many changes; or `sampling` is None."""
        if self._changes is None:
            raise SamplingError(f"a vocabulary of {self.description.vocabulary} tokens is sampled on the host")
        return self._changes.run(self.operations.change, logits, changes)

    def _fill_and_run(
        self,
        tokens: Sequence[int],
        heads: Sequence[int],
        step: AttentionStep,
        lora: LoraRows | None,
        head: LoraRows | None,
        asks: Sequence[Ask],
        own: StepTokens | None = None,
    ) -> torch.Tensor:
        """The logits, in rows that count and some behind them."""
        if own is not None:
            tokens = OwnRowsOfStep.known(tokens, own)
        known = self.sampling.asked if self.sampling else 0
        if min(tokens) < -known:
            raise ValueError(f"token {min(tokens)} is of ask {-1 - min(tokens)}, and the step before had {known} asks")
        shape = self.tables.shape(tokens, heads, step, lora, len(asks))
        if self.graphs is not None and own is None:
            shape = self.graphs.shape_for(shape)
        self.tables.fill(tokens, heads, step, lora, head, asks, shape)
        if own is not None:
            return self.run(shape, OwnRowsOfStep(self.device, own, shape.samples))
        if self.graphs is None or not self.graphs.run(shape):
            self.run(shape)
        return self.logits

    def run(self, shape: StepShape, own: OwnRowsOfStep | None = None) -> torch.Tensor:
        """Launches a step of this shape on what the tables hold. Can be captured where nothing is `own`.

        Returns the logits; with what adapters have of their own for tokens they lie elsewhere.
        """
        of, launch, rows = self.description, self._launch, shape.rows
        x, tokens = self._x[:rows], self.tables.tokens[:rows]
        assert of.embedding is not None
        if self.sampling is not None:
            self.operations.resolve_tokens(launch, self._tokens[:rows], tokens, self.sampling.tables.chosen)
            tokens = self._tokens[:rows]
        self.operations.embed(launch, x, tokens, of.embedding, of.embedding_factor)
        if own is not None:
            own.embed(self.operations, x, tokens, of.embedding, of.embedding_factor)
        part: torch.Tensor | None = None
        after: RMSNorm | None = None
        for index, layer in enumerate(of.layers):
            last = index + 1 == len(of.layers)
            n = self._normed(x, part, after, layer.before_attention)
            self._attend(index, layer, n, shape)
            attended = self._attended[:rows]
            if last:
                if shape.samples == 0:
                    return self.logits
                x, attended = self._only_sampled(x, attended, shape.samples)
            part = self._part[: len(x)]
            tables = (self.tables.head_lora if last else self.tables.lora) if shape.lora else None
            stacks = self._stacks[index]
            self._product(part, attended, stacks.o, tables)
            n = self._normed(x, part, layer.after_attention, layer.before_mlp)
            wide = _dense(self._wide, len(x), stacks.gate_up.outputs)
            self._product(wide, n, stacks.gate_up, tables)
            gated = _dense(self._gated, len(x), stacks.down.inputs)
            self.operations.gate(launch, gated, wide, gelu=layer.gelu)
            self._product(part, gated, stacks.down, tables)
            after = layer.after_mlp
        n = self._normed(x, part, after, of.norm)
        logits = self.logits[: shape.samples]
        self._product(logits, n, self._head, self.tables.head_lora if shape.lora else None)
        factors = {"divisor": of.logit_divisor, "softcap": of.logit_softcap}
        if own is not None:
            return own.add(self.operations, logits, n, self.row_tiles, **factors)
        self.operations.finish_logits(launch, logits, **factors)
        if shape.asks and self.sampling is not None:
            self.operations.sample(launch, self.sampling.tables, logits, shape.asks)
        return logits

    def _normed(
        self, x: torch.Tensor, part: torch.Tensor | None, after: RMSNorm | None, norm: RMSNorm | None
    ) -> torch.Tensor:
        n = self._n[: len(x)]
        self.operations.add_norm(
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
        cos, sin = self.angles[layer.rotary] if layer.rotary >= 0 else (None, None)
        k, v = self.cache.k[index], self.cache.v[index]
        self.operations.rotate_and_write(
            self._launch,
            *(self._q[: shape.rows], qkv, cos, sin, k, v, self.tables.attention),
            q_norm=layer.q_norm,
            k_norm=layer.k_norm,
        )
        self.operations.attend(
            self._launch,
            *(self._attended[: shape.rows], self._q[: shape.rows], k, v, self.tables.attention),
            *(layer.asked, self._attention),
            large_tiles=shape.prompts,
        )

    def _only_sampled(self, x: torch.Tensor, attended: torch.Tensor, samples: int) -> tuple[torch.Tensor, torch.Tensor]:
        to = self._sampled_x[:samples], self._sampled[:samples]
        for wanted, all_rows in zip(to, (x, attended), strict=True):
            self.operations.gather_rows(self._launch, wanted, all_rows, self.tables.sampled[:samples])
        return to

    def _product(self, y: torch.Tensor, x: torch.Tensor, stack: Stack, tables: LoraTables | None) -> None:
        """y = x @ stack.T + bias, + the adapters' deltas; by PRODUCT_ROWS rows, which changes no bit."""
        of, launch, sums, tiles = self.operations, self._launch, self._sums, self.row_tiles
        for first in range(0, len(x), PRODUCT_ROWS):
            some = slice(first, first + PRODUCT_ROWS)
            if isinstance(stack.weights, Nf4Weights):
                of.nf4_product(launch, y[some], x[some], stack.weights, sums, bias=stack.bias, row_tiles=tiles)
            else:
                of.dense_product(launch, y[some], x[some], stack.weights, sums, row_tiles=tiles)
        if tables is not None and stack.targets:
            of.add_lora(launch, y, x, stack.targets, tables, self._deltas)


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
