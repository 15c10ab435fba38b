"""What a step is asked for that chooses its tokens on the device, and what it answers: a few numbers for each row.

Semantics: those of `kernels/compiled/sampling.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from loramux_server.kernels.compiled.logit_changes import RowChange
from loramux_server.kernels.compiled.sampling import Draw, TensorSampling

MOST_LIKELY = 20  # of the likeliest tokens that an answer tells

# `chosen` is the token that was asked for, the drawn one, or the first largest; `logprob` is its log probability,
# `log_sum` the log of the sum of exp of the logits; `likeliest` and `logprobs` are the first tokens, in order, -1 where
# the vocabulary has no more. Fields that were not asked for mean nothing. Where `finite` is 0 all but `greedy` mean
# nothing, and that too where there is NaN. Where it is NOTHING_LEFT the logits are finite, and no token may be chosen
# from them as they were changed.
NOTHING_LEFT = -1
ANSWER = np.dtype(
    [("greedy", "i4"), ("finite", "i4"), ("chosen", "i4"), ("logprob", "f4"), ("log_sum", "f8")]
    + [("likeliest", "i4", MOST_LIKELY), ("logprobs", "f4", MOST_LIKELY)]
)


class Ask(NamedTuple):
    """What is asked of one row of logits.

    Attributes:
        row: of the logits.
        draw: how a token is drawn (its `row` is not read); None takes the first largest.
        token: is chosen instead, whatever the logits say; below the vocabulary.
        top: how many of the likeliest tokens are told beside the chosen one's log probability, up to MOST_LIKELY;
            None tells neither.
    """

    row: int
    draw: Draw | None = None
    token: int | None = None
    top: int | None = None


class ChangedAsk(NamedTuple):
    """That a token is chosen from a changed row of logits, of which all else is told as it was before.

    Attributes:
        ask: the place among a step's asks of the one that chooses this token, and draws none itself.
        draw: as `Ask` has it.
        change: of the row that `ask` is about.
    """

    ask: int
    draw: Draw | None
    change: RowChange


class Answers(Protocol):
    """Of a step that was started."""

    def read(self) -> npt.NDArray[np.void]:
        """Waits for the step; one of dtype ANSWER for each ask, in their order."""


class AskedSampling:
    """`Sampling` by what answers steps: so a row is told the same, bit for bit, whether its step chose tokens itself or
    left its logits to the host for the sake of another row.
    """

    def __init__(
        self,
        answer: Callable[[torch.Tensor, Sequence[Ask]], npt.NDArray[np.void]],
        change: Callable[[torch.Tensor, Sequence[RowChange]], torch.Tensor],
        most_asks: int,
    ) -> None:
        """`answer`, `change`: as `ChoosingStep.answer`, of up to `most_asks` asks, and `ChoosingStep.changed`."""
        self._answer, self._change, self._most = answer, change, most_asks

    def search(self, logits: torch.Tensor) -> tuple[list[int], list[bool]]:
        answers = self._answers(logits, [Ask(row) for row in range(len(logits))])
        return answers["greedy"].tolist(), answers["finite"].astype(bool).tolist()

    def log_sums(self, logits: torch.Tensor, rows: Sequence[int]) -> list[float]:
        sums: list[float] = self._answers(logits, [Ask(row, top=0) for row in rows])["log_sum"].tolist()
        return sums

    def first_tokens(self, logits: torch.Tensor, rows: Sequence[int], wanted: int) -> list[list[int]]:
        """More than an answer tells are found on PyTorch's operations; the order is one and the same."""
        wanted = min(wanted, logits.shape[1])
        if wanted > MOST_LIKELY:
            return TensorSampling().first_tokens(logits, rows, wanted)
        found: list[list[int]] = self._answers(logits, [Ask(row, top=wanted) for row in rows])["likeliest"].tolist()
        return [tokens[:wanted] for tokens in found]

    def draw(self, logits: torch.Tensor, draws: Sequence[Draw]) -> list[int]:
        tokens: list[int] = self._answers(logits, [Ask(draw.row, draw) for draw in draws])["chosen"].tolist()
        return tokens

    def changed(self, logits: torch.Tensor, changes: Sequence[RowChange]) -> torch.Tensor:
        return self._change(logits, changes)

    def _answers(self, logits: torch.Tensor, asks: Sequence[Ask]) -> npt.NDArray[np.void]:
        starts = range(0, len(asks), self._most)
        parts = [self._answer(logits, asks[start : start + self._most]) for start in starts]
        return np.concatenate(parts) if parts else np.empty(0, ANSWER)
