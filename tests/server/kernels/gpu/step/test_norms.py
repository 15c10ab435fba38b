"""Norms of changed rows of layers on a card: computed there beside steps, of weights as products count them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from loramux_adapters import nf4
from loramux_adapters.device.device import Device
from loramux_adapters.errors import DeviceFull
from loramux_adapters.lora.affine import magnitude_scale
from loramux_server.kernels.gpu.launch import launch_now
from loramux_server.kernels.gpu.nf4 import Nf4Weights, nf4_product
from loramux_server.kernels.gpu.split_sums import scratch_numbers
from loramux_server.kernels.gpu.step.nf4_linear import TritonNF4Linear
from loramux_server.kernels.layers import served_weights
from loramux_server.kernels.layers.served_weights import ServedWeights, dense_norms
from support.emulated import EmulatedDevice


class Layers(nn.Module):
    """Two layers side by side in memory, as a whole step has them, and one in 16 bits."""

    def __init__(self, device: Device, inputs: int = 192, outputs: int = 100) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(outputs)
        weight = torch.randn(2 * outputs, inputs, generator=generator) * torch.rand(2 * outputs, 1, generator=generator)
        self.quantized = nf4.quantize(weight)
        packed = Nf4Weights.packed(*self.quantized)
        whole = Nf4Weights(device.put(packed.codes), device.put(packed.scales))
        bias = device.put(torch.randn(outputs, generator=generator).half())
        self.first = TritonNF4Linear(whole.part(0, outputs), bias, device)
        self.second = TritonNF4Linear(whole.part(outputs, 2 * outputs), None, device)
        self.head = nn.Linear(inputs, outputs, bias=False)
        self.head.weight.data = device.put(weight[:outputs].half())


def adapter(rank: int, inputs: int = 192, outputs: int = 100) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    a = torch.randn(rank, inputs, generator=generator) / inputs**0.5
    return a, torch.randn(rank, outputs, generator=generator) * 0.2


@pytest.mark.parametrize("rank", [1, 8, 33])
@pytest.mark.parametrize("together", [64, 192 * 7, 1 << 20])
def test_norms_are_those_of_the_weights_as_products_count_them(
    monkeypatch: pytest.MonkeyPatch, rank: int, together: int
) -> None:
    """However many outputs are unpacked at a time."""
    monkeypatch.setattr(served_weights, "_ON_DEVICE", together)
    device = EmulatedDevice()
    layers = Layers(device)
    weights = ServedWeights(layers, device=device)
    a, bt = adapter(rank)
    for index, name in enumerate(("first", "second")):
        codes, scales = (part[100 * index : 100 * (index + 1)] for part in layers.quantized)
        levels = nf4.levels().half().float()
        counted = levels[codes.int()] * scales.repeat_interleave(nf4.BLOCK, dim=1)
        found = weights.norms(name, a, bt)
        assert found.dtype == torch.float32 and found.shape == (100,)
        torch.testing.assert_close(found, dense_norms(counted, a, bt), rtol=1e-5, atol=0)
    torch.testing.assert_close(weights.norms("head", a, bt), dense_norms(layers.head.weight, a, bt), rtol=1e-6, atol=0)
    bias = weights.bias("first")
    assert bias is not None and torch.equal(bias, layers.first.bias.float()) and weights.bias("second") is None


def test_a_magnitude_that_is_the_norm_of_what_products_give_changes_nothing() -> None:
    """The norm by way of the product's kernel: of each unit vector."""
    device = EmulatedDevice()
    layers = Layers(device)
    rows = torch.eye(192).half()
    product = torch.empty(192, 100)
    scratch = torch.empty(max(1, scratch_numbers(192, 192, 100)))
    nf4_product(launch_now, product, rows, layers.second.nf4, scratch)
    none = torch.zeros(1, 192), torch.zeros(1, 100)
    weights = ServedWeights(layers, device=device)
    s = magnitude_scale(weights, "second", product.norm(dim=0), *none)
    torch.testing.assert_close(s, torch.ones(100), rtol=1e-5, atol=0)


def test_threads_ask_while_steps_wait_and_the_steps_go_on_waiting() -> None:
    device = EmulatedDevice()
    layers = Layers(device)
    weights = ServedWeights(layers, device=device)
    adapters = [adapter(rank) for rank in (2, 5, 9, 16)]
    expected = [weights.norms("second", *each) for each in adapters]
    step = device.scratch((4,), torch.float32)
    device.fill(step, 1.0)  # of a step, which nobody has waited for
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda each: weights.norms("second", *each), adapters * 3))
    assert all(torch.equal(one, other) for one, other in zip(found, expected * 3, strict=True))
    assert step.isnan().all()
    assert (device.take(step) == 1).all()


def test_without_room_on_the_card_it_says_what_to_lower() -> None:
    device = EmulatedDevice()
    weights = ServedWeights(Layers(device), device=device)
    device.refuses = range(device.allocations + 1, device.allocations + 9)
    with pytest.raises(DeviceFull, match="--device-memory-mib"):
        weights.norms("first", *adapter(8))


def test_little_memory_is_taken_and_all_of_it_given_back() -> None:
    device = EmulatedDevice()
    layers = Layers(device, inputs=4096, outputs=2048)
    weights = ServedWeights(layers, device=device)
    before = device.memory().held
    device.restart_peak()
    weights.norms("first", *adapter(16, 4096, 2048))
    assert device.memory().held == before
    assert device.memory().peak - before < 16 * 4 * (1 << 20)
