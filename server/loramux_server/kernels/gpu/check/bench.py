"""What kernels are tried with: random numbers and tables of the sizes that a decoder has, in memory of their own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from loramux_adapters.device.device import Device
from loramux_adapters.lora.ops import LoraRows
from loramux_server.kernels.attention.kv_cache import BLOCK_SIZE
from loramux_server.kernels.gpu.attention_tables import AttentionSizes, AttentionTables, Run
from loramux_server.kernels.gpu.check.trial import ROWS
from loramux_server.kernels.gpu.lora_tables import LoraSizes, LoraTables
from loramux_server.kernels.gpu.step.decoder import GpuDecoder

UNTOUCHED = 77.0  # what results hold before a kernel writes them
_SIZES = (1.0, 2.0**-7, 6.0)  # of rows, in turn: what is added to a sum of squares counts for the small ones


class Bench:
    """Owner: the thread that checks.

    Attributes:
        decoder: whose kernels are tried; its weights are read, and nothing else of it is touched.
        act: what lies between kernels; `rounding`: half of its last place, as a share of a number.
    """

    def __init__(self, device: Device, decoder: GpuDecoder) -> None:
        self.device, self.decoder, self.launch = device, decoder, device.launch
        self.act = decoder.activations
        self.rounding = torch.finfo(self.act).eps / 2
        self._random = torch.Generator().manual_seed(0)

    def normal(self, *shape: int, size: float = 1.0, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Random numbers of this standard deviation, of the activations' dtype where none is given."""
        return self.device.put((torch.randn(*shape, generator=self._random) * size).to(dtype or self.act))

    def rows(self, width: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """[ROWS, width], random rows of several sizes."""
        sizes = torch.tensor(_SIZES)[torch.arange(ROWS) % len(_SIZES), None]
        return self.device.put((torch.randn(ROWS, width, generator=self._random) * sizes).to(dtype or self.act))

    def whole(self, end: int, *shape: int) -> torch.Tensor:
        """Random int32 below `end`."""
        return self.device.put(torch.randint(end, shape, generator=self._random, dtype=torch.int32))

    def uniform(self) -> float:
        """A random number in [0, 1)."""
        return float(torch.rand((), generator=self._random))

    def untouched(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self.device.scratch(shape, dtype or self.act).fill_(UNTOUCHED)

    def scratch(self, numbers: int) -> torch.Tensor:
        return self.device.scratch((max(1, numbers),), torch.float32)

    def attention_tables(self, runs: Sequence[Run], blocks: np.ndarray, parts: int) -> AttentionTables:
        """Of the decoder's sizes, but for `parts`; filled with these runs, `blocks` [sequences, most of one]."""
        of = self.decoder.tables.attention
        sizes = AttentionSizes(
            rows=ROWS,
            sequences=len(blocks),
            blocks=of.sizes.blocks,
            group=of.sizes.group,
            head_dim=of.sizes.head_dim,
            tensor_cores=of.sizes.tensor_cores,
            parts=parts,
        )
        tables = AttentionTables(sizes, self.device.reserve((sizes.numbers,), torch.int32), programs=of.programs)
        staging = np.zeros(sizes.numbers, np.int32)
        used = tables.fill(staging, runs, list(blocks))
        tables.tensor[:used].copy_(torch.from_numpy(staging[:used]))
        return tables

    def lora_tables(self, rows: LoraRows | None, *, is_split: bool) -> LoraTables:
        of = self.decoder.sizes
        sizes = LoraSizes(rows=ROWS, runs=ROWS, entries=of.entries, ranks=of.ranks)
        programs = self.decoder.tables.lora.programs
        tensor = self.device.reserve((sizes.numbers,), torch.int32)
        tables = LoraTables(sizes, tensor, programs=programs, is_split=is_split)
        staging = np.zeros(sizes.numbers, np.int32)
        used = tables.fill(staging, rows)
        tensor[:used].copy_(torch.from_numpy(staging[:used]))
        return tables

    def permutation(self, count: int) -> np.ndarray:
        return torch.randperm(count, generator=self._random).numpy().astype(np.int32)

    @property
    def positions(self) -> int:
        """That a sequence can have."""
        known = min((len(cos) for cos, _ in self.decoder.angles), default=1 << 30)
        return min(self.decoder.tables.attention.sizes.blocks * BLOCK_SIZE, known)
