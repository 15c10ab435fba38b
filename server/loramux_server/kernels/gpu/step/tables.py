"""What the kernels are told of one step: tokens, places, block tables and adapters, in tensors that never move."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from loramux_adapters.device.device import Device, Event
from loramux_adapters.lora.ops import LoraRows
from loramux_server.kernels.attention.paged_attention import AttentionStep
from loramux_server.kernels.decoder.description import Description
from loramux_server.kernels.gpu.attention_tables import AttentionSizes, AttentionTables
from loramux_server.kernels.gpu.lora_tables import LoraSizes, LoraTables

_STAGED = 2  # sets of host memory: the host writes one while the device reads the other


@dataclass(frozen=True, slots=True)
class StepSizes:
    """The largest step.

    Attributes:
        rows: token rows.
        samples: of them, whose logits are wanted.
        sequences: that they belong to.
        blocks: of one sequence.
        entries, ranks: adapters of one row, and their ranks together, each rounded up to 16.
        programs: of the kernels that share out what the tables list: a few for each multiprocessor.
    """

    rows: int
    samples: int
    sequences: int
    blocks: int
    entries: int
    ranks: int
    programs: int


class StepTables:
    """Owner: the engine thread.

    Attributes:
        tokens: [rows] int32.
        sampled: [samples] int32, rows whose logits are wanted, in order.
        attention: places and block tables of all rows.
        lora, head_lora: adapters of all rows, and of the sampled ones.
    """

    def __init__(self, device: Device, sizes: StepSizes, of: Description) -> None:
        """Raises DeviceFull."""
        self._device, self._rows = device, sizes.rows
        attention = AttentionSizes(
            rows=sizes.rows,
            sequences=sizes.sequences,
            blocks=sizes.blocks,
            group=of.heads // of.kv_heads,
            head_dim=of.head_dim,
        )
        lora, head = (
            LoraSizes(rows=rows, runs=sizes.sequences, entries=sizes.entries, ranks=sizes.ranks)
            for rows in (sizes.rows, sizes.samples)
        )
        numbers = (sizes.rows + sizes.samples, attention.numbers, lora.numbers, head.numbers)
        tensors = [device.reserve((count,), torch.int32) for count in numbers]
        self.tokens, self.sampled = tensors[0].split([sizes.rows, sizes.samples])
        self.attention = AttentionTables(attention, tensors[1], programs=sizes.programs)
        # Parts of sums meet in scratch only for steps that are small; either way gives the same bits.
        self.lora, self.head_lora = (
            LoraTables(its, tensor, programs=sizes.programs, is_split=its.rows <= 256)
            for its, tensor in zip((lora, head), tensors[2:], strict=True)
        )
        self._tensors = tensors
        self._staged = [_Staged(device, numbers) for _ in range(_STAGED)]

    def fill(
        self,
        tokens: Sequence[int],
        heads: Sequence[int],
        step: AttentionStep,
        lora: LoraRows | None,
        head: LoraRows | None,
    ) -> bool:
        """Starts copying a step to the device; whether it has work for the attention's large tiles.

        Raises:
            ValueError: the step is larger than the tables.
        """
        staged = self._staged.pop(0)
        self._staged.append(staged)
        staged.wait()
        given, attention, adapters, head_adapters = staged.arrays
        given[: len(tokens)] = tokens
        given[self._rows : self._rows + len(heads)] = heads
        blocks = step.tables.numpy()
        counts = [
            self._rows + len(heads),
            self.attention.fill(attention, step.runs, list(blocks)),
            self.lora.fill(adapters, lora),
            self.head_lora.fill(head_adapters, head),
        ]
        staged.copy(self._tensors, counts)
        return any(count >= self.attention.sizes.large_rows for _, _, count, _ in step.runs)


class _Staged:
    """Pinned host memory for one step's tables."""

    def __init__(self, device: Device, numbers: Sequence[int]) -> None:
        self._device = device
        self._pinned = [device.pinned((count,), torch.int32) for count in numbers]
        self.arrays: list[npt.NDArray[np.int32]] = [tensor.numpy() for tensor in self._pinned]
        self._read: Event | None = None

    def wait(self) -> None:
        """Until the device has read what was written here."""
        if self._read is not None:
            self._read.synchronize()

    def copy(self, to: Sequence[torch.Tensor], counts: Sequence[int]) -> None:
        for tensor, pinned, count in zip(to, self._pinned, counts, strict=True):
            self._device.copy(tensor[:count], pinned[:count])
        self._read = self._device.main.record()
