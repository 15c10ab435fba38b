"""What the kernels are told of one step: tokens, places, blocks, adapters and asks, in tensors that never move."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from loramux_adapters.device.device import Device, Event
from loramux_adapters.lora.ops import LoraRows
from loramux_server.kernels.attention.paged_attention import AttentionStep
from loramux_server.kernels.decoder.asks import Ask
from loramux_server.kernels.decoder.description import Description
from loramux_server.kernels.gpu.attention_tables import AttentionSizes, AttentionTables
from loramux_server.kernels.gpu.lora_tables import LoraSizes, LoraTables
from loramux_server.kernels.gpu.sampling import ASK_WORDS
from loramux_server.kernels.gpu.sampling import fill as write_asks
from loramux_server.kernels.gpu.split_sums import has_tensor_cores
from loramux_server.kernels.gpu.step.form import StepSizes as StepSizes
from loramux_server.kernels.gpu.step.workspace import SPLIT_ROWS

_STAGED = 2  # sets of host memory: the host writes one while the device reads the other


@dataclass(frozen=True, slots=True)
class StepShape:
    """What the launches of a step follow from.

    Attributes:
        rows, samples: token rows, and rows whose logits are wanted.
        lora: some row has an adapter.
        prompts: some sequence has rows enough for the attention's large tiles, where the device has such.
        asks: what is asked of the logits on the device.
    """

    rows: int
    samples: int
    lora: bool
    prompts: bool
    asks: int = 0


class StepTables:
    """Owner: the engine thread.

    A step may be run in a larger shape than its own: the rows behind its own have token 0 and no adapter, write no keys
    or values and read none; what is sampled behind its own is row 0, of which nothing is asked.

    Attributes:
        tokens: [rows] int32; -(1 + i) is what ask i of the step before chose.
        sampled: [samples] int32, rows whose logits are wanted, in order.
        attention: places and block tables of all rows.
        lora, head_lora: adapters of all rows, and of the sampled ones.
        asks: [samples, ASK_WORDS] int64, rows of them count among the sampled ones.
    """

    def __init__(self, device: Device, sizes: StepSizes, of: Description) -> None:
        """Raises DeviceFull."""
        self._device, self._rows, self._vocabulary = device, sizes.rows, of.vocabulary
        attention = AttentionSizes(
            rows=sizes.rows,
            sequences=sizes.sequences,
            blocks=sizes.blocks,
            group=of.heads // of.kv_heads,
            head_dim=of.head_dim,
            tensor_cores=has_tensor_cores(device.capability),
        )
        lora, head = (
            LoraSizes(rows=rows, runs=sizes.sequences, entries=sizes.entries, ranks=sizes.ranks)
            for rows in (sizes.rows, sizes.samples)
        )
        asks = sizes.samples * ASK_WORDS * 2
        numbers = (sizes.rows + sizes.samples, attention.numbers, lora.numbers, head.numbers, asks)
        tensors = [device.reserve((count,), torch.int32) for count in numbers]
        self.tokens, self.sampled = tensors[0].split([sizes.rows, sizes.samples])
        self.attention = AttentionTables(attention, tensors[1], programs=sizes.programs)
        # Parts of sums meet in scratch only for steps that are small; either way gives the same bits.
        self.lora, self.head_lora = (
            LoraTables(its, tensor, programs=sizes.programs, is_split=its.rows <= SPLIT_ROWS)
            for its, tensor in zip((lora, head), tensors[2:4], strict=True)
        )
        self.asks = tensors[4].view(torch.int64).view(sizes.samples, ASK_WORDS)
        self._tensors = tensors
        self._staged = [_Staged(device, numbers) for _ in range(_STAGED)]

    def shape(
        self, tokens: Sequence[int], heads: Sequence[int], step: AttentionStep, lora: LoraRows | None, asks: int
    ) -> StepShape:
        """Of a step that `fill` is told of."""
        tiles = self.attention.sizes
        prompts = tiles.tensor_cores and any(count >= tiles.large_rows for _, _, count, _ in step.runs)
        return StepShape(len(tokens), len(heads), lora is not None, prompts, asks)

    def fill(
        self,
        tokens: Sequence[int],
        heads: Sequence[int],
        step: AttentionStep,
        lora: LoraRows | None,
        head: LoraRows | None,
        asks: Sequence[Ask],
        shape: StepShape,
    ) -> None:
        """Starts copying a step to the device, to be run in this shape, its own or a larger one.

        Raises:
            ValueError: the step is larger than the tables.
            SamplingError: something that cannot be asked.
        """
        staged = self._next_staged()
        given, attention, adapters, head_adapters, asked = staged.arrays
        given[: len(tokens)] = tokens
        given[len(tokens) : shape.rows] = 0
        sampled = given[self._rows :]
        sampled[: len(heads)] = heads
        sampled[len(heads) : shape.samples] = 0
        words = asked.view(np.int64).reshape(-1, ASK_WORDS)
        write_asks(words[: shape.asks], asks, self._vocabulary)
        blocks = step.tables.numpy()
        counts = [
            self._rows + shape.samples,
            self.attention.fill(attention, step.runs, list(blocks)),
            self.lora.fill(adapters, lora),
            self.head_lora.fill(head_adapters, head),
            shape.asks * ASK_WORDS * 2,
        ]
        staged.copy(self._tensors, counts)

    def fill_asks(self, asks: Sequence[Ask]) -> None:
        """Starts copying asks alone to the device, of logits that are there. Raises SamplingError."""
        staged = self._next_staged()
        words = staged.arrays[-1].view(np.int64).reshape(-1, ASK_WORDS)
        write_asks(words[: len(asks)], asks, self._vocabulary)
        staged.copy(self._tensors, [*(0 for _ in self._tensors[:-1]), len(asks) * ASK_WORDS * 2])

    def _next_staged(self) -> _Staged:
        """Host memory that the device has read, to be written to."""
        staged = self._staged.pop(0)
        self._staged.append(staged)
        staged.wait()
        return staged


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
            if count:
                self._device.copy(tensor[:count], pinned[:count])
        self._read = self._device.main.record()
