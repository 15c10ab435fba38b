"""Rows of logits as tokens are chosen from them, on the device: biases and penalties, and what is forbidden.

Semantics: those of `loramux_server.kernels.compiled.logit_changes`, but for the last place of an edited logit where a
device fuses a product and a difference. What is forbidden has no bit among what is allowed: one token of a row has at
most one edit, and no other program writes to it.

Three kernels: one copies rows by their bits, a program for each tile of a row; another edits single logits. When tokens
were chosen from the changed rows (sampling.py), the third brings them into the answers about the rows as they were.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from loramux_server.kernels.compiled.logit_changes import RowChange
from loramux_server.kernels.decoder.asks import NOTHING_LEFT
from loramux_server.kernels.gpu.cuts import ASK_WORDS, EDIT_WORDS, ChangeSizes, SamplingError, aligned
from loramux_server.kernels.gpu.launch import Launch
from loramux_server.kernels.gpu.sampling import SamplingTables
from loramux_server.kernels.gpu.sampling_kernels import ANSWER, ASK, tell

TILE, BLOCK = 1024, 128  # numbers of a row, and edits, of one program
_LARGEST = tl.constexpr(float(np.finfo(np.float32).max))
_WORDS = tl.constexpr(EDIT_WORDS)
_ASK, _ANSWER = tl.constexpr(ASK), tl.constexpr(ANSWER)
_NOTHING_LEFT = tl.constexpr(NOTHING_LEFT)
# an edit as it lies in its table; `at`: which of the changed rows
_PLACED = np.dtype(
    [("at", "i4"), ("token", "i4"), ("repeated", "i4"), ("add", "f4"), ("less", "f4"), ("repetition", "f4")]
)


class ChangeTables:
    """How rows are changed, and the changed rows: tensors of fixed sizes for `change`.

    Attributes:
        numbers: [sizes.numbers] int32, all that the host writes; `ChangeSizes` says in which order.
        changed: [sizes.rows, vocabulary] fp32.
        asks: [sizes.rows, ASK_WORDS] int64, of the changed rows.
        places: [sizes.rows] int32, the asks of the step that are answered by them.
        rows: [sizes.rows] int32, of the logits.
    """

    def __init__(self, sizes: ChangeSizes, numbers: torch.Tensor, changed: torch.Tensor) -> None:
        """numbers: [sizes.numbers] int32; changed: [sizes.rows, vocabulary] fp32. Neither need be set."""
        self.sizes, self.numbers, self.changed = sizes, numbers, changed
        asks = 2 * ASK_WORDS * sizes.rows
        self.asks = numbers[:asks].view(torch.int64).view(sizes.rows, ASK_WORDS)
        self.places, self.rows = numbers[asks:].split(
            [sizes.rows, sizes.rows, numbers.numel() - asks - 2 * sizes.rows]
        )[:2]

    def bits(self, rows: int) -> torch.Tensor:
        """[rows, words] int32, 1 where a token may be chosen."""
        return self.numbers[self.sizes.heads :][: rows * self.sizes.words].view(rows, self.sizes.words)

    def edits(self, rows: int, count: int) -> torch.Tensor:
        """[count, EDIT_WORDS] int32, behind the bits of so many rows."""
        first = first_edit(self.sizes, rows)
        return self.numbers[first : first + count * EDIT_WORDS].view(count, EDIT_WORDS)


def first_edit(sizes: ChangeSizes, rows: int) -> int:
    """Where in the numbers edits begin, behind the bits of so many rows."""
    return sizes.heads + aligned(rows * sizes.words)


def fill_rows(staging: npt.NDArray[np.int32], sizes: ChangeSizes, changes: Sequence[RowChange]) -> None:
    """Writes rows and bits of at most sizes.rows changes.

    staging: [sizes.numbers] on the host, as `ChangeTables.numbers`. Raises SamplingError: they are too many.
    """
    if len(changes) > sizes.rows:
        raise SamplingError(f"{len(changes)} rows are changed, and there is room for {sizes.rows}")
    staging[(2 * ASK_WORDS + 1) * sizes.rows :][: len(changes)] = [one.row for one in changes]
    words = sizes.words
    bits = staging[sizes.heads :][: len(changes) * words].view(np.uint32).reshape(len(changes), words)
    for to, one in zip(bits, changes, strict=True):
        to[:] = 0xFFFFFFFF if one.allowed is None else one.allowed[:words]
        np.bitwise_and.at(to, one.forbidden >> 5, ~(np.uint32(1) << (one.forbidden & 31).astype(np.uint32)))


def placed(changes: Sequence[RowChange]) -> npt.NDArray[np.int32]:
    """[edits of all, EDIT_WORDS] int32."""
    found = np.empty(sum(len(one.edits) for one in changes), dtype=_PLACED)
    start = 0
    for at, one in enumerate(changes):
        its = found[start : start + len(one.edits)]
        its["at"], its["repetition"] = at, one.repetition
        for name in ("token", "repeated", "add", "less"):
            its[name] = one.edits[name]
        start += len(its)
    return found.view(np.int32).reshape(-1, EDIT_WORDS)


def change(
    launch: Launch, tables: ChangeTables, logits: torch.Tensor, rows: int, edits: int, *, copies: bool = True
) -> None:
    """The first `rows` of the tables are copied, then the first `edits` made. logits: [any, vocabulary] fp32.

    `copies` False: an earlier launch copied these rows, which get more edits.
    """
    sizes = tables.sizes
    if logits.shape[1] != sizes.vocabulary or logits.dtype != torch.float32 or logits.stride(1) != 1:
        raise SamplingError(f"logits of {logits.shape[1]} tokens, {logits.dtype}; a row is {sizes.vocabulary} of fp32")
    shape = sizes.vocabulary, logits.stride(0)
    if rows and copies:
        grid = (rows, triton.cdiv(sizes.vocabulary, TILE))
        launch(_allow, grid, tables.changed, logits, tables.rows, tables.bits(rows), *shape, sizes.words, TILE=TILE)
    if edits:
        ints = tables.edits(rows, edits)
        numbers = ints, ints.view(torch.float32)
        launch(
            _edit,
            (triton.cdiv(edits, BLOCK),),
            tables.changed,
            logits,
            tables.rows,
            *numbers,
            edits,
            *shape,
            BLOCK=BLOCK,
        )


def change_reference(tables: ChangeTables, logits: torch.Tensor, rows: int, edits: int, *, copies: bool = True) -> None:
    """The same by PyTorch's operations."""
    none = torch.full((), -torch.inf, device=logits.device)
    if rows and copies:
        tokens, bits = torch.arange(tables.sizes.vocabulary, device=logits.device), tables.bits(rows)
        for row in range(rows):
            own = logits[tables.rows[row : row + 1].long()]
            allowed = bits[row][tokens >> 5] >> (tokens & 31) & 1
            tables.changed[row : row + 1].copy_(torch.where(allowed != 0, own, none))
    if edits:
        numbers = tables.edits(rows, edits)
        floats = numbers.view(torch.float32)
        at, token = numbers[:, 0].long(), numbers[:, 1].long()
        value = logits[tables.rows[at].long(), token] + floats[:, 3]
        repeated = torch.where(value > 0, value / floats[:, 5], value * floats[:, 5])
        value = torch.where(numbers[:, 2] != 0, repeated, value) - floats[:, 4]
        largest = torch.finfo(torch.float32).max
        value = torch.where(value > -largest, value, -largest).clamp(max=largest)
        flat = tables.changed.view(-1)
        place = at * tables.sizes.vocabulary + token
        before = flat[place]
        flat.scatter_(0, place, torch.where(before == none, before, value))


