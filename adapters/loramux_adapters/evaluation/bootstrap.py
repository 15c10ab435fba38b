"""How sure a score is: bootstrap intervals, and paired differences of two predictors on the same examples.

Examples that count the same (same true label, same predictions) are drawn together: a resample of n examples is then a
multinomial draw over the groups, which is the same distribution and needs no list of 2,000 times n indices.

NumPy is enough. `scipy.stats.bootstrap` would draw anew for each score, where all scores here share their resamples; it
gives no p for a difference, and other bounds than the reports that are already published. Its import takes a second.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

RESAMPLES = 2000
LEVEL = 0.95
SEED = 0

Array = npt.NDArray[Any]
# sums over the examples of a resample [..., features] -> the score of each [...]
Statistic = Callable[[Array], Array]


@dataclass(frozen=True, slots=True)
class Interval:
    """A score with the bounds of its 95 % bootstrap interval; all NaN where it is not defined."""

    value: float
    low: float
    high: float

    @property
    def is_defined(self) -> bool:
        return self.value == self.value


@dataclass(frozen=True, slots=True)
class Difference:
    """The score of one predictor minus that of another on the same examples.

    Attributes:
        p: two-sided; how often a resample would put the difference on the other side of zero. At least 2 / 2,001.
    """

    value: float
    low: float
    high: float
    p: float

    @property
    def is_significant(self) -> bool:
        """The interval leaves zero out, and p is below 0.05; at the border the one can be without the other."""
        return (self.low > 0 or self.high < 0) and self.p < 0.05


def draws(counts: Array, *, resamples: int = RESAMPLES, seed: int = SEED) -> Array:
    """Resamples of as many examples as there are: how often each group comes up.

    Args:
        counts: [groups] how many examples are in each group.
    Returns:
        [resamples, groups] float64.
    """
    total = int(counts.sum())
    generator = np.random.default_rng(seed)
    return generator.multinomial(total, counts / total, size=resamples).astype(np.float64)


class Resampled:
    """A set of examples and its resamples, drawn once for any number of scores.

    Attributes:
        sums: [features] of the examples themselves.
        resampled: [resamples, features] of each resample.
    """

    def __init__(self, features: Array, *, seed: int = SEED) -> None:
        """`features`: [examples, features] what each example adds to the sums that a score is a function of."""
        rows, counts = np.unique(features, axis=0, return_counts=True)
        self.sums: Array = counts.astype(np.float64) @ rows
        self.resampled: Array = draws(counts, seed=seed) @ rows

    def interval(self, statistic: Statistic) -> Interval:
        """A score and its bounds."""
        return _with_bounds(float(statistic(self.sums)), statistic(self.resampled))


def difference(first: Array, second: Array, statistic: Statistic, *, seed: int = SEED) -> Difference:
    """first - second, where row i of both [examples, features] is the same example, drawn together."""
    width = first.shape[1]
    both = Resampled(np.concatenate([first, second], axis=1), seed=seed)

    def apart(sums: Array) -> Array:
        return statistic(sums[..., :width]) - statistic(sums[..., width:])

    return _difference(float(apart(both.sums)), apart(both.resampled))


def gap(first: Array, second: Array, statistic: Statistic, *, seed: int = SEED) -> Difference:
    """first - second, of two different sets of examples [examples, features], each drawn on its own."""
    one, other = Resampled(first, seed=seed), Resampled(second, seed=seed + 1)
    value = float(statistic(one.sums)) - float(statistic(other.sums))
    return _difference(value, statistic(one.resampled) - statistic(other.resampled))


def _with_bounds(value: float, samples: Array) -> Interval:
    kept = samples[np.isfinite(samples)]
    if value != value or kept.size == 0:
        return Interval(float("nan"), float("nan"), float("nan"))
    low, high = np.quantile(kept, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))


def _difference(value: float, samples: Array) -> Difference:
    bounds = _with_bounds(value, samples)
    kept = samples[np.isfinite(samples)]
    if not bounds.is_defined:
        return Difference(value, bounds.low, bounds.high, float("nan"))
    one_sided = min(int((kept <= 0).sum()), int((kept >= 0).sum()))
    p = min(1.0, 2 * (one_sided + 1) / (kept.size + 1))
    return Difference(bounds.value, bounds.low, bounds.high, p)
