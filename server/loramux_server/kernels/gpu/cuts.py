"""How work is cut into parts, and how much scratch the parts take: numbers alone.

Without Triton, since a plan of a card's memory is made on machines that have none (step/workspace.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from loramux_server.kernels.compiled.logit_changes import MOST_CHANGES, words_for
from loramux_server.kernels.decoder.asks import ANSWER

OUTPUTS_TOGETHER = 64  # of one program of a product
BLOCK = 64  # inputs; a part is a number of whole blocks
_PROGRAMS = 512  # that a product should have at least: four for each of an H100's 132 processors
_MOST_PARTS = 8
_LEAST_BLOCKS = 4  # in one part
LORA_PART = 512  # inputs in one part of a LoRA sum, and more where there would be more than _MOSTLORA_PARTS
_MOSTLORA_PARTS = 16
_LORA_STEP = 128  # a part is a multiple of it


def parts_of(inputs: int, outputs: int) -> int:
    """How many parts the sum over `inputs` is cut into: a power of two."""
    parts = 1
    while (
        parts < _MOST_PARTS
        and 2 * parts * _LEAST_BLOCKS <= inputs // BLOCK
        and parts * -(-outputs // OUTPUTS_TOGETHER) < _PROGRAMS
    ):
        parts *= 2
    return parts


def scratch_numbers(rows: int, inputs: int, outputs: int) -> int:
    """How many fp32 numbers of scratch a product of this shape needs; products one after another may share them."""
    parts = parts_of(inputs, outputs)
    return 0 if parts == 1 else parts * rows * outputs


def lora_parts_of(inputs: int) -> tuple[int, int]:
    """(inputs of a part, number of parts) of a LoRA sum over so many inputs."""
    length = max(LORA_PART, -(-inputs // (_MOSTLORA_PARTS * _LORA_STEP)) * _LORA_STEP)
    return length, -(-inputs // length)


LARGEST_VOCABULARY = 1 << 18
KEEP = 32  # first tokens that sampling keeps of each tile of a row
BINS = 2048  # intervals of logits
LISTED = 4096  # tokens of an interval that are listed; where there are more, a row is gone through each time
_TILES = 64  # of a row, at most: they are the work of one program each
_LEAST_TILE = 256

# one ask of a step, as it lies in its tensor
ASK = np.dtype(
    [("uniform", "f8"), ("top_p", "f8"), ("factor", "f4"), ("cut", "f4")]
    + [(name, "i4") for name in ("row", "top_k", "token", "top")]
)
ASK_WORDS, ANSWER_WORDS = ASK.itemsize // 8, ANSWER.itemsize // 8  # of 64 bits


class SamplingError(ValueError):
    """More is asked than the tables have room for, or can be asked at all."""


@dataclass(frozen=True)
class SamplingSizes:
    """For how many asks, of logits of how many tokens, tables are made.

    Raises:
        SamplingError: a vocabulary whose weights 64 bits cannot add up.
    """

    asks: int
    vocabulary: int

    def __post_init__(self) -> None:
        if not 0 < self.vocabulary <= LARGEST_VOCABULARY:
            raise SamplingError(f"{self.vocabulary} tokens; logits of 1 to {LARGEST_VOCABULARY} can be sampled here")

    @property
    def tile(self) -> int:
        """Tokens of one program."""
        return max(_LEAST_TILE, _power_of_two(-(-self.vocabulary // _TILES)))

    @property
    def tiles(self) -> int:
        return -(-self.vocabulary // self.tile)

    @property
    def places(self) -> int:
        """For the results of a row's tiles, a power of two."""
        return _power_of_two(self.tiles)

    def scratch(self) -> dict[str, tuple[int, torch.dtype]]:
        """How many numbers of what kind the kernels hand to each other."""
        each = {
            "tops": (self.places, torch.int64),
            "keys": (self.places * KEEP, torch.int64),
            "masses": (3 * self.places, torch.int64),
            "counts": (2 * BINS, torch.int64),
            "sick": (self.places, torch.int32),
            "lists": (LISTED, torch.int32),
            "states": (1, torch.int32),
        }
        return {name: (self.asks * count, dtype) for name, (count, dtype) in each.items()}


EDIT_WORDS = 6  # of 32 bits, of one edit of a logit
_EDITS = 256  # of a row, at a time; a launch takes those of all rows together


@dataclass(frozen=True)
class ChangeSizes:
    """For how many rows of logits, of how many tokens, tables of changes are made: of those that are changed together.

    A table is one piece of 32-bit numbers: what is asked of the rows, which ask of the step each is, the rows, then
    bits of as many as there are, then edits.
    """

    rows: int
    vocabulary: int

    @classmethod
    def of(cls, samples: int, vocabulary: int) -> ChangeSizes:
        """Of steps with logits of so many rows."""
        return cls(min(samples, MOST_CHANGES), vocabulary)

    @property
    def words(self) -> int:
        """Of 32 bits, a bit for each token."""
        return words_for(self.vocabulary)

    @property
    def edits(self) -> int:
        """Of one launch."""
        return self.rows * _EDITS

    @property
    def heads(self) -> int:
        """Numbers in front of the bits; these are aligned to 16 bytes, as edits are behind them."""
        return aligned(self.rows * (2 * ASK_WORDS + 2))

    @property
    def numbers(self) -> int:
        """Of 32 bits, of all tables."""
        return self.heads + aligned(self.rows * self.words) + self.edits * EDIT_WORDS


def aligned(numbers: int) -> int:
    """As many numbers of 32 bits, up to the next 16 bytes."""
    return -(-numbers // 4) * 4


def _power_of_two(count: int) -> int:
    """The least that is not below."""
    return 1 << (count - 1).bit_length()
