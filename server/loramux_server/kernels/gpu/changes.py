"""Rows of logits as tokens are chosen from them, on the device: biases and penalties, and what is forbidden.

Semantics: those of `loramux_server.kernels.compiled.logit_changes`, but for the last place of an edited logit where a
device fuses a product and a difference. What is forbidden has no bit among what is allowed: one token of a row has at
most one edit, and no other program writes to it.

Two kernels: one copies rows by their bits, a program for each tile of a row; the other edits single logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from loramux_server.kernels.compiled.logit_changes import RowChange
from loramux_server.kernels.gpu.cuts import EDIT_WORDS, ChangeSizes, SamplingError
from loramux_server.kernels.gpu.launch import Launch

TILE, BLOCK = 1024, 128  # numbers of a row, and edits, of one program
_LARGEST = tl.constexpr(float(np.finfo(np.float32).max))
_WORDS = tl.constexpr(EDIT_WORDS)
# an edit as it lies in its table; `at`: which of the changed rows
_PLACED = np.dtype(
    [("at", "i4"), ("token", "i4"), ("repeated", "i4"), ("add", "f4"), ("less", "f4"), ("repetition", "f4")]
)


class ChangeTables:
    """How rows are changed, and the changed rows: tensors of fixed sizes for `change`.

    Attributes:
        changed: [sizes.rows, vocabulary] fp32.
        rows: [sizes.rows] int32, of the logits.
        bits: [sizes.rows, words] int32, 1 where a token may be chosen.
        edits: [sizes.edits, EDIT_WORDS] int32.
    """

    def __init__(self, sizes: ChangeSizes, numbers: torch.Tensor, changed: torch.Tensor) -> None:
        """numbers: [sizes.numbers] int32; changed: [sizes.rows, vocabulary] fp32. Neither need be set."""
        self.sizes, self.numbers, self.changed = sizes, numbers, changed
        self.rows, bits, edits = numbers.split([sizes.rows, sizes.rows * sizes.words, sizes.edits * EDIT_WORDS])
        self.bits, self.edits = bits.view(sizes.rows, sizes.words), edits.view(sizes.edits, EDIT_WORDS)


def fill_rows(staging: npt.NDArray[np.int32], sizes: ChangeSizes, changes: Sequence[RowChange]) -> int:
    """Writes rows and bits of at most sizes.rows changes; returns how many numbers of `staging` count.

    staging: [sizes.numbers] on the host, as `ChangeTables.numbers`. Raises SamplingError: they are too many.
    """
    if len(changes) > sizes.rows:
        raise SamplingError(f"{len(changes)} rows are changed, and there is room for {sizes.rows}")
    staging[: len(changes)] = [one.row for one in changes]
    bits = staging[sizes.rows :][: sizes.rows * sizes.words].view(np.uint32).reshape(sizes.rows, sizes.words)
    for to, one in zip(bits, changes, strict=False):
        to[:] = 0xFFFFFFFF if one.allowed is None else one.allowed[: sizes.words]
        np.bitwise_and.at(to, one.forbidden >> 5, ~(np.uint32(1) << (one.forbidden & 31).astype(np.uint32)))
    return sizes.rows + len(changes) * sizes.words


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


def change(launch: Launch, tables: ChangeTables, logits: torch.Tensor, rows: int, edits: int) -> None:
    """The first `rows` of the tables are copied, then the first `edits` made. logits: [any, vocabulary] fp32.

    Rows that an earlier launch copied may get more edits, with `rows` 0.
    """
    sizes = tables.sizes
    if logits.shape[1] != sizes.vocabulary or logits.dtype != torch.float32 or logits.stride(1) != 1:
        raise SamplingError(f"logits of {logits.shape[1]} tokens, {logits.dtype}; a row is {sizes.vocabulary} of fp32")
    shape = sizes.vocabulary, logits.stride(0)
    if rows:
        grid = (rows, triton.cdiv(sizes.vocabulary, TILE))
        launch(_allow, grid, tables.changed, logits, tables.rows, tables.bits, *shape, sizes.words, TILE=TILE)
    if edits:
        numbers = tables.edits, tables.edits.view(torch.float32)
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


def change_reference(tables: ChangeTables, logits: torch.Tensor, rows: int, edits: int) -> None:
    """The same by PyTorch's operations."""
    none = torch.full((), -torch.inf, device=logits.device)
    if rows:
        tokens = torch.arange(tables.sizes.vocabulary, device=logits.device)
        for at in range(rows):
            own = logits[tables.rows[at : at + 1].long()]
            allowed = tables.bits[at][tokens >> 5] >> (tokens & 31) & 1
            tables.changed[at : at + 1].copy_(torch.where(allowed != 0, own, none))
    if edits:
        numbers = tables.edits[:edits]
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
