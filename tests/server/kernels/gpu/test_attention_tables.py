"""How a step is cut into pieces of work: every row and split once, and never more than there is room for."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from loramux_server.kernels.gpu.attention_tables import WHOLE, AttentionSizes, AttentionTables, Run


def filled(sizes: AttentionSizes, runs: list[Run], *, large_tiles: bool = True) -> tuple[AttentionTables, int]:
    tables = AttentionTables(sizes, torch.zeros(sizes.numbers, dtype=torch.int32), programs=4)
    staging = np.full(sizes.numbers, -7, dtype=np.int32)
    blocks = [[100 * sequence + i for i in range(sizes.blocks)] for sequence in range(len(runs))]
    used = tables.fill(staging, runs, blocks, large_tiles=large_tiles)
    assert (staging[used:] == -7).all()
    tables.tensor[:used] = torch.from_numpy(staging[:used])
    return tables, used


@pytest.mark.parametrize("group", [1, 3, 9, 16, 20])
@pytest.mark.parametrize("parts", [0, 5, 40, 4096])
@pytest.mark.parametrize("large_tiles", [True, False])
def test_every_row_is_computed_once_over_all_splits_of_its_keys(group: int, parts: int, large_tiles: bool) -> None:
    sizes = AttentionSizes(128, 5, 40, group, 64, parts=parts)
    runs = [(2, 0, 1, 600), (0, 1, 70, 0), (1, 71, 1, 3), (4, 72, 9, 250), (3, 81, 33, 500)]
    tables, _ = filled(sizes, runs, large_tiles=large_tiles)
    small, large, combined, rows = tables.counts[:4].tolist()
    assert rows == 114
    assert large_tiles or not large
    whole: Counter[int] = Counter()
    of_splits: Counter[tuple[int, int]] = Counter()
    part_of: dict[int, tuple[int, int]] = {}
    for items, tile in ((tables.small_items[:small], sizes.small_rows), (tables.large_items[:large], sizes.large_rows)):
        for first, count, split, part in items.tolist():
            assert 1 <= count <= tile
            for row in range(first, first + count):
                if split == WHOLE:
                    whole[row] += 1
                else:
                    of_splits[row, split] += 1
                    place = part + split * count + row - first
                    assert 0 <= place < parts
                    assert place not in part_of
                    part_of[place] = (row, split)
    for row, first, step, position in tables.combined[:combined].tolist():
        assert position == int(tables.positions[row])
        for split in range(position // sizes.split + 1):
            assert of_splits[row, split] == 1
            assert part_of[first + split * step] == (row, split)
        whole[row] += 1
    assert whole == dict.fromkeys(range(114), 1)
    for sequence, first, count, position in runs:
        for row in range(first, first + count):
            assert int(tables.positions[row]) == position + row - first
            start = int(tables.starts[row])
            needed = (position + count - 1) // 16 + 1
            assert tables.blocks[start : start + needed].tolist() == [100 * sequence + i for i in range(needed)]


def test_only_what_a_step_uses_is_copied() -> None:
    sizes = AttentionSizes(64, 4, 1000, 4, 128)
    _, used = filled(sizes, [(0, 0, 1, 31), (1, 1, 1, 32)])
    assert used == sizes.places()["blocks"][0] + 2 + 3


@pytest.mark.parametrize(
    "runs",
    [[(0, 0, 9, 0)], [(0, 0, 1, 64)], [(0, 0, 1, 0), (1, 1, 1, 0), (2, 2, 1, 0)]],
    ids=["rows", "keys", "sequences"],
)
def test_a_step_that_is_too_large_is_refused(runs: list[Run]) -> None:
    sizes = AttentionSizes(8, 2, 4, 4, 64)
    with pytest.raises(ValueError, match="do not fit attention tables for 8, 2 and 4"):
        filled(sizes, runs)


def test_tensors_of_other_sizes_are_refused() -> None:
    sizes = AttentionSizes(8, 2, 4, 4, 64)
    with pytest.raises(ValueError, match="attention tables are"):
        AttentionTables(sizes, torch.zeros(3, dtype=torch.int32), programs=1)
    tables = AttentionTables(sizes, torch.zeros(sizes.numbers, dtype=torch.int32), programs=1)
    with pytest.raises(ValueError, match="a staging array is"):
        tables.fill(np.zeros(3, dtype=np.int32), [], [])
