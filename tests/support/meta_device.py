"""PyTorch's `meta` device as a `Device`: it knows shapes, and has neither memory nor anything to wait for."""

from __future__ import annotations

import torch

from loramux_adapters.device.cpu import CpuDevice
from loramux_adapters.device.device import ON_CARD


class MetaDevice(CpuDevice):
    """Stands for a device that is not the CPU, and has no kernels of its own."""

    layout = ON_CARD
    is_host = False
    kernels = "tensor"

    def __init__(self) -> None:
        super().__init__()
        self.place = torch.device("meta")

    def reserve(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.place)

    def put(self, source: torch.Tensor) -> torch.Tensor:
        return source.to(self.place)
