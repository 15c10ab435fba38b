"""Which device a command runs on."""

from __future__ import annotations

import torch

from loramux_server.errors import ConfigError


def device_of(wanted: str) -> torch.device:
    """What `--device` (auto, cpu or cuda) means here. Raises ConfigError where there is no such device."""
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise ConfigError("--device cuda: PyTorch finds no CUDA device here; use --device cpu")
    return torch.device("cuda" if wanted == "cuda" or (wanted == "auto" and available) else "cpu")
