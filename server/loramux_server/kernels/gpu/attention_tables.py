"""What the attention kernels are told of one step: where each row stands, its blocks, and how the work is cut.

All of it is one tensor of int32 on the device whose parts lie at fixed places, so that a captured graph may hold them.
A step writes its numbers into an array of the host's and copies the front of it, as far as it is used, in one go.

Keys are cut into splits of some hundred by their position in the sequence, whatever a step holds. Rows go in tiles of
one sequence; a tile is either one piece of work, which goes over all splits of its keys, or one piece for each split,
whose partial results are put together afterwards. Both ways give the same bits (attention.py), so that what is cut,
which depends on the step, only decides how many programs share the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from loramux_server.kernels.attention.kv_cache import BLOCK_SIZE

WHOLE = -1  # in place of a split: all of them
_ALIGNED = 16  # numbers: where parts begin, for loads of whole vectors
_SMALL = 16  # query heads of a tile: the fewest that a tensor core takes

Ints = npt.NDArray[np.int32]
Run = tuple[int, int, int, int]


def _aligned(count: int) -> int:
    return -(-count // _ALIGNED) * _ALIGNED


@dataclass(frozen=True, slots=True)
class AttentionSizes:
    """How much a step may hold.

    Attributes:
        rows: token rows.
        sequences: that they belong to.
        blocks: of one sequence.
        group: query heads of a kv head.
        head_dim: numbers of a head.
        tensor_cores: the device has them, as Triton uses them from sm_80 on. Without, there are small tiles only.
        large: query heads of a tile of a prompt. Up to 32 it takes the same tensor core instruction as a small tile.
        split: keys of a split, a multiple of 64.
        parts: pairs of a row and a split whose partial results the scratch has room for. Where they do not suffice, the
            tiles with the fewest keys are not cut.
    """

    rows: int
    sequences: int
    blocks: int
    group: int
    head_dim: int
    tensor_cores: bool = True
    large: int = 32
    split: int = 256
    parts: int = 4096

    @property
    def small_tile(self) -> int:
        """Query heads of a tile of few rows: those of a kv head, of one row or of as many as there is room for."""
        return max(_SMALL, 1 << (self.group - 1).bit_length())

    @property
    def large_tile(self) -> int:
        """Query heads of a tile of a prompt."""
        return max(self.large, self.small_tile)

    @property
    def small_rows(self) -> int:
        return self.small_tile // self.group

    @property
    def large_rows(self) -> int:
        return self.large_tile // self.group

    def scratch(self, heads: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of what tiles that several programs share leave: values and states, both fp32."""
        return (self.parts, heads, self.head_dim), (self.parts, heads, 2)

    def places(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Each part's first number in the tensor, and its shape; the blocks come last, as a step rarely fills them."""
        shapes: dict[str, tuple[int, ...]] = {
            "counts": (_ALIGNED,),
            "positions": (self.rows,),
            "starts": (self.rows,),
            "large_items": (self.rows // self.large_rows + self.sequences, 4),
            "combined": (min(self.rows, self.parts), 4),
            "small_items": (self.rows + self.parts, 4),
            "blocks": (self.sequences * self.blocks,),
        }
        places, at = {}, 0
        for name, shape in shapes.items():
            places[name] = (at, shape)
            at += _aligned(int(np.prod(shape)))
        return places

    @property
    def numbers(self) -> int:
        """Of the whole tensor."""
        first, shape = self.places()["blocks"]
        return first + _aligned(int(np.prod(shape)))


class AttentionTables:
    """The tensor and its parts. Owner: the thread that runs the model.

    Attributes:
        tensor: [sizes.numbers] int32, on the device.
        programs: how many share the work of a launch: a few for each multiprocessor; it changes no bits.
        counts: [small items, large items, combined rows, rows, 0...].
        positions: [rows], each row's in its sequence.
        starts: [rows], where in `blocks` the table of its sequence begins.
        small_items, large_items: [n, 4], pieces of work: first row, number of rows, split or WHOLE, first part.
        combined: [n, 4], rows whose parts are put together: row, its first part, from one split's part to the next
            one's, position. Part `first + split * step` is that of a split.
        blocks: [sequences * blocks], tables of the step's sequences, one behind the other.
    """

    def __init__(self, sizes: AttentionSizes, tensor: torch.Tensor, *, programs: int) -> None:
        if tensor.dtype != torch.int32 or tensor.shape != (sizes.numbers,):
            raise ValueError(f"attention tables are {sizes.numbers} int32, not {tuple(tensor.shape)} {tensor.dtype}")
        self.sizes = sizes
        self.tensor = tensor
        self.programs = programs
        parts = {
            name: tensor[first : first + int(np.prod(shape))].view(shape)
            for name, (first, shape) in sizes.places().items()
        }
        self.counts, self.positions, self.starts = parts["counts"], parts["positions"], parts["starts"]
        self.small_items, self.large_items = parts["small_items"], parts["large_items"]
        self.combined, self.blocks = parts["combined"], parts["blocks"]

    def fill(
        self, staging: Ints, runs: Sequence[Run], blocks: Sequence[npt.ArrayLike], *, large_tiles: bool = True
    ) -> int:
        """Writes a step into `staging` [sizes.numbers] and says how many numbers, from the first on, are to be copied.

        Args:
            runs: (sequence, first row, number of rows, position of the first row), one for each sequence, in row order.
            blocks: of each sequence, in order, at least as many as its keys need; arrays of int32 are quickest.
            large_tiles: cut prompts into large tiles; `attend` must then be told the same.
        Raises:
            ValueError: there is no room for a step of this size.
        """
        sizes, part = self.sizes, _Parts(self.sizes, staging)
        table = np.array(runs, dtype=np.int64).reshape(-1, 4)
        sequence, first, count, position = table.T
        rows, needed = int(count.sum()), -(-(position + count) // BLOCK_SIZE)
        if rows > sizes.rows or len(table) > sizes.sequences or int(needed.max(initial=0)) > sizes.blocks:
            raise ValueError(
                f"{rows} rows of {len(table)} sequences with up to {int(needed.max(initial=0))} blocks do not fit "
                f"attention tables for {sizes.rows}, {sizes.sequences} and {sizes.blocks}"
            )
        starts = np.cumsum(needed) - needed
        for one, start, length in zip(sequence.tolist(), starts.tolist(), needed.tolist(), strict=True):
            part["blocks"][start : start + length] = np.asarray(blocks[one])[:length]
        of_run = np.repeat(np.arange(len(table)), count)
        at = np.arange(rows) - (np.cumsum(count) - count)[of_run]
        part["positions"][first[of_run] + at] = position[of_run] + at
        part["starts"][first[of_run] + at] = starts[of_run]
        small, large, combined = _cut(first, count, position, sizes, large_tiles)
        for name, items in (("small_items", small), ("large_items", large), ("combined", combined)):
            part[name].reshape(-1, 4)[: len(items)] = items
        part["counts"][:4] = len(small), len(large), len(combined), rows
        return sizes.places()["blocks"][0] + int(needed.sum())


class _Parts(dict[str, Ints]):
    """The parts of a staging array by name."""

    def __init__(self, sizes: AttentionSizes, staging: Ints) -> None:
        if staging.dtype != np.int32 or staging.shape != (sizes.numbers,):
            raise ValueError(f"a staging array is {sizes.numbers} int32, not {staging.shape} {staging.dtype}")
        for name, (first, shape) in sizes.places().items():
            self[name] = staging[first : first + int(np.prod(shape))]


Longs = npt.NDArray[np.int64]


def _cut(
    first: Longs, count: Longs, position: Longs, sizes: AttentionSizes, large_tiles: bool
) -> tuple[Longs, Longs, Longs]:
    """The runs' small items, large items and combined rows, each [n, 4]."""
    is_large = (count >= sizes.large_rows) & (large_tiles and sizes.tensor_cores)
    per_tile = np.where(is_large, sizes.large_rows, sizes.small_rows)
    tiles = -(-count // per_tile)
    of_run = np.repeat(np.arange(len(count)), tiles)
    offset = (np.arange(len(of_run)) - (np.cumsum(tiles) - tiles)[of_run]) * per_tile[of_run]
    rows, at = np.minimum(per_tile[of_run], count[of_run] - offset), position[of_run] + offset
    splits = (at + rows - 1) // sizes.split + 1
    tile = _Tiles(first[of_run] + offset, rows, at, splits, is_large[of_run]).longest_first()
    parts = np.where(tile.large | (tile.splits == 1), 0, tile.splits * tile.rows)
    ends = np.cumsum(parts)
    is_cut = (parts > 0) & (ends <= sizes.parts)
    cut, begin = np.flatnonzero(is_cut), (ends - parts)[is_cut]  # the longest come first: all before a cut one are cut

    splits = tile.splits[cut]
    of_cut = np.repeat(np.arange(len(cut)), splits)
    split = np.arange(len(of_cut)) - (np.cumsum(splits) - splits)[of_cut]
    pieces = np.stack([tile.first[cut][of_cut], tile.rows[cut][of_cut], split, begin[of_cut]], axis=1)
    small = np.concatenate([tile.whole(~is_cut & ~tile.large & (tile.splits > 1)), pieces])
    small = np.concatenate([small, tile.whole(~is_cut & ~tile.large & (tile.splits == 1))])

    rows = tile.rows[cut]
    of_cut = np.repeat(np.arange(len(cut)), rows)
    at = np.arange(len(of_cut)) - (np.cumsum(rows) - rows)[of_cut]
    combined = np.stack(
        [tile.first[cut][of_cut] + at, begin[of_cut] + at, rows[of_cut], tile.position[cut][of_cut] + at], axis=1
    )
    return small, tile.whole(tile.large), combined


@dataclass(slots=True)
class _Tiles:
    """Of each: its first row, number of rows, position of the first row, splits of its keys, and is it a large one."""

    first: Longs
    rows: Longs
    position: Longs
    splits: Longs
    large: npt.NDArray[np.bool_]

    def longest_first(self) -> _Tiles:
        order = np.argsort(-self.splits, kind="stable")
        first, rows, position, splits = (of[order] for of in (self.first, self.rows, self.position, self.splits))
        return _Tiles(first, rows, position, splits, self.large[order])

    def whole(self, which: npt.NDArray[np.bool_]) -> Longs:
        """Items of those tiles that one program each goes over."""
        first, rows = self.first[which], self.rows[which]
        return np.stack([first, rows, np.full_like(first, WHOLE), np.zeros_like(first)], axis=1)
