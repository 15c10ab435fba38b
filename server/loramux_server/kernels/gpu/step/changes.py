"""Logits of a step, changed where they lie, and tokens chosen from them: the host sends what changes, and waits for
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from loramux_adapters.device.device import Device, Event
from loramux_server.kernels.compiled.logit_changes import RowChange
from loramux_server.kernels.decoder.asks import Ask, ChangedAsk
from loramux_server.kernels.gpu.changes import ChangeTables, fill_rows, first_edit, placed
from loramux_server.kernels.gpu.cuts import ASK_WORDS, ChangeSizes
from loramux_server.kernels.gpu.sampling import SamplingTables
from loramux_server.kernels.gpu.sampling import fill as write_asks
from loramux_server.kernels.gpu.step.operations import Operation, Operations


class StepChanges:
    """Owner: the engine thread.

    Attributes:
        tables: how rows are changed, and the rows, of as many as are changed together.
    """

    def __init__(self, device: Device, sizes: ChangeSizes, changed: torch.Tensor, *, staged: int = 2) -> None:
        """
        Args:
            changed: [sizes.rows, vocabulary] fp32, whatever it holds.
            staged: how many times `sizes.rows` rows may be on their way while the host goes on.
        Raises:
            DeviceFull: there is no room.
        """
        self._device, self._sizes = device, sizes
        self.tables = ChangeTables(sizes, device.reserve((sizes.numbers,), torch.int32), changed)
        self._staged = [_Staged(device, sizes.numbers) for _ in range(staged)]

    def run(self, change: Operation, logits: torch.Tensor, changes: Sequence[RowChange]) -> torch.Tensor:
        """[changes, vocabulary] fp32, a view that the next call writes to; `change`: the operation of that name.

        Raises SamplingError: there are more changes than rows are changed together.
        """
        staged = self._next_staged()
        fill_rows(staged.array, self._sizes, changes)
        self._change(staged, change, logits, changes)
        return self.tables.changed[: len(changes)]

    def choose(
        self,
        operations: Operations,
        own: SamplingTables,
        step: SamplingTables,
        logits: torch.Tensor,
        asked: Sequence[ChangedAsk],
    ) -> None:
        """Changes rows, chooses from them, and brings that into the step's answers.

        Args:
            own: whose asks are those of `tables`.
            step: what the step asked, and has answered about its logits.
            logits: [any, vocabulary] fp32, of the step.
        Raises:
            SamplingError: something that cannot be asked.
        """
        sizes, launch = self._sizes, self._device.launch
        for first in range(0, len(asked), sizes.rows):
            some = asked[first : first + sizes.rows]
            staged = self._next_staged()
            asks = staged.array[: 2 * ASK_WORDS * sizes.rows].view(np.int64).reshape(sizes.rows, ASK_WORDS)
            write_asks(asks, [Ask(at, one.draw) for at, one in enumerate(some)], sizes.vocabulary)
            staged.array[2 * ASK_WORDS * sizes.rows :][: len(some)] = [one.ask for one in some]
            changes = [one.change for one in some]
            fill_rows(staged.array, sizes, changes)
            self._change(staged, operations.change, logits, changes)
            operations.sample(launch, own, self.tables.changed, len(some))
            operations.adopt(launch, self.tables, own, step, logits, len(some))

    def _change(self, staged: _Staged, change: Operation, logits: torch.Tensor, changes: Sequence[RowChange]) -> None:
        """One copy and its launches; more where there are more edits than the tables hold."""
        edits, most, rows = placed(changes), self._sizes.edits, len(changes)
        begin = first_edit(self._sizes, rows)
        for start in range(0, max(len(edits), 1), most):
            some = edits[start : start + most]
            staged = self._next_staged() if start else staged
            staged.array[begin : begin + some.size] = some.ravel()
            staged.copy(self.tables.numbers, begin if start else 0, begin + some.size)
            change(self._device.launch, self.tables, logits, rows, len(some), copies=not start)

    def _next_staged(self) -> _Staged:
        """Host memory that the device has read, to be written to."""
        staged = self._staged.pop(0)
        self._staged.append(staged)
        staged.wait()
        return staged


class _Staged:
    """Pinned host memory for the numbers of one launch.

    Attributes:
        array: [numbers] int32.
    """

    def __init__(self, device: Device, numbers: int) -> None:
        self._device = device
        self._pinned = device.pinned((numbers,), torch.int32)
        self.array: npt.NDArray[np.int32] = self._pinned.numpy()
        self._read: Event | None = None

    def wait(self) -> None:
        """Until the device has read what was written here."""
        if self._read is not None:
            self._read.synchronize()

    def copy(self, to: torch.Tensor, first: int, end: int) -> None:
        """Starts copying what stands at these places; there is always something."""
        self._device.copy(to[first:end], self._pinned[first:end])
        self._read = self._device.main.record()