def adopt(
    launch: Launch,
    tables: ChangeTables,
    chosen: SamplingTables,
    step: SamplingTables,
    logits: torch.Tensor,
    rows: int,
) -> None:
    """Brings what was chosen from the first `rows` changed rows into the step's answers about the logits as they were.

    An answer with logits that are not finite stays as it is. Where nothing may be chosen its `finite` is NOTHING_LEFT,
    and the rest stays. `tables.places` are in the step's asks, none of them twice.

    Args:
        chosen: answers about tables.changed, in their order.
        step: its asks and answers.
        logits: [any, vocabulary] fp32, that the step's answers are about.
    """
    ints, floats, doubles = (step.answers.view(dtype) for dtype in (torch.int32, torch.float32, torch.float64))
    numbers = chosen.answers.view(torch.int32), step.asks.view(torch.int32)
    launch(
        _adopt,
        (rows,),
        tables.places,
        tables.rows,
        *numbers,
        ints,
        floats,
        doubles,
        logits,
        logits.stride(0),
        num_warps=1,
    )


def adopt_reference(
    tables: ChangeTables, chosen: SamplingTables, step: SamplingTables, logits: torch.Tensor, rows: int
) -> None:
    """The same by PyTorch's operations; a graph can hold it."""
    places = tables.places[:rows].long()
    own, answers = chosen.answers[:rows].view(torch.int32), step.answers[places]
    ints = answers.view(torch.int32)
    sound, possible, told = ints[:, 1] != 0, own[:, 1] != 0, step.asks[places].view(torch.int32)[:, 9] >= 0
    token = torch.where(sound & possible, own[:, 2], ints[:, 2])
    logprob = (logits[tables.rows[:rows].long(), token.long()].double() - answers.view(torch.float64)[:, 2]).float()
    floats = answers.view(torch.float32)
    floats[:, 3] = torch.where(sound & possible & told, logprob, floats[:, 3])
    ints[:, 2] = token
    ints[:, 1] = torch.where(sound & ~possible, NOTHING_LEFT, ints[:, 1])
    step.answers.index_copy_(0, places, answers)


