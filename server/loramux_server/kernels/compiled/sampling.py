"""From logits to tokens: the first largest of each row, log probabilities, the likeliest tokens, and draws.

Semantics: a row of logits [vocabulary] is read alone, and its tokens stand in one order: the larger logit first, of
equal ones the lower token. A draw is made from softmax(logits / temperature) by one number in [0, 1). Its candidates
are the first `top_k`; of those the fewest whose probability reaches `top_p`; of those the ones at least `min_p` times
as likely as the likeliest. They stand in the order above, or in that of their numbers where neither top-k nor top-p is
asked for; the first is taken at which their summed probability passes the number times that of all of them.

On the CPU all of it is compiled code with the same bits on every instruction set (csrc/exact/sample.h).
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch

from loramux_server.kernels.compiled.abi import LogitChange, TokenDraw
from loramux_server.kernels.compiled.library import Compiled
from loramux_server.kernels.compiled.logit_changes import RowChange, changed_reference

_SORTED = 1024  # top-p looks at this many tokens first; only where they do not reach p is the whole row sorted


class Draw(NamedTuple):
    """How one token is drawn.

    Attributes:
        row: of the logits.
        uniform: the random number, in [0, 1).
        temperature: above 0.
        top_k: 0 takes all.
    """

    row: int
    uniform: float
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


class Sampling(Protocol):
    """One way to compute this.

    `logits` are [rows, vocabulary], rows of any stride. Rows that are named must be finite.
    """

    def search(self, logits: torch.Tensor) -> tuple[list[int], list[bool]]:
        """The first largest of each row, and whether it is finite.

        A row with NaN is not, and its index means nothing.
        """

    def log_sums(self, logits: torch.Tensor, rows: Sequence[int]) -> list[float]:
        """log(sum(exp(x))) of each of these rows: what a logit is above its log probability."""

    def first_tokens(self, logits: torch.Tensor, rows: Sequence[int], wanted: int) -> list[list[int]]:
        """The first `wanted` tokens of each of these rows, in order; all, where there are no more."""

    def draw(self, logits: torch.Tensor, draws: Sequence[Draw]) -> list[int]:
        """A token for each draw; one of minus infinity never."""

    def changed(self, logits: torch.Tensor, changes: Sequence[RowChange]) -> torch.Tensor:
        """[changes, vocabulary] fp32: rows as tokens are chosen from them (logit_changes.py), up to MOST_CHANGES.

        They are there until the next call.
        """


def logprobs_of(
    logits: torch.Tensor, rows: Sequence[int], tokens: Sequence[int], sums: Mapping[int, float]
) -> list[float]:
    """Log probability of each token in its row, rounded to fp32. `sums`: row -> its `log_sums`."""
    found = logits[torch.tensor(rows, device=logits.device), torch.tensor(tokens, device=logits.device)]
    exact = found.double().cpu().numpy() - np.array([sums[row] for row in rows])
    rounded: list[float] = exact.astype(np.float32).tolist()
    return rounded


class TensorSampling:
    """PyTorch's operations in double: the path of other devices, and the slow reference."""

    def search(self, logits: torch.Tensor) -> tuple[list[int], list[bool]]:
        values = logits.float()  # exact, and much faster to search than bf16 on CPUs
        index = values.argmax(-1)  # NaN counts as the largest
        return index.tolist(), values.gather(-1, index[:, None]).isfinite().flatten().tolist()

    def log_sums(self, logits: torch.Tensor, rows: Sequence[int]) -> list[float]:
        values = logits[torch.tensor(rows, device=logits.device)].double()
        most, index = values.max(-1)
        # softmax takes each row alone, whatever the number of rows
        likeliest = values.log_softmax(-1).gather(-1, index[:, None]).flatten()
        sums: list[float] = (most - likeliest).tolist()
        return sums

    def first_tokens(self, logits: torch.Tensor, rows: Sequence[int], wanted: int) -> list[list[int]]:
        return [_first(logits[row].double(), wanted)[1].tolist() for row in rows]

    def draw(self, logits: torch.Tensor, draws: Sequence[Draw]) -> list[int]:
        return [self._draw(logits[draw.row].double().cpu(), draw) for draw in draws]

    def _draw(self, logits: torch.Tensor, draw: Draw) -> int:
        values, tokens = candidates(logits, draw)
        mass = values.softmax(-1).cumsum(-1)
        threshold = draw.uniform * mass[-1].item()
        # the last entry may round below the threshold; the draw must stay inside the candidates
        index = min(int(torch.searchsorted(mass, threshold, right=True)), mass.shape[0] - 1)
        return index if tokens is None else int(tokens[index])

    def changed(self, logits: torch.Tensor, changes: Sequence[RowChange]) -> torch.Tensor:
        return changed_reference(logits, changes)


