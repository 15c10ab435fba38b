"""Host memory reaches a device through two pinned buffers, of which none is written to while it is read."""

from __future__ import annotations

import pytest
import torch

from loramux_adapters.device.cpu import CpuDevice
from loramux_adapters.device.device import Device
from loramux_adapters.device.upload import Upload
from loramux_adapters.errors import DeviceFull
from support.emulated import EmulatedDevice


@pytest.mark.parametrize("device", [CpuDevice(), EmulatedDevice(), EmulatedDevice(early=0.5, seed=3)], ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (300,), (37, 5), (7, 3, 16)])
def test_it_arrives_whole_whatever_its_shape_and_dtype(shape: tuple[int, ...], device: Device) -> None:
    torch.manual_seed(0)
    upload = Upload(device, 256)
    source = torch.randn(shape)
    tos = [device.scratch(shape, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    for to in tos:
        upload.copy(to, source)
    for to in tos:
        assert torch.equal(device.take(to), source.to(to.dtype))


def test_a_part_of_a_wider_tensor_is_filled_and_nothing_beside_it() -> None:
    device = EmulatedDevice()
    upload = Upload(device, 64)
    wide = device.reserve((20, 10), torch.float32)
    source = torch.randn(6, 20).t()
    upload.copy(wide[:, 2:8], source)
    source.zero_()  # it may be changed afterwards
    found = device.take(wide)
    assert (found[:, 2:8] != 0).all() and not found[:, :2].any() and not found[:, 8:].any()


def test_memory_that_is_not_there_is_said_and_nothing_is_taken_before_the_first_copy() -> None:
    device = EmulatedDevice(total=100, refuses=[2])
    upload = Upload(device, 64)
    assert device.allocations == 0
    with pytest.raises(DeviceFull):
        upload.copy(device.scratch((4,), torch.float32), torch.zeros(4))
    with pytest.raises(DeviceFull):
        Upload(device, 128).landing()
    assert Upload(device, 64).landing().nbytes == 64
