"""The product of a given rank that is closest to a matrix."""

from __future__ import annotations

import pytest
import torch

from loramux_adapters.lora.closest_pair import closest_pair


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (24, 24)])
@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_no_pair_of_that_rank_is_closer(shape: tuple[int, int], scale: float) -> None:
    torch.manual_seed(1)
    residual = torch.randn(shape)
    a, b = closest_pair(residual, 5, scale)
    assert (a.shape, b.shape) == ((5, shape[1]), (shape[0], 5))
    left = (residual - scale * b @ a).norm()
    assert left == pytest.approx(float(torch.linalg.svdvals(residual)[5:].norm()), rel=1e-4)
    assert a.norm() == pytest.approx(float(b.norm()), rel=1e-4)


def test_a_rank_above_the_smaller_side_reaches_the_residual_itself() -> None:
    residual = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))
    a, b = closest_pair(residual, 6, 1.0)
    assert (a.shape, b.shape) == ((6, 8), (3, 6))
    assert torch.allclose(b @ a, residual, atol=1e-5)


def test_nothing_lost_means_zeros() -> None:
    a, b = closest_pair(torch.zeros(8, 4), 2, 1.0)
    assert not a.any() and not b.any()
