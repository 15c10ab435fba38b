"""Which device: by the name that a user gives, or by where a tensor lies."""

from __future__ import annotations

import torch

from loramux_adapters.device.cpu import CpuDevice
from loramux_adapters.device.cuda import CudaDevice
from loramux_adapters.device.device import Device
from loramux_adapters.errors import DeviceMissing


def device_named(wanted: str) -> Device:
    """The device that "auto", "cpu" or "cuda" means here; "auto" is a CUDA device where there is one.

    Raises:
        DeviceMissing: there is no such device.
    """
    there = torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise DeviceMissing(
            f"this PyTorch ({torch.__version__}) is a build without CUDA; install the one with it"
            if torch.version.cuda is None
            else "PyTorch finds no CUDA device here; see what nvidia-smi shows"
        )
    return device_at(torch.device("cuda" if wanted == "cuda" or (wanted == "auto" and there) else "cpu"))


def device_at(place: torch.device) -> Device:
    """The device of tensors that lie there."""
    return CpuDevice() if place.type == "cpu" else CudaDevice(place)
