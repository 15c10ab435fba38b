"""Logits of a step, changed where they lie: the host sends what changes, and no logit crosses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from loramux_adapters.device.device import Device, Event
from loramux_server.kernels.compiled.logit_changes import RowChange
from loramux_server.kernels.gpu.changes import ChangeTables, fill_rows, placed
from loramux_server.kernels.gpu.cuts import EDIT_WORDS, ChangeSizes


class StepChanges:
    """Owner: the engine thread."""

    def __init__(self, device: Device, sizes: ChangeSizes, changed: torch.Tensor) -> None:
        """`changed`: [sizes.rows, vocabulary] fp32, whatever it holds. Raises DeviceFull."""
        self._device, self._sizes = device, sizes
        self._tables = ChangeTables(sizes, device.reserve((sizes.numbers,), torch.int32), changed)
        self._pinned = device.pinned((sizes.numbers,), torch.int32)
        self._read: Event | None = None

    def run(self, change: Callable[..., None], logits: torch.Tensor, changes: Sequence[RowChange]) -> torch.Tensor:
        """[changes, vocabulary] fp32, a view that the next call writes to; `change`: the operation of that name.

        Raises SamplingError: there are more changes than rows of logits.
        """
        sizes, tables, device = self._sizes, self._tables, self._device
        staging, edits, rows = self._pinned.numpy(), placed(changes), len(changes)
        first_edit = sizes.numbers - sizes.edits * EDIT_WORDS
        self._wait()
        used = fill_rows(staging, sizes, changes)
        device.copy(tables.numbers[:used], self._pinned[:used])
        for start in range(0, max(len(edits), 1), sizes.edits):
            some = edits[start : start + sizes.edits]
            if start:
                self._wait()
            staging[first_edit : first_edit + some.size] = some.ravel()
            if len(some):
                of_some = slice(first_edit, first_edit + some.size)
                device.copy(tables.numbers[of_some], self._pinned[of_some])
            self._read = device.main.record()
            change(device.launch, tables, logits, 0 if start else rows, len(some))
        return tables.changed[:rows]

    def _wait(self) -> None:
        """Until the device has read what was written for it."""
        if self._read is not None:
            self._read.synchronize()
