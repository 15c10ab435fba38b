"""Norms of changed rows by products of few rows, against the weights dequantized."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from loramux_adapters import nf4
from loramux_server.kernels.compiled.library import Compiled, native_library
from loramux_server.kernels.layers.nf4_linear import NF4Linear, tiles
from loramux_server.kernels.layers.packed_head import PackedHead, rows_of
from loramux_server.kernels.layers.served_weights import ServedWeights, dense_norms

LIBRARY = native_library()


class Layers(nn.Module):
    def __init__(self, compiled: Compiled, inputs: int, outputs: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(outputs)
        weight = torch.randn(outputs, inputs, generator=generator) * torch.rand(outputs, 1, generator=generator)
        codes, scales = nf4.quantize(weight)
        bias = torch.randn(outputs, generator=generator).bfloat16()
        self.linear = NF4Linear(tiles(codes), scales.t().contiguous(), bias, compiled)
        head = nn.Linear(inputs, outputs, bias=False)
        head.weight.data = weight.bfloat16()
        self.dense = head
        self.head = PackedHead.of(head, compiled)


def adapter(rank: int, inputs: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    a = torch.randn(rank, inputs, generator=generator).bfloat16().float() / inputs**0.5
    return a, torch.randn(rank, outputs, generator=generator) * 0.2


@pytest.mark.skipif(LIBRARY is None, reason="there are no compiled kernels")
@pytest.mark.parametrize("rank", [1, 8, 33])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 32), (576, 192), (128, 2080)])
def test_norms_are_those_of_the_weights_that_are_served(rank: int, inputs: int, outputs: int) -> None:
    assert LIBRARY is not None
    a, bt = adapter(rank, inputs, outputs)
    found: dict[str, list[torch.Tensor]] = {"linear": [], "head": [], "dense": []}
    for isa in LIBRARY.isas:
        layers = Layers(Compiled(LIBRARY, isa), inputs, outputs)
        weights = ServedWeights(layers)
        for name, results in found.items():
            results += [weights.norms(name, a, bt), weights.norms(name, a, bt)]
    expected = {
        "linear": dense_norms(layers.linear.dequantized(), a, bt),
        "head": dense_norms(rows_of(layers.head.weight, layers.head.scales, torch.arange(outputs)), a, bt),
        "dense": dense_norms(layers.dense.weight, a, bt),
    }
    for name, results in found.items():
        assert torch.allclose(results[0], expected[name], rtol=3e-4, atol=0), name
        assert all(torch.equal(results[0], other) for other in results[1:]), name


@pytest.mark.skipif(LIBRARY is None, reason="there are no compiled kernels")
def test_biases_are_given_in_fp32_and_unknown_layers_are_not_there() -> None:
    assert LIBRARY is not None
    layers = Layers(LIBRARY.best, 64, 32)
    weights = ServedWeights(layers)
    bias = weights.bias("linear")
    assert bias is not None and torch.equal(bias, layers.linear.bias.float())
    assert weights.bias("head") is None
    assert "linear" in weights and "none" not in weights
