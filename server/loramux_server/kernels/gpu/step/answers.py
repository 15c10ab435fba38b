"""Tokens of a step are chosen on the device, behind its logits; the host gets one small copy, when it asks for it.

The next step may be started before that: what it feeds, it takes from the answers where they lie on the device
(`resolve_tokens`), and its own answers go to other host memory than those that nobody has read yet.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from loramux_adapters.device.device import Device, Event
from loramux_server.kernels.gpu.sampling import ANSWER_WORDS, SamplingSizes, SamplingTables, answers_of

_STARTED = 2  # steps whose answers may be on their way


class StepAnswers:
    """What a step answers to what was asked of it."""

    def __init__(self, copied: torch.Tensor, over: Event) -> None:
        """`copied`: [asks, ANSWER_WORDS] int64, pinned; it holds them when `over` is."""
        self._copied, self._over = copied, over
        self._read: npt.NDArray[np.void] | None = None

    def read(self) -> npt.NDArray[np.void]:
        """[asks] of `sampling.ANSWER`, in the order of the asks (see `answers_of`); waits until the step is done."""
        if self._read is None:
            self._over.synchronize()
            self._read = answers_of(self._copied.numpy().copy())
        return self._read


class StepSampling:
    """What steps choose tokens with. Owner: the engine thread.

    Attributes:
        tables: asks and answers on the device.
        asked: how many asks the step had that was started last.
    """

    def __init__(self, device: Device, sizes: SamplingSizes, asks: torch.Tensor) -> None:
        """`asks`: [sizes.asks, ASK_WORDS] int64 on the device. Raises DeviceFull."""
        self._device = device
        answers = device.reserve((sizes.asks, ANSWER_WORDS), torch.int64)
        scratch = {name: device.scratch((count,), dtype) for name, (count, dtype) in sizes.scratch().items()}
        self.tables = SamplingTables(sizes, asks, answers, scratch)
        self.asked = 0
        self._pinned = [device.pinned((sizes.asks, ANSWER_WORDS), torch.int64) for _ in range(_STARTED)]
        self._last: list[StepAnswers] = []  # of these

    def beside(self, asks: torch.Tensor) -> SamplingTables:
        """For other asks of the same vocabulary, one after the other with `tables`, whose scratch they share.

        `asks`: [at most as many, ASK_WORDS] int64 on the device. Raises DeviceFull.
        """
        sizes = SamplingSizes(len(asks), self.tables.sizes.vocabulary)
        answers = self._device.reserve((sizes.asks, ANSWER_WORDS), torch.int64)
        return SamplingTables(sizes, asks, answers, self.tables.scratch)

    def hand_over(self, asks: int) -> StepAnswers:
        """Starts copying the answers of the step that was started last."""
        self.asked = asks
        pinned = self._pinned.pop(0)
        self._pinned.append(pinned)
        if len(self._last) == _STARTED:
            self._last.pop(0).read()  # or what it has not read yet would be overwritten
        if asks:
            self._device.copy(pinned[:asks], self.tables.answers[:asks])
        answers = StepAnswers(pinned[:asks], self._device.main.record())
        self._last.append(answers)
        return answers
