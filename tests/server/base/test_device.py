"""What `--device` means on a machine, and what is said where a card is passed over."""

from __future__ import annotations

import pytest
import torch

from loramux_adapters.device.cpu import CpuDevice
from loramux_adapters.errors import DeviceMissing
from loramux_server.base import device
from loramux_server.errors import ConfigError


def no_driver() -> None:
    raise DeviceMissing("NVIDIA's driver is not on this machine")


def test_a_card_that_auto_passes_over_is_named_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(device, "check_driver", lambda: None)
    said = device.passed_over("auto", CpuDevice())
    assert "the CPU is used: this PyTorch" in said and said.endswith("or say --device cpu")
    assert device.passed_over("cpu", CpuDevice()) == ""
    monkeypatch.setattr(device, "check_driver", no_driver)
    assert device.passed_over("auto", CpuDevice()) == "", "there is no card"


def test_a_card_that_cannot_be_had_is_refused_before_anything_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "check_driver", no_driver)
    device.check_device("auto")
    with pytest.raises(ConfigError, match="--device cuda: NVIDIA's driver is not on this machine, or use --device cpu"):
        device.check_device("cuda")
