"""Cards before Ampere: fp16, and no products on tensor cores as Triton makes them."""

from __future__ import annotations

from loramux_adapters.device.device import Device
from loramux_server.kernels.gpu.split_sums import ROW_TILES, has_tensor_cores, row_tiles_of
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


def test_a_step_is_the_same_in_small_tiles() -> None:
    expected = after_prompts(AtOnce()).logits(3)
    device = EmulatedDevice(capability=(7, 5))
    steps = after_prompts(device)

    assert steps.decoder.row_tiles == (8,) and not steps.decoder.tables.attention.sizes.tensor_cores
    assert relative_difference(steps.logits(3), expected) < 0.003
