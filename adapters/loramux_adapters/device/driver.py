"""Whether there can be a CUDA device at all: asked before PyTorch is imported, which takes seconds."""

from __future__ import annotations

import ctypes

from loramux_adapters.errors import DeviceMissing

DRIVER = "libcuda.so.1"  # NVIDIA's driver brings it, and PyTorch opens it by this name


def check_driver() -> None:
    """Raises DeviceMissing: NVIDIA's driver is not here."""
    try:
        ctypes.CDLL(DRIVER)
    except OSError as error:
        raise DeviceMissing(
            f"NVIDIA's driver is not on this machine (there is no {DRIVER}); install it, in Docker give --gpus all"
        ) from error
