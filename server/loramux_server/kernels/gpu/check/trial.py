"""One kernel on numbers of one shape: what it gives, what its reference gives, and how far these may be apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from loramux_server.kernels.gpu.step.operations import Operation
from loramux_server.kernels.gpu.step.workspace import CHECKED_ROWS

# Of a trial: more than the larger tiles of attention and of most products, and a part of the largest one's.
ROWS = CHECKED_ROWS
# What rows are also computed in: (first, number). By a product's tiles of 8, 16 and 32 rows, as all rows are by that of
# 64, and by attention's of either size; where there is one tile, two of them will do.
STEPS = ((0, 1), (1, 3), (3, 3), (4, 24), (10, 12))
FEW = ((0, 1), (3, 17))
_AT_ONCE = 8  # rows that are compared, in float64
Results = Sequence[torch.Tensor]


class WroteElsewhere(Exception):
    """A kernel changed memory that is not its result."""


class Near(NamedTuple):
    """How far a result may be from its reference, which is not rounded.

    A number is right if it is within `rounding` times what it should be, plus `sums` times the root mean square of its
    row. The first is the one rounding to the result's dtype; the second what sums of fp32 in another order differ by,
    which goes by the size of what is added up and not by that of the sum.
    """

    rounding: float
    sums: float


@dataclass(frozen=True, slots=True)
class KernelTrial:
    """
    Attributes:
        operation: its name in `Operations`.
        what: the shape, for people.
        run: (the operation, first row, number of rows) -> its results for these rows, each [rows, any].
        expected: the reference's results for all rows, in fp32 and not rounded.
        near: of each result.
        rows: how many there are.
        steps: which of them are also computed without the others.
    """

    operation: str
    what: str
    run: Callable[[Operation, int, int], Results]
    expected: Callable[[], Results]
    near: Sequence[Near]
    rows: int = ROWS
    steps: Sequence[tuple[int, int]] = FEW


class KernelVerdict(NamedTuple):
    """
    Attributes:
        agrees: every number is near enough.
        difference: the largest one, as a share of its row's root mean square; infinite where only one of the two is
            finite.
        same_bits: rows are the same alone and in company.
    """

    agrees: bool
    difference: float
    same_bits: bool


def judge(trial: KernelTrial, operation: Operation) -> KernelVerdict:
    """Runs it on all rows together and on some of them alone. Raises whatever the kernel raises."""
    expected = trial.expected()
    whole = [result.clone() for result in trial.run(operation, 0, trial.rows)]
    verdict = _compared(whole, expected, trial.near)
    for first, count in trial.steps:
        some = slice(first, min(first + count, trial.rows))
        if some.start >= some.stop:
            continue
        part = trial.run(operation, some.start, some.stop - some.start)
        found = _compared(part, [result[some] for result in expected], trial.near)
        verdict = KernelVerdict(
            verdict.agrees and found.agrees,
            max(verdict.difference, found.difference),
            verdict.same_bits and all(_same(a, b[some]) for a, b in zip(part, whole, strict=True)),
        )
    return verdict


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def _compared(found: Results, expected: Results, near: Sequence[Near]) -> KernelVerdict:
    agrees, difference = True, 0.0
    for ours, theirs, allowed in zip(found, expected, near, strict=True):
        for some in zip(ours.split(_AT_ONCE), theirs.split(_AT_ONCE), strict=True):
            right, off = _distance(*some, allowed)
            agrees, difference = agrees and right, max(difference, off)
    return KernelVerdict(agrees, difference, same_bits=True)


def _distance(found: torch.Tensor, expected: torch.Tensor, near: Near) -> tuple[bool, float]:
    """[rows, any]"""
    info = torch.finfo(found.dtype)
    least = info.smallest_normal * info.eps / 2  # the rounding of numbers that are too small to have all their bits
    found, expected, finite = found.double(), expected.double(), expected.isfinite()
    if not bool((found.isfinite() == finite).all()):
        return False, float("inf")
    found, expected = torch.where(finite, found, 0.0), torch.where(finite, expected, 0.0)
    size = expected.square().mean(-1, keepdim=True).sqrt()
    off = (found - expected).abs()
    right = bool((off <= near.rounding * expected.abs() + near.sums * size + least).all())
    return right, float((off / size.clamp(min=1e-30)).max())
