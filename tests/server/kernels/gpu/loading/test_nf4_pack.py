"""NF4 weights made on the device: the slow quantizer's codes, and bitsandbytes', where the products read them."""

from __future__ import annotations

import pytest
import torch

from loramux_adapters import nf4 as plain
from loramux_server.kernels.gpu.launch import launch_now
from loramux_server.kernels.gpu.loading.nf4_pack import quantize, quantize_reference, repack, repack_reference
from loramux_server.kernels.gpu.nf4 import Nf4Weights

SHAPES = [(64, 64), (192, 40), (128, 33)]  # inputs, outputs


def empty(device: torch.device, inputs: int, outputs: int) -> tuple[Nf4Weights, Nf4Weights]:
    """A weight of three times as many outputs, and the middle of them."""
    codes = torch.full((inputs // 64, 3 * outputs, 32), 77, dtype=torch.uint8, device=device)
    whole = Nf4Weights(codes, torch.full((inputs // 64, 3 * outputs), 7.0, device=device))
    return whole, whole.part(outputs, 2 * outputs)


def untouched(whole: Nf4Weights) -> bool:
    outputs = whole.outputs // 3
    edges = [whole.part(0, outputs), whole.part(2 * outputs, 3 * outputs)]
    return all(bool((each.codes == 77).all() and (each.scales == 7.0).all()) for each in edges)


@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_codes_and_largest_numbers_are_those_of_the_slow_quantizer(
    inputs: int, outputs: int, device: torch.device
) -> None:
    torch.manual_seed(inputs)
    weight = (torch.randn(outputs, inputs) * torch.logspace(-6, 3, outputs)[:, None]).bfloat16()
    weight[0] = 0
    # numbers that lie just at, below and above the middle of two levels
    middles = torch.cat([plain.bounds(), torch.tensor([1.0])]).bfloat16()
    weight[1, :48] = torch.cat([middles, middles * 1.01, middles * 0.99]).bfloat16()
    weight[2, 3], weight[3, 60] = -0.0, 1e-39
    found, part = empty(device, inputs, outputs)
    quantize(launch_now, part, weight.to(device))
    _, expected = empty(device, inputs, outputs)
    quantize_reference(expected, weight.to(device))
    assert torch.equal(part.codes, expected.codes) and torch.equal(part.scales, expected.scales)
    assert torch.equal(part.unpacked()[0].cpu(), plain.quantize(weight)[0])
    assert untouched(found)


@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_codes_that_bitsandbytes_packed_keep_their_places(inputs: int, outputs: int, device: torch.device) -> None:
    torch.manual_seed(outputs)
    codes = torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8)
    pairs = codes[:, ::2] << 4 | codes[:, 1::2]
    found, part = empty(device, inputs, outputs)
    repack(launch_now, part, pairs.to(device))
    _, expected = empty(device, inputs, outputs)
    repack_reference(expected, pairs.to(device))
    assert torch.equal(part.codes, expected.codes)
    assert torch.equal(part.unpacked()[0].cpu(), codes) and untouched(found)
