"""Steps whose shapes repeat, captured once as graphs of the device and replayed: one launch in place of thousands.

A decode step feeds one token of each sequence, so its shapes follow from the number of sequences, rounded up to a power
of two, and the ranks of their adapters. What differs from step to step is copied into tensors that the graph reads;
rows up to the rounded number repeat the last one, and nobody looks at their logits. Other steps run as they are. So
does a shape that has not come often yet. The first replay of a shape, the second, fourth, eighth and so on are
compared with the plain step, so a value that a graph remembers from its capture shows; if they do not agree, no graph
is used any more.

They need attention that reads block tables: the library's does so with blocks of 16 tokens only on devices with
FlashAttention 3 or 4, where that is installed and activated.

`Device.capture` is the mechanism; on CUDA it is https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs. All
bookkeeping is tested on the CPU, with a capture that does the same operations again on the same tensors.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from loramux_adapters.device.device import Replay
from loramux_adapters.lora.ops import LoraRows
from loramux_server.engine.scheduling.sequence import Batch, ScheduledSequence
from loramux_server.kernels.attention.kv_cache import BLOCK_SIZE, KVCache
from loramux_server.kernels.attention.paged_attention import AttentionStep
from loramux_server.kernels.attention.varlen_attention import Lengths, VarlenAttend
from loramux_server.kernels.choice import GraphKernels
from loramux_server.kernels.grouped_lora import Part

logger = logging.getLogger(__name__)

OFTEN = 16  # steps of a shape before it is captured, which takes some hundred milliseconds
MOST = 32  # shapes that are captured: a graph stays, since others may read what libraries keep in its memory
_MOST_BLOCKS = 512  # of a sequence's table: longer sequences run as they are
_TOLERANCE = 0.05  # root mean square difference of the logits, as a share of their spread, where bits may differ

# Runs a step and gives what runs it again on the same tensors, and the tensor that holds its logits each time.
Capture = Callable[[Callable[[], torch.Tensor]], tuple[Replay, torch.Tensor]]
# (input ids [1, rows], position ids [1, rows], sampled rows [rows], step, adapters of all rows and of the sampled ones)
# -> logits [rows, vocabulary]
StepForward = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, AttentionStep, LoraRows | None, LoraRows | None], torch.Tensor
]


@dataclass(frozen=True, slots=True)
class Shape:
    """What a step's tensors have their sizes by: rows, a power of two, and the ranks of the slots in use."""

    rows: int
    ranks: tuple[int, ...]


class Inputs:
    """The tensors that a captured step of one shape reads."""

    def __init__(self, shape: Shape, cache: KVCache, attend: VarlenAttend, arena_rows: int) -> None:
        device, rows = cache.device, shape.rows
        width = min(_MOST_BLOCKS, cache.num_blocks)
        each = device.put(torch.arange(rows + 1, dtype=torch.int32))
        self.tokens = device.reserve((1, rows), torch.int64)
        self.positions = device.reserve((1, rows), torch.int64)
        self.sampled = device.put(torch.arange(rows))
        self.lengths = Lengths(
            rows=each,
            keys=device.reserve((rows + 1,), torch.int32),
            used=device.reserve((rows,), torch.int32),
            most_rows=1,
            most_keys=width * BLOCK_SIZE,
            places=device.reserve((0,), torch.int64),
        )
        self.step = AttentionStep(
            cache=cache,
            attend=attend,
            tables=device.reserve((rows, width), torch.int32),
            sequence=each[:-1],
            position=device.reserve((rows,), torch.int32),
            runs=(),
        )
        self.parts = [Part.empty(rank, rows, arena_rows, device) for rank in shape.ranks]

    def fill(self, rows: list[ScheduledSequence], lora: LoraRows | None) -> None:
        """`rows`: as many as the shape has. `lora`: their adapters."""
        positions = np.array([row.sequence.num_computed for row in rows])
        tables = np.zeros(tuple(self.step.tables.shape), dtype=np.int32)
        for index, row in enumerate(rows):
            tables[index, : len(row.sequence.blocks)] = row.sequence.blocks
        tokens = [row.sequence.tokens_from(row.sequence.num_computed, 1)[0] for row in rows]
        for tensor, values in (
            (self.tokens, np.array([tokens])),
            (self.positions, positions[None]),
            (self.step.position, positions),
            (self.step.tables, tables),
            (self.lengths.used, positions + 1),
            (self.lengths.keys, np.concatenate([[0], np.cumsum(positions + 1)])),
        ):
            tensor.copy_(torch.from_numpy(values))
        for part in self.parts:
            assert lora is not None
            part.fill(lora)