@triton.jit
def _allow(changed, logits, rows, bits, vocabulary, stride, words, TILE: tl.constexpr):
    at = tl.program_id(0)
    token = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = token < vocabulary
    x = tl.load(logits + tl.load(rows + at).to(tl.int64) * stride + token, mask=inside, other=0.0)
    word = tl.load(bits + at * words + (token >> 5), mask=inside, other=0)
    x = tl.where(((word >> (token & 31)) & 1) != 0, x, -float("inf"))
    tl.store(changed + at.to(tl.int64) * vocabulary + token, x, mask=inside)


@triton.jit
def _edit(changed, logits, rows, ints, floats, edits, vocabulary, stride, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < edits
    at = tl.load(ints + i * _WORDS, mask=inside, other=0)
    token = tl.load(ints + i * _WORDS + 1, mask=inside, other=0)
    row = tl.load(rows + at, mask=inside, other=0)
    place = changed + at.to(tl.int64) * vocabulary + token
    before = tl.load(place, mask=inside, other=0.0)
    value = tl.load(logits + row.to(tl.int64) * stride + token, mask=inside, other=0.0)
    value += tl.load(floats + i * _WORDS + 3, mask=inside, other=0.0)
    factor = tl.load(floats + i * _WORDS + 5, mask=inside, other=1.0)
    repeated = tl.where(value > 0, tl.div_rn(value, factor), value * factor)
    value = tl.where(tl.load(ints + i * _WORDS + 2, mask=inside, other=0) != 0, repeated, value)
    value -= tl.load(floats + i * _WORDS + 4, mask=inside, other=0.0)
    value = tl.where(value > -_LARGEST, value, -_LARGEST)  # what is no number is the least one
    value = tl.where(value < _LARGEST, value, _LARGEST)
    tl.store(place, value, mask=inside & (before > -float("inf")))


@triton.jit
def _adopt(places, rows, own, asks, answer_ints, answer_floats, answer_doubles, logits, stride):
    at = tl.program_id(0)
    ask = tl.load(places + at)
    if tl.load(answer_ints + ask * _ANSWER + 1) != 0:
        if tl.load(own + at * _ANSWER + 1) == 0:
            tl.store(answer_ints + ask * _ANSWER + 1, _NOTHING_LEFT)
        else:
            numbers = logits + tl.load(rows + at).to(tl.int64) * stride
            told = tl.load(asks + ask * _ASK + 9) >= 0
            log_sum = tl.load(answer_doubles + ask * (_ANSWER // 2) + 2)
            tell(answer_ints, answer_floats, ask, numbers, tl.load(own + at * _ANSWER + 2), told, log_sum)
