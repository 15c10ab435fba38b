"""The packed head: its numbers, what is read of them, and its product."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from loramux_server.kernels.compiled.library import Compiled, native_library
from loramux_server.kernels.layers.packed_head import PackedHead, rows_of

LIBRARY = native_library()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="there are no compiled kernels")


def packed(weight: torch.Tensor) -> list[PackedHead]:
    """On every instruction set."""
    assert LIBRARY is not None
    dense = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.bfloat16)
    dense.weight = nn.Parameter(weight, requires_grad=False)
    return [PackedHead.of(dense, Compiled(LIBRARY, isa)) for isa in LIBRARY.isas]


def random_weight(vocabulary: int, inputs: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(vocabulary, inputs, generator=generator) * torch.logspace(-6, 3, vocabulary)[:, None]
    weight[3, 64:128] = 0.0
    return weight.bfloat16()


@pytest.mark.parametrize(("vocabulary", "inputs"), [(64, 64), (77, 192)])
def test_its_numbers_are_those_of_each_block_with_the_largest_at_2047(vocabulary: int, inputs: int) -> None:
    weight = random_weight(vocabulary, inputs)
    blocks = weight.float().view(vocabulary, -1, 64)
    largest = blocks.abs().amax(-1, keepdim=True)
    top = torch.full_like(largest, 2047)  # by a number PyTorch divides in another way
    whole = (blocks * torch.where(largest > 0, top / largest, 0.0)).round()
    expected = (whole * (largest / top)).view(vocabulary, inputs)
    for head in packed(weight):
        assert head.weight.nbytes == head.padded * inputs * 3 // 2
        assert torch.equal(rows_of(head.weight, head.scales, torch.arange(vocabulary)), expected)
        beyond = rows_of(head.weight, head.scales, torch.arange(vocabulary, head.padded))
        assert torch.equal(beyond, torch.zeros_like(beyond))


@pytest.mark.parametrize("rows", [0, 1, 2, 4, 5, 8, 9, 33])
def test_its_product_has_one_order_and_is_near_double_precision(rows: int) -> None:
    weight = random_weight(77, 192)
    x = torch.randn(rows, 192, generator=torch.Generator().manual_seed(rows))
    heads = packed(weight)
    exact = x.double() @ rows_of(heads[0].weight, heads[0].scales, torch.arange(77)).double().T
    found = heads[0](x)
    size = x.abs().double() @ weight.abs().double().T
    assert ((found - exact).abs() <= size / 16383 + 1e-30).all()
    for head in heads:
        assert torch.equal(head(x), found)
        assert torch.equal(torch.cat([found[:0], *(head(row[None]) for row in x)]), found)