def candidates(logits: torch.Tensor, draw: Draw) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What may be drawn from a row of logits: (values [n] double, by temperature; tokens [n]).

    None for the tokens means the whole vocabulary, in the order of its numbers.
    """
    values = (logits - logits.max()) / draw.temperature
    tokens: torch.Tensor | None = None
    if 0 < draw.top_k < values.shape[0]:
        values, tokens = _first(values, draw.top_k)
    if draw.top_p < 1.0:
        values, order = _nucleus(values, draw.top_p)
        tokens = order if tokens is None else tokens[order]
    if draw.min_p > 0.0:
        kept = (values.exp() >= draw.min_p).nonzero().flatten()  # the largest value is 0
        values = values[kept]
        tokens = kept if tokens is None else tokens[kept]
    possible = values > -torch.inf  # a draw that is rounded must not end behind the last of them
    if not bool(possible.all()):
        tokens = possible.nonzero().flatten() if tokens is None else tokens[possible]
        values = values[possible]
    return values, tokens


def _first(values: torch.Tensor, wanted: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `wanted` of values [n] in order, or all: (values, their indices)."""
    least = values.topk(min(wanted, values.shape[0])).values[-1]
    found = (values >= least).nonzero().flatten()  # of equal values topk takes any
    order = found[values[found].argsort(descending=True, stable=True)][:wanted]
    return values[order], order


def _nucleus(values: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The fewest first of values [n] whose probability reaches `top_p`: (values, their indices)."""
    total = values.logsumexp(-1)
    count = min(_SORTED, values.shape[0])
    while True:
        first, order = _first(values, count)
        below = int(((first - total).exp().cumsum(-1) < top_p).sum())
        if below < count or count == values.shape[0]:
            return first[: below + 1], order[: below + 1]
        count = values.shape[0]


class NativeSampling:
    """The compiled code. Logits of another device or dtype are brought to the CPU and to fp32, which is exact."""

    def __init__(self, compiled: Compiled) -> None:
        self._compiled = compiled

    def search(self, logits: torch.Tensor) -> tuple[list[int], list[bool]]:
        logits = _readable(logits)
        index = np.empty(len(logits), dtype=np.int64)
        finite = np.empty(len(logits), dtype=np.bool_)
        self._call("search", logits, index.ctypes.data, finite.ctypes.data, logits.data_ptr(), len(logits))
        return index.tolist(), finite.tolist()

    def log_sums(self, logits: torch.Tensor, rows: Sequence[int]) -> list[float]:
        logits, named = _readable(logits), np.array(rows, dtype=np.int64)
        sums = np.empty(len(named))
        self._call("log_sums", logits, sums.ctypes.data, logits.data_ptr(), named.ctypes.data, len(named))
        return sums.tolist()

    def first_tokens(self, logits: torch.Tensor, rows: Sequence[int], wanted: int) -> list[list[int]]:
        logits, named = _readable(logits), np.array(rows, dtype=np.int64)
        wanted = min(wanted, logits.shape[1])
        tokens = np.empty((len(named), wanted), dtype=np.int64)
        to, of = (tokens.ctypes.data, wanted), (logits.data_ptr(), named.ctypes.data, len(named))
        self._call("first_tokens", logits, *to, *of)
        return tokens.tolist()

    def draw(self, logits: torch.Tensor, draws: Sequence[Draw]) -> list[int]:
        logits = _readable(logits)
        told = (TokenDraw * len(draws))(
            *(TokenDraw(one.temperature, one.top_p, one.min_p, one.uniform, one.row, one.top_k) for one in draws)
        )
        tokens = np.empty(len(draws), dtype=np.int64)
        self._call("draw", logits, tokens.ctypes.data, logits.data_ptr(), ctypes.addressof(told), len(draws))
        return tokens.tolist()

    def changed(self, logits: torch.Tensor, changes: Sequence[RowChange]) -> torch.Tensor:
        logits = _readable(logits)
        told = (LogitChange * len(changes))(
            *(
                LogitChange(
                    edits=one.edits.ctypes.data,
                    forbidden=one.forbidden.ctypes.data,
                    allowed=None if one.allowed is None else one.allowed.ctypes.data,
                    num_edits=len(one.edits),
                    num_forbidden=len(one.forbidden),
                    row=one.row,
                    repetition=one.repetition,
                )
                for one in changes
            )
        )
        rows = torch.empty(len(changes), logits.shape[1])
        to, of = (rows.data_ptr(), rows.stride(0)), (logits.data_ptr(), ctypes.addressof(told), len(changes))
        self._call("change", logits, *to, *of)
        return rows

    def _call(self, name: str, logits: torch.Tensor, *arguments: int) -> None:
        self._compiled.function(f"loramux_exact_{name}")(
            *(*arguments, logits.shape[1], logits.stride(0)),
            *(self._compiled.isa, torch.get_num_threads()),
        )


def _readable(logits: torch.Tensor) -> torch.Tensor:
    """fp32 on the CPU, the numbers of a row side by side."""
    logits = logits.detach().float().cpu()
    return logits if logits.stride(-1) == 1 else logits.contiguous()