@dataclass(slots=True)
class Captured:
    """A captured step: what it reads, what runs it, and where its logits lie."""

    inputs: Inputs
    replay: Replay
    logits: torch.Tensor
    replays: int = 0

    @property
    def on_trial(self) -> bool:
        """Whether the coming replay is compared with the plain step: ever more rarely, but for ever."""
        return self.replays & (self.replays - 1) == 0


class StepGraphs:
    """Captured steps of one model. Owner: the engine thread.

    Attributes:
        exact: replays must give the bits of plain steps; for devices on which the check at start found that a reply has
            the same bits in any batch.
        replays: steps that were replayed.
    """

    def __init__(
        self,
        forward: StepForward,
        cache: KVCache,
        kernels: GraphKernels,
        rows: int,
        capture: Capture,
    ) -> None:
        """`rows`: of the adapters' arenas."""
        self._forward = forward
        self._cache = cache
        self._attend, self._add_lora = kernels
        self._rows = rows
        self._capture = capture
        self._seen: Counter[Shape] = Counter()
        self._captured: dict[Shape, Captured] = {}
        self._works = True
        self.exact = False
        self.replays = 0

    def run(self, batch: Batch, plain: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Logits of a batch: those of a captured step if there is one for it, else those that `plain` computes."""
        shape = shape_of(batch, self._cache) if self._works else None
        if shape is None:
            return plain()
        self._seen[shape] += 1
        if shape not in self._captured and (self._seen[shape] < OFTEN or len(self._captured) == MOST):
            return plain()
        try:
            rows, lora = _padded(batch, shape.rows)
            captured = self._captured.get(shape) or self._add(shape, rows, lora)
            on_trial = captured.on_trial
            logits = self._replay(captured, rows, lora)[: len(batch.rows)].clone()
        except Exception as error:  # whatever the library says of a step that it cannot capture
            self._give_up(f"{shape} cannot be captured: {error}")
            return plain()
        if not on_trial:
            return logits
        expected = plain()  # after the replay, so that the keys and values that stay are its
        if not _agree(logits, expected, exact=self.exact):
            self._give_up(f"{shape} gives other logits when it is replayed")
        return expected

    def _add(self, shape: Shape, rows: list[ScheduledSequence], lora: LoraRows | None) -> Captured:
        inputs = Inputs(shape, self._cache, self._attend, self._rows)
        inputs.fill(rows, lora)  # a capture runs the step, which writes to the blocks that it is told
        captured = Captured(inputs, *self._capture(lambda: self._step(inputs, lora)))
        self._captured[shape] = captured
        return captured

    def _replay(self, captured: Captured, rows: list[ScheduledSequence], lora: LoraRows | None) -> torch.Tensor:
        captured.inputs.fill(rows, lora)
        captured.replay()
        captured.replays += 1
        self.replays += 1
        return captured.logits

    def _step(self, inputs: Inputs, lora: LoraRows | None) -> torch.Tensor:
        self._attend.expect(inputs.step, inputs.lengths)
        if lora is not None:
            self._add_lora.expect(lora, [inputs.parts])
        return self._forward(inputs.tokens, inputs.positions, inputs.sampled, inputs.step, lora, lora)

    def _give_up(self, reason: str) -> None:
        logger.warning("steps run without graphs from now on: %s", reason)
        self._works = False
        self._captured.clear()


def _padded(batch: Batch, count: int) -> tuple[list[ScheduledSequence], LoraRows | None]:
    """The rows of a batch, the last one repeated up to `count`, and their adapters."""
    rows = batch.rows + batch.rows[-1:] * (count - len(batch.rows))
    return rows, LoraRows.build([(row.sequence.slots, 1) for row in rows])


def _agree(logits: torch.Tensor, expected: torch.Tensor, *, exact: bool) -> bool:
    """Row by row. Rows that are not finite say nothing: they have failed already, alone."""
    finite = expected.isfinite().all(-1)
    logits, expected = logits[finite].float(), expected[finite].float()
    if exact:
        return torch.equal(logits, expected)
    difference = (logits - expected).square().mean(-1).sqrt() / expected.std(-1)
    return bool((difference <= _TOLERANCE).all())


def shape_of(batch: Batch, cache: KVCache) -> Shape | None:
    """None for a step that is not captured: one that feeds more than a token of a sequence, does not sample each, has
    several adapters for one, or has a sequence of more blocks than a captured step knows.
    """
    most = min(_MOST_BLOCKS, cache.num_blocks)
    ranks: set[int] = set()
    for row in batch.rows:
        slots = row.sequence.slots
        if row.num_tokens != 1 or not row.samples or len(slots) > 1 or len(row.sequence.blocks) > most:
            return None
        ranks.update(entry.slot.rank for entry in slots)
    return Shape(1 << (len(batch.rows) - 1).bit_length(), tuple(sorted(ranks)))
