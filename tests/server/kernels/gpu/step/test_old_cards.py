"""Cards before Ampere: fp16, and no products on tensor cores as Triton makes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from loramux_adapters.device.device import Device
from loramux_server.kernels.gpu.nf4 import Nf4Weights
from loramux_server.kernels.gpu.split_sums import ROW_TILES, has_tensor_cores, row_tiles_of
from loramux_server.kernels.gpu.step.nf4_linear import TritonNF4Linear
from loramux_server.kernels.gpu.training.layers import trained
from support.emulated import EmulatedDevice
from support.gpu_steps import MIXED, AtOnce, Row, TinySteps, prompts
from support.stepping import relative_difference


def after_prompts(device: Device) -> TinySteps:
    steps = TinySteps(device)
    steps.load()
    rows = [Row(sequence, 0, tuple(tokens)) for sequence, tokens in enumerate(prompts())]
    steps.start(rows, MIXED).read()
    return steps


def test_what_a_card_can_follows_from_its_capability() -> None:
    assert [has_tensor_cores(of) for of in ((0, 0), (7, 5), (8, 0), (12, 0))] == [True, False, True, True]
    assert row_tiles_of((7, 5)) == ROW_TILES[:1] and row_tiles_of((0, 0)) == row_tiles_of((8, 9)) == ROW_TILES


class OldCard(AtOnce):
    """Remembers the rows of a product's programs."""

    capability = (7, 5)

    def __init__(self) -> None:
        super().__init__()
        self.tiles: set[int] = set()

    def launch(self, kernel: Any, grid: tuple[int, ...], /, *args: Any, **constants: Any) -> None:
        self.tiles.add(constants["ROWS"])
        super().launch(kernel, grid, *args, **constants)


def test_layers_outside_of_a_whole_step_take_small_tiles_too() -> None:
    card, random = OldCard(), torch.Generator().manual_seed(0)
    codes = torch.randint(16, (64, 64), generator=random, dtype=torch.uint8)
    weights = Nf4Weights.packed(codes, torch.rand(64, 1, generator=random))
    layer, x = TritonNF4Linear(weights, None, card), torch.randn(30, 64, generator=random)
    dense = nn.Linear(64, 64, bias=False).to(card.activations)
    for compute in (layer, trained(layer, card).product, trained(dense, card).product):
        assert compute(x).shape == (30, 64)
    assert card.tiles == {8}


def test_a_step_is_the_same_in_small_tiles() -> None:
    expected = after_prompts(AtOnce()).logits(3)
    device = EmulatedDevice(capability=(7, 5))
    steps = after_prompts(device)

    assert steps.decoder.row_tiles == (8,) and not steps.decoder.tables.attention.sizes.tensor_cores
    assert relative_difference(steps.logits(3), expected) < 0.003
