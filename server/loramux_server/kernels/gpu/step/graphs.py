"""Steps as graphs of the device: hundreds of launches become one, whatever the steps hold.

A graph is the launches of one shape (`StepShape`): so many rows, all sampled, without adapters, with them, or with
them and prompts. A step takes the smallest one that has room for it; what it leaves over does nothing (`StepTables`).
What has more rows than steps of one row a sequence ever have runs as launches: a device is busy with it for longer
than the host needs to start them.

All memory is taken before graphs are captured, and none in between: what differs from step to step lies in tensors that
never move. Before a graph is used, a step that it was not captured with is run as launches and by the graph; if a bit
of its logits or answers differs, no graph is used at all.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from loramux_adapters.device.device import Replay
from loramux_adapters.errors import CannotCapture, DeviceFull
from loramux_adapters.lora.ops import HAS_AFFINE, HAS_DELTA, LoraRows
from loramux_adapters.lora.slots import SMALLEST_RANK, ScaledSlot, Slot
from loramux_server.kernels.attention.kv_cache import BLOCK_SIZE
from loramux_server.kernels.attention.paged_attention import AttentionStep, attend_reference
from loramux_server.kernels.compiled.sampling import Draw
from loramux_server.kernels.decoder.asks import Ask
from loramux_server.kernels.gpu.step.decoder import GpuDecoder
from loramux_server.kernels.gpu.step.tables import StepShape

_FAR = 64  # blocks of the longest sequence that graphs are compared on
_WEIGHTS = 2.0**-6, 2.0**-7  # what A and B of the adapters that they are compared with are full of
_GAIN_AND_SHIFT = 2.0**-5  # and their gains and shifts, where they may have some
_MIB = 2**20


def row_counts(largest: int, tile: int) -> list[int]:
    """For how many rows there are graphs, the fewest first; the last is for `largest`.

    Powers of two up to `tile`, the rows of a product's largest tile, for its tiles have these sizes: between two of
    them only what is small beside the products grows with the rows. Then its multiples, as a further tile reads all
    weights again; beyond eight of them every fourth, where a step takes long and the waste is a third at most.
    """
    counts = [1 << power for power in range(tile.bit_length())]
    counts += [tile * factor for factor in range(2, 9)]
    counts += range(12 * tile, largest, 4 * tile)
    return [*(count for count in counts if count < largest), largest]


class StepGraphs:
    """The graphs of a decoder. Owner: the engine thread.

    Attributes:
        shapes: that there are graphs of: those of steps without prompts first, and the largest first.
        left_out: shapes without one, whose steps take a larger one or run as launches.
        why_left_out: why there are some, for people; "" where there are none.
        held: bytes of the device that all of them take.
        seconds: that capturing took.
        equal_bits: a step gave the same bits in all shapes that it was compared in, with more rows and with fewer.
    """

    def __init__(self, decoder: GpuDecoder) -> None:
        self._decoder = decoder
        self._graphs: dict[StepShape, Replay] = {}
        self._counts: dict[_Kind, list[int]] = {}
        self.left_out: list[StepShape] = []
        self.why_left_out = ""
        self.held = 0
        self.seconds = 0.0
        self.equal_bits = True

    @property
    def shapes(self) -> list[StepShape]:
        return list(self._graphs)

    def shape_for(self, shape: StepShape) -> StepShape:
        """The smallest captured shape that holds a step of this one; this one itself where there is none."""
        if shape.samples:
            needed = max(shape.rows, shape.samples, shape.asks)
            held_by = []
            for kind, counts in self._counts.items():
                if kind.prompts >= shape.prompts and kind.lora >= shape.lora:
                    held_by += [(count, *kind) for count in counts[bisect_left(counts, needed) :][:1]]
            if held_by:
                count, *best = min(held_by)
                return self._shape(count, _Kind(*best))
        return shape

    def run(self, shape: StepShape) -> bool:
        """Replays the graph of a captured shape; False: it is none."""
        replay = self._graphs.get(shape)
        if replay is None:
            return False
        replay()
        return True

    def report(self) -> str:
        """For people, in one line."""
        if not self._graphs:
            return f"steps are no graphs: {self.why_left_out}"
        done = (
            f"steps of up to {self.shapes[0].rows} rows are graphs ({len(self.shapes)}, {self.held / _MIB:,.0f} MiB, "
            f"{self.seconds:.1f} s)"
        )
        if not self.equal_bits:
            done += ", in which a row's last bits depend on how many rows are beside it"
        if not self.left_out:
            return done
        return f"{done}; none for {', '.join(map(_in_words, self.left_out))}: {self.why_left_out}"

    @torch.inference_mode()
    def capture(self, progress: Callable[[str], None], budget: int) -> None:
        """Captures as many as there are shapes and the device takes; the decoder uses them from then on, and goes on
        without those that there are not: `why_left_out`.

        Call it when all memory is taken, no sequence holds `decoder.spare_block`, no step is under way and no adapter
        is loaded: the first arena rows and the block are written to.

        Args:
            progress: told a line after each.
            budget: bytes of the device that they may take together; 0: there are to be none.
        Raises:
            ValueError: the decoder has no spare block, or there are adapters in its first slots.
        """
        wanted = self._wanted()
        with self._decoder.device.used():
            try:
                self._capture(wanted, progress, budget)
            except _Remembers as reason:
                self._graphs.clear()
                self.held = 0
                self.why_left_out = str(reason)
            except (CannotCapture, DeviceFull, _BudgetSpent) as reason:
                self.why_left_out = str(reason)
        self.left_out = [shape for shape in wanted if shape not in self._graphs]
        self._counts = {}
        for shape in reversed(self.shapes):
            self._counts.setdefault(_Kind(shape.prompts, shape.lora), []).append(shape.rows)
        self._decoder.graphs = self if self._graphs else None

    def _capture(self, wanted: list[StepShape], progress: Callable[[str], None], budget: int) -> None:
        if not budget:
            raise _BudgetSpent("no memory is set apart for them")
        started = time.perf_counter()
        trials = _Trials(self._decoder)
        trials.load_adapters()
        try:
            for shape in wanted:
                fewer = max((other.rows for other in wanted if other.rows < shape.rows), default=0)
                self._add(shape, trials, fewer + 1, budget)
                self.seconds = time.perf_counter() - started
                progress(
                    f"steps of {_in_words(shape)} are a graph: "
                    f"{len(self._graphs)} of {len(wanted)}, {self.held / _MIB:,.0f} MiB, {self.seconds:.1f} s"
                )
        finally:
            trials.unload_adapters()

    def _wanted(self) -> list[StepShape]:
        sizes = self._decoder.sizes
        counts = row_counts(min(sizes.rows, sizes.samples, sizes.sequences), self._decoder.row_tiles[-1])
        tiles = self._decoder.tables.attention.sizes
        fewest = tiles.large_rows if tiles.tensor_cores else counts[-1] + 1  # rows that are a prompt to the attention
        adapters = (True, False) if self._decoder.targets else (False,)
        wanted = [self._shape(count, _Kind(fewest <= 1, lora)) for count in reversed(counts) for lora in adapters]
        if fewest > 1:
            wanted += [self._shape(count, _Kind(True, adapters[0])) for count in reversed(counts) if count >= fewest]
        return wanted

    def _shape(self, count: int, kind: _Kind) -> StepShape:
        return StepShape(count, count, kind.lora, kind.prompts, count if self._decoder.sampling else 0)

    def _add(self, shape: StepShape, trials: _Trials, fewest: int, budget: int) -> None:
        """`fewest`: rows of a step that needs this shape."""
        decoder, device = self._decoder, self._decoder.device
        before = device.memory()
        trials.fill(shape, shape.rows, seed=0)
        replay, _ = device.capture(lambda: decoder.run(shape))
        after = device.memory()
        # a driver's own memory for a graph is none that PyTorch holds, but it is free no more
        took = max(after.held - before.held, before.free - after.free, 0)
        if self.held + took > budget:
            raise _BudgetSpent(
                f"{took / _MIB:,.1f} MiB more are beyond the {budget / _MIB:,.1f} MiB that graphs may take"
            )
        self.equal_bits &= trials.agree(shape, replay, fewest)
        self.held += took
        self._graphs[shape] = replay


class _Kind(NamedTuple):
    """Of steps; the fewer of them, the less a step costs that needs neither."""

    prompts: bool
    lora: bool


def _in_words(shape: StepShape) -> str:
    more = [name for name, there in (("adapters", shape.lora), ("prompts", shape.prompts)) if there]
    return f"{shape.rows} row{'s' if shape.rows > 1 else ''}{' with ' if more else ''}{' and '.join(more)}"


class _BudgetSpent(Exception):
    """One more graph takes more memory than there is for them."""


class _Remembers(Exception):
    """A graph gives other bits than launches; the text says so."""


@dataclass(slots=True)
class _Told:
    """What a step left behind, in host memory."""

    logits: torch.Tensor
    answers: torch.Tensor | None

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, _Told)
        pairs = ((self.logits.view(torch.int32), other.logits.view(torch.int32)), (self.answers, other.answers))
        return all(a is None or b is None or torch.equal(a, b) for a, b in pairs)


class _Trials:
    """Steps to capture and to compare with, all in one block of the cache.

    Row r stands in slot r % BLOCK_SIZE of the block, at one position of those whose keys lie in this slot when all
    blocks of a sequence are the same one. Rows of a slot have the same token, position and adapters, so they write the
    same keys and values at the same time, and every row sees keys that are the same each time, near ones and far ones.
    In steps with prompts the rows of a block are one.
    """

    def __init__(self, decoder: GpuDecoder) -> None:
        """Raises ValueError: there is no block for it."""
        if decoder.spare_block is None:
            raise ValueError("a decoder without a spare block has no place for the first runs of its graphs")
        self._decoder, self._device = decoder, decoder.device
        self._blocks = min(decoder.sizes.blocks, decoder.cache.num_blocks, _FAR)
        self._table = torch.full((1, self._blocks), decoder.spare_block, dtype=torch.int32)
        self._none = torch.zeros(0, dtype=torch.int32)
        self._before: torch.Tensor | None = None
        if decoder.sampling is not None:
            answers = decoder.sampling.tables.answers
            self._before = decoder.device.scratch(tuple(answers.shape), answers.dtype)
        self._slots = self._adapters()

    def _adapters(self) -> list[tuple[ScaledSlot, ...]]:
        sizes, first = self._decoder.sizes, Slot(0, SMALLEST_RANK)
        kinds: list[tuple[ScaledSlot, ...]] = [(ScaledSlot(first),), (), (ScaledSlot(first, 0.5),)]
        arena_rows = min((len(target.arena.a) for target in self._decoder.targets), default=0)
        if sizes.entries > 1 and sizes.ranks >= 32 and arena_rows >= 2 * SMALLEST_RANK:
            kinds.append((ScaledSlot(first), ScaledSlot(Slot(SMALLEST_RANK, SMALLEST_RANK), -0.5)))
        return kinds

    def load_adapters(self) -> None:
        """Raises ValueError: there are some."""
        arenas = [target.arena for target in self._decoder.targets]
        if any(self._device.take(arena.targeted[:2]).any() for arena in arenas):
            raise ValueError("graphs are captured before the first adapter is loaded, and there are some")
        for arena in arenas:
            for weights, value in zip((arena.a, arena.bt), _WEIGHTS, strict=True):
                self._device.fill(weights[: 2 * SMALLEST_RANK], value)
            has = HAS_DELTA
            if arena.affine is not None:
                self._device.fill(arena.affine[:2], _GAIN_AND_SHIFT)
                has |= HAS_AFFINE
            self._device.fill(arena.targeted[:2], has)

    def unload_adapters(self) -> None:
        """Leaves zeros, as they were."""
        for target in self._decoder.targets:
            for weights in (target.arena.a, target.arena.bt):
                self._device.fill(weights[: 2 * SMALLEST_RANK], 0.0)
            if target.arena.affine is not None:
                self._device.fill(target.arena.affine[:2], 0.0)
            self._device.fill(target.arena.targeted[:2], 0)

    def fill(self, shape: StepShape, rows: int, *, seed: int, asked: int = 0) -> None:
        """A step of so many rows for this shape. `asked`: how many asks the step before had, whose tokens are fed."""
        slots = [row % BLOCK_SIZE for row in range(rows)]
        far = [(slot * 7 + seed) % BLOCK_SIZE * (self._blocks - 1) // (BLOCK_SIZE - 1) for slot in range(BLOCK_SIZE)]
        runs = [(0, row, 1, slot + far[slot] * BLOCK_SIZE) for row, slot in enumerate(slots)]
        if shape.prompts:  # as long as one block lets them be
            starts = range(0, rows, BLOCK_SIZE)
            runs = [(0, row, min(BLOCK_SIZE, rows - row), far[0] * BLOCK_SIZE) for row in starts]
        tokens = [(slot * 31 + seed * 17 + 1) % self._decoder.description.vocabulary for slot in slots]
        tokens = [-1 - slot if slot % 2 and slot < asked else token for slot, token in zip(slots, tokens, strict=True)]
        lora = None
        if shape.lora:
            lora = LoraRows.build([(self._slots[(slot + seed) % len(self._slots)], 1) for slot in slots])
        asks = [self._ask(row, seed) for row in range(rows)] if shape.asks else []
        step = AttentionStep(self._decoder.cache, attend_reference, self._table, self._none, self._none, tuple(runs))
        self._decoder.tables.fill(tokens, range(rows), step, lora, lora, asks, shape)

    def _ask(self, row: int, seed: int) -> Ask:
        number = (row * 37 + seed * 11) % 100 / 100
        return (
            Ask(row),
            Ask(row, Draw(row, number, temperature=0.8, top_p=0.9)),
            Ask(row, top=5),
            Ask(row, Draw(row, number, top_k=50, min_p=0.01), top=0),
        )[(row + seed) % 4]

    def agree(self, shape: StepShape, replay: Replay, rows: int) -> bool:
        """Whether a step of so many rows, as many as the shape has or fewer, has the same bits in a shape of its own.

        It is another one than the one that ran last, which the graph was captured with.

        Raises:
            _Remembers: the graph gives other bits than launches of its shape.
        """
        if self._before is not None and self._decoder.sampling is not None:
            self._device.copy(self._before, self._decoder.sampling.tables.answers)
        self.fill(shape, rows, seed=1, asked=shape.asks)
        own = StepShape(rows, rows, shape.lora, shape.prompts, rows if shape.asks else 0)
        launched, replayed = self._told(lambda: self._decoder.run(shape), rows), self._told(replay, rows)
        if launched != replayed:
            raise _Remembers(
                f"the graph of {_in_words(shape)} gave other logits or answers "
                "than the same kernels one by one: this device or its driver is not to be trusted with graphs"
            )
        return own == shape or self._told(lambda: self._decoder.run(own), rows) == launched

    def _told(self, run: Callable[[], object], rows: int) -> _Told:
        """After the step that the tables hold, with the answers before it as they were."""
        sampling = self._decoder.sampling
        if sampling is not None and self._before is not None:
            self._device.copy(sampling.tables.answers, self._before)
        self._device.fill(self._decoder.logits[:rows], float("nan"))
        run()
        answers = None if sampling is None else self._device.take(sampling.tables.answers[:rows])
        return _Told(self._device.take(self._decoder.logits[:rows]), answers)
