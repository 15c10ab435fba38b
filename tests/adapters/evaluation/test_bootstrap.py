"""Intervals and differences against theory and against a plain resampling of indices."""

from __future__ import annotations

import numpy as np
import pytest

from loramux_adapters.evaluation.bootstrap import RESAMPLES, Array, Interval, Resampled, difference, draws, gap


def share(sums: Array) -> Array:
    """Of features (hit, 1)."""
    result: Array = sums[..., 0] / sums[..., 1]
    return result


def hits(count: int, total: int) -> Array:
    return np.array([[1.0, 1.0]] * count + [[0.0, 1.0]] * (total - count))


def interval(features: Array, *, seed: int = 0) -> Interval:
    return Resampled(features, seed=seed).interval(share)


def test_a_resample_has_as_many_examples_as_there_are() -> None:
    counts = np.array([3, 0, 7, 90])
    drawn = draws(counts)

    assert drawn.shape == (RESAMPLES, 4)
    assert (drawn.sum(1) == 100).all()
    assert (drawn[:, 1] == 0).all()
    assert drawn.mean(0) == pytest.approx(counts, abs=0.5)


def test_the_interval_of_a_share_is_that_of_the_normal_approximation() -> None:
    found = interval(hits(300, 1000))
    error = 1.96 * (0.3 * 0.7 / 1000) ** 0.5

    assert found.value == pytest.approx(0.3)
    assert found.low == pytest.approx(0.3 - error, abs=0.004)
    assert found.high == pytest.approx(0.3 + error, abs=0.004)


def test_drawing_groups_is_drawing_examples() -> None:
    generator = np.random.default_rng(1)
    rows = np.stack([generator.integers(0, 3, 200), np.ones(200)], axis=1).astype(float)
    plain = share(rows[generator.integers(0, 200, (4000, 200))].sum(1))

    found = interval(rows)

    assert [found.low, found.high] == pytest.approx(np.quantile(plain, [0.025, 0.975]), abs=0.01)


def test_the_order_of_examples_does_not_matter_and_the_seed_does() -> None:
    rows = np.stack([np.random.default_rng(0).normal(size=100), np.ones(100)], axis=1)
    assert interval(rows) == interval(rows[::-1])
    assert interval(rows) != interval(rows, seed=1)


def test_examples_that_all_agree_leave_no_doubt() -> None:
    found = interval(hits(50, 50))
    assert (found.value, found.low, found.high) == (1.0, 1.0, 1.0)


def test_a_score_that_is_not_defined_has_no_interval() -> None:
    with np.errstate(invalid="ignore"):
        found = interval(np.zeros((10, 2)))
    assert not found.is_defined


def test_pairing_sees_a_small_difference_that_two_intervals_would_hide() -> None:
    second = hits(500, 1000)
    first = second.copy()
    first[500:515, 0] = 1.0  # 15 more right, none less

    paired = difference(first, second, share)
    apart = gap(first, second, share)

    assert paired.value == apart.value == pytest.approx(0.015)
    assert paired.is_significant and paired.p < 0.01
    assert not apart.is_significant and apart.p > 0.3
    assert paired.low == pytest.approx(0.015 - 1.96 * (0.015 * 0.985 / 1000) ** 0.5, abs=0.003)


def test_a_predictor_does_not_differ_from_itself() -> None:
    same = difference(hits(3, 10), hits(3, 10), share)
    assert (same.value, same.low, same.high, same.p) == (0.0, 0.0, 0.0, 1.0)


def test_the_smallest_p_is_what_so_many_resamples_can_tell() -> None:
    found = difference(hits(100, 100), hits(0, 100), share)
    assert found.p == pytest.approx(2 / (RESAMPLES + 1))
    assert found.is_significant
