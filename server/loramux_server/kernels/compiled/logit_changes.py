"""Rows of logits as tokens are chosen from them: biases and penalties applied, what is forbidden made impossible.

Semantics: y is a copy of a row of logits x [vocabulary]. At each token that is edited, in fp32 and in this order,
y = x + add; where it is repeated, y / repetition if y is positive, else y * repetition; y - less; and what is no finite
number then is the nearest one. At each token that is forbidden, or not allowed, y is minus infinity. Minus infinity
stays minus infinity.

On the CPU it is compiled code with the same bits on every instruction set (csrc/exact/changes.h).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

EDIT = np.dtype([("token", "i4"), ("repeated", "i4"), ("add", "f4"), ("less", "f4")])  # as abi.LogitEdit has it
WORD_BITS = 32
MOST_CHANGES = 16  # that one call makes: changed rows take memory
_LARGEST = np.float32(np.finfo(np.float32).max)


class RowChange(NamedTuple):
    """How one row is changed. Whoever takes it reads the arrays before the row's next change is asked for.

    Attributes:
        row: of the logits.
        edits: [n] of EDIT, of each token of the vocabulary at most one.
        forbidden: [m] int32, tokens of the vocabulary.
        allowed: [ceil(vocabulary / 32)] uint32, bit i of word w is token 32 w + i, 1 where it may be chosen; None: all.
        repetition: above 0; as fp32 has it.
    """

    row: int
    edits: npt.NDArray[np.void]
    forbidden: npt.NDArray[np.int32]
    allowed: npt.NDArray[np.uint32] | None = None
    repetition: float = 1.0


def words_for(vocabulary: int) -> int:
    """Words of bits, one bit for each token."""
    return -(-vocabulary // WORD_BITS)


def bits_of(tokens: Iterable[int], vocabulary: int) -> npt.NDArray[np.uint32]:
    """1 at each of these tokens; those outside the vocabulary are passed over."""
    flags = np.zeros(words_for(vocabulary) * WORD_BITS, dtype=np.uint8)
    flags[within(tokens, vocabulary)] = 1
    return np.packbits(flags, bitorder="little").view("<u4").astype(np.uint32, copy=False)


def flags_of(bits: npt.NDArray[np.uint32], vocabulary: int) -> npt.NDArray[np.bool_]:
    """[vocabulary]: which bits are set."""
    return np.unpackbits(bits.astype("<u4", copy=False).view(np.uint8), bitorder="little")[:vocabulary].astype(np.bool_)


def within(tokens: Iterable[int], vocabulary: int) -> npt.NDArray[np.int32]:
    """Those that are tokens of the vocabulary, each once, in order."""
    return np.array(sorted({token for token in tokens if 0 <= token < vocabulary}), dtype=np.int32)


def changed_reference(logits: torch.Tensor, changes: Sequence[RowChange]) -> torch.Tensor:
    """[changes, vocabulary] fp32 on the logits' device, by NumPy: the path of other devices, and the slow reference."""
    rows = logits[torch.tensor([one.row for one in changes], dtype=torch.long, device=logits.device)]
    changed = rows.detach().float().cpu().numpy().copy()
    with np.errstate(over="ignore", invalid="ignore"):
        for row, change in zip(changed, changes, strict=True):
            _change(row, change)
    return torch.from_numpy(changed).to(logits.device)


def _change(row: npt.NDArray[np.float32], change: RowChange) -> None:
    tokens, repetition = change.edits["token"], np.float32(change.repetition)
    logits = row[tokens]
    values = logits + change.edits["add"]
    repeated = np.where(values > 0, values / repetition, values * repetition)
    values = np.where(change.edits["repeated"] != 0, repeated, values) - change.edits["less"]
    values = np.where(values > -_LARGEST, np.minimum(values, _LARGEST), -_LARGEST)
    row[tokens] = np.where(logits == -np.inf, logits, values)
    if change.allowed is not None:
        row[~flags_of(change.allowed, len(row))] = -np.inf
    row[change.forbidden] = -np.inf
