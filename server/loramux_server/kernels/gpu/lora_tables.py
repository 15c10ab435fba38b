"""What the LoRA kernels are told of one step: which rows use which adapters, and how the work is cut.

All of it is one tensor of int32 on the device whose parts lie at fixed places, so that a captured graph may hold them.
A step writes its numbers into an array of the host's and copies the front of it, as far as it is used, in one go.

Rows that use the same adapters with the same factors in the same order are a run, wherever they lie in the step. A run
is cut into blocks of at most 16 rows, each adapter into tiles of 16 ranks. The first kernel goes over tiles, the second
one over blocks. The first one's result, h, has a unit of 16 numbers for each row and tile: the units of a tile lie
together, and so do the tiles of a block's entry.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from loramux_adapters.lora.ops import LoraRows, Segment
from loramux_adapters.lora.slots import SMALLEST_RANK, ScaledSlot
from loramux_server.kernels.gpu.cuts import lora_parts_of

BLOCK_ROWS = 16  # rows of a block, and ranks of a tile: the smallest product of the tensor cores
COUNTS = 4  # numbers: of tiles, of blocks, and two that are not used
BLOCK = 20  # numbers: 16 rows of the step (-1: none), how many there are, its entries [first, last), one not used
ENTRY = 4  # numbers: offset in the arena, rank, scale (the bits of fp32), first unit of h
TILE = 5  # numbers: row of the arena, ranks (8 or 16), block, first unit of h, place of its adapter in `targeted`

Ints = npt.NDArray[np.int32]
_Longs = npt.NDArray[np.int64]
_Runs = dict[tuple[ScaledSlot, ...], list[Segment]]


class LoraTablesFull(ValueError):
    """A step asks for more than its tables were made for; make them larger, or the step smaller."""


@dataclass(frozen=True, slots=True)
class LoraSizes:
    """How much a step may hold.

    Attributes:
        rows: token rows, those without an adapter included.
        runs: different tuples of (adapter, factor): at most as many as the step has sequences.
        entries: adapters of one row.
        ranks: arena rows that the adapters of one row hold together, each one's rounded up to 16.
    """

    rows: int
    runs: int
    entries: int
    ranks: int

    @property
    def blocks(self) -> int:
        """The most that rows can make: each run has one row too many for the blocks before."""
        runs = min(self.rows, self.runs)
        return runs + (self.rows - runs) // BLOCK_ROWS

    @property
    def tiles(self) -> int:
        return self.blocks * (self.ranks // BLOCK_ROWS)

    @property
    def units(self) -> int:
        """Of h, for each target and stored part of a sum; a multiple of 16, as Triton likes numbers."""
        return -(-self.rows * (self.ranks // BLOCK_ROWS) // 16) * 16

    def scratch(self, inputs: int, targets: int, *, is_split: bool) -> int:
        """Numbers of fp32 that lie between the two launches for `targets` layers of so many inputs."""
        return targets * self.units * (lora_parts_of(inputs)[1] if is_split else 1) * BLOCK_ROWS

    def spans(self) -> list[slice]:
        """Where in the tensor counts, blocks, entries and tiles lie; the tiles last, as a step rarely fills them."""
        ends = np.cumsum([COUNTS, self.blocks * BLOCK, self.blocks * self.entries * ENTRY, self.tiles * TILE]).tolist()
        return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]

    @property
    def numbers(self) -> int:
        """Of the whole tensor."""
        return int(self.spans()[-1].stop)


class LoraTables:
    """The tensor and its parts. Owner: the thread that runs the model.

    Attributes:
        tensor: [sizes.numbers] int32, on the device.
        counts, blocks, entries, tiles: parts of it, flat.
        programs: how many share the work of a launch: a few for each multiprocessor; it changes no bits.
        is_split: parts of a sum over the inputs are computed by different programs and meet in the second launch: right
            for few rows. False: one program computes all parts of a sum, one after the other, and adds them up in the
            same order. Bits are the same, scratch is smaller: right for many rows, which keep the programs busy.
        rows: token rows of the step that was filled last; a launch is for as many or more.
    """

    def __init__(self, sizes: LoraSizes, tensor: torch.Tensor, *, programs: int, is_split: bool = True) -> None:
        if tensor.dtype != torch.int32 or tensor.shape != (sizes.numbers,):
            raise ValueError(f"LoRA tables are {sizes.numbers} int32, not {tuple(tensor.shape)} {tensor.dtype}")
        self.sizes, self.tensor, self.programs, self.is_split = sizes, tensor, programs, is_split
        self._spans = sizes.spans()
        self.counts, self.blocks, self.entries, self.tiles = (tensor[span] for span in self._spans)
        self.rows = 0

    def fill(self, staging: Ints, rows: LoraRows | None) -> int:
        """Writes a step into `staging` [sizes.numbers] and says how many numbers, from the first on, are to be copied.

        None: no row has an adapter. Raises LoraTablesFull, and then leaves a step without adapters.
        """
        if staging.dtype != np.int32 or staging.shape != self.tensor.shape:
            raise ValueError(f"a staging array is {self.sizes.numbers} int32, not {staging.shape} {staging.dtype}")
        counts, blocks, entries, tiles = (staging[span] for span in self._spans)
        counts[:] = 0
        self.rows = 0
        if rows is None:
            return COUNTS
        runs: _Runs = {}
        for segment in rows.segments:
            runs.setdefault(segment.slots, []).append(segment)
        self._check(rows, runs)

        run, count, members = _cut(runs)
        block_table = blocks[: len(run) * BLOCK].reshape(-1, BLOCK)
        block_table[:, :BLOCK_ROWS] = members
        of_run = np.array([len(slots) for slots in runs])
        last = np.cumsum(of_run[run])
        _write(block_table[:, BLOCK_ROWS:], count, last - of_run[run], last)

        # Each block has entries of its own, as their h lies at places of its own.
        block, place = _spread(of_run[run])
        which = place + (np.cumsum(of_run) - of_run)[run][block]
        offset, rank, scale = (column[which] for column in _entries(runs))
        height = -(-rank // BLOCK_ROWS)  # in tiles
        units = height * count[block]
        unit = np.cumsum(units) - units
        _write(entries[: len(which) * ENTRY].reshape(-1, ENTRY), offset, rank, scale.view(np.int32), unit)

        entry, number = _spread(height)
        above = number * BLOCK_ROWS
        _write(
            tiles[: len(entry) * TILE].reshape(-1, TILE),
            offset[entry] + above,
            np.minimum(rank[entry] - above, BLOCK_ROWS),
            block[entry],
            unit[entry] + number * count[block[entry]],
            offset[entry] // SMALLEST_RANK,
        )
        counts[:2] = len(entry), len(run)
        self.rows = rows.num_rows
        return int(self._spans[-1].start) + len(entry) * TILE

    def _check(self, rows: LoraRows, runs: _Runs) -> None:
        tiles = max(sum(-(-entry.slot.rank // BLOCK_ROWS) for entry in slots) for slots in runs)
        for what, found, room in (
            ("token rows", rows.num_rows, self.sizes.rows),
            ("different sets of adapters", len(runs), self.sizes.runs),
            ("adapters in a row", max(map(len, runs)), self.sizes.entries),
            ("ranks in a row", tiles * BLOCK_ROWS, self.sizes.ranks),
        ):
            if found > room:
                raise LoraTablesFull(f"the step has {found} {what}, its tables hold {room}")


def _cut(runs: _Runs) -> tuple[_Longs, _Longs, _Longs]:
    """Of each block: its run, how many rows it has, and these rows [blocks, 16]."""
    total = np.array([sum(s.stop - s.start for s in segments) for segments in runs.values()])
    run, number = _spread(-(-total // BLOCK_ROWS))
    count = np.minimum(total[run] - number * BLOCK_ROWS, BLOCK_ROWS)
    members = np.full((len(run), BLOCK_ROWS), -1)
    rows = np.concatenate([np.arange(s.start, s.stop) for segments in runs.values() for s in segments])
    members[np.arange(BLOCK_ROWS) < count[:, None]] = rows  # in row order, as a mask assigns
    return run, count, members


def _entries(runs: _Runs) -> tuple[Ints, Ints, npt.NDArray[np.float32]]:
    """Offset, rank and scale of all runs' entries."""
    entries = [entry for slots in runs for entry in slots]
    offset = np.array([entry.slot.offset for entry in entries], np.int32)
    rank = np.array([entry.slot.rank for entry in entries], np.int32)
    return offset, rank, np.array([entry.scale for entry in entries], np.float32)


def _spread(counts: npt.NDArray[np.integer]) -> tuple[_Longs, _Longs]:
    """For `counts[i]` things of each i: (whose each one is, which of the owner's it is)."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - (np.cumsum(counts) - counts)[owner]


def _write(table: Ints, *columns: npt.NDArray[np.integer]) -> None:
    for index, column in enumerate(columns):
        table[:, index] = column
