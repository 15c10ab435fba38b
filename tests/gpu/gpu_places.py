"""Where these tests run: a CUDA device; or, to see that they themselves are right, an emulated one.

`LORAMUX_TEST_EMULATED=1` asks for the emulated device (tests/support/emulated/), on which kernels run in Triton's
interpreter. Nothing is learned of a card that way.
"""

from __future__ import annotations

import os

import torch

from loramux_adapters.device.device import Device

EMULATED = os.environ.get("LORAMUX_TEST_EMULATED") == "1"


def device_here() -> Device:
    """Raises RuntimeError: there is no CUDA device, and nobody asks for the emulated one."""
    if EMULATED:
        from support import triton_interpreter

        triton_interpreter.prepare()
        from support.emulated import EmulatedDevice

        return EmulatedDevice(kernels="triton")
    if not torch.cuda.is_available():
        raise RuntimeError("these tests need a CUDA device")
    from loramux_adapters.device.cuda import CudaDevice

    return CudaDevice(torch.device("cuda", torch.cuda.current_device()))
