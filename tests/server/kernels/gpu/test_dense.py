"""Products with weights of 16 bits: the reference's numbers, any shape, and each row alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from loramux_server.kernels.gpu.dense import dense_product, dense_product_reference
from loramux_server.kernels.gpu.launch import launch_now
from loramux_server.kernels.gpu.split_sums import scratch_numbers

# inputs, outputs: one tile; neither a multiple of a tile; several parts, of unequal length
SHAPES = [(64, 64), (72, 100), (576, 72), (1096, 24)]


def product(x: torch.Tensor, weight: torch.Tensor, **options: Any) -> torch.Tensor:
    y = torch.full((x.shape[0], weight.shape[0]), 7.0, device=x.device)
    numbers = scratch_numbers(x.shape[0], weight.shape[1], weight.shape[0])
    dense_product(launch_now, y, x, weight, torch.full((numbers,), torch.nan, device=x.device), **options)
    return y


def tensors(device: torch.device, act: torch.dtype, rows: int, inputs: int, outputs: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(*shape).to(device, act) for shape in ((rows, inputs), (outputs, inputs))]


@pytest.mark.parametrize("inputs, outputs", SHAPES)
@pytest.mark.parametrize("rows", [1, 19, 40])
def test_products_are_those_of_the_reference(
    inputs: int, outputs: int, rows: int, device: torch.device, act: torch.dtype
) -> None:
    x, weight = tensors(device, act, rows, inputs, outputs)
    wanted = torch.empty(rows, outputs, device=device)
    dense_product_reference(wanted, x, weight)
    torch.testing.assert_close(product(x, weight), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("inputs, outputs", SHAPES[1:3])
def test_a_row_has_the_same_bits_alone_and_among_any_others(
    inputs: int, outputs: int, device: torch.device, act: torch.dtype
) -> None:
    x, weight = tensors(device, act, 34, inputs, outputs)
    together = product(x, weight)
    for first, end in ((0, 1), (33, 34), (3, 20), (1, 34)):
        assert torch.equal(product(x[first:end].contiguous(), weight), together[first:end])
    for tiles in ((8,), (16,), (32, 64), (64,)):
        assert torch.equal(product(x, weight, row_tiles=tiles), together)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_no_number_harms_no_other(bad: float, device: torch.device, act: torch.dtype) -> None:
    x, weight = tensors(device, act, 5, 576, 72)
    wanted = product(x, weight)
    x[2, 400] = bad
    y = product(x, weight)
    assert not y[2].isfinite().any()
    assert torch.equal(y[[0, 1, 3, 4]], wanted[[0, 1, 3, 4]])


def test_no_rows_are_no_work(device: torch.device, act: torch.dtype) -> None:
    x, weight = tensors(device, act, 0, 64, 64)
    assert product(x, weight).shape == (0, 64)


def test_weights_of_another_dtype_are_refused(device: torch.device, act: torch.dtype) -> None:
    x, weight = tensors(device, act, 2, 64, 64)
    with pytest.raises(AssertionError):
        product(x, weight.float())
