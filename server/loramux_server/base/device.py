"""What `--device` means on this machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from loramux_adapters.device.driver import check_driver
from loramux_adapters.errors import DeviceMissing
from loramux_server.errors import ConfigError

if TYPE_CHECKING:
    from loramux_adapters.device.device import Device


def check_device(wanted: str) -> None:
    """Says within a moment, before a base is fetched and PyTorch imported, that `--device` cannot be had.

    Raises:
        ConfigError: a CUDA device is wanted, and its driver is not here.
    """
    if wanted != "cuda":
        return
    try:
        check_driver()
    except DeviceMissing as error:
        raise _missing(wanted, error) from error


def device_of(wanted: str, note: Callable[[str], None] = lambda line: None) -> Device:
    """What `--device` (auto, cpu or cuda) means here.

    Args:
        note: is told where "auto" takes the CPU although there seems to be a card.
    Raises:
        ConfigError: there is no such device.
    """
    from loramux_adapters.device.choice import device_named  # PyTorch

    try:
        device = device_named(wanted)
    except DeviceMissing as error:
        raise _missing(wanted, error) from error
    if said := passed_over(wanted, device):
        note(said)
    return device


def passed_over(wanted: str, device: Device) -> str:
    """For people: "auto" took the CPU though NVIDIA's driver is here, and why; empty where that is not so."""
    from loramux_adapters.device.choice import device_named

    if wanted != "auto" or not device.is_host:
        return ""
    try:
        check_driver()
    except DeviceMissing:
        return ""
    try:
        device_named("cuda")
    except DeviceMissing as error:
        return f"NVIDIA's driver is here, and the CPU is used: {error}, or say --device cpu"
    return ""


def _missing(wanted: str, error: DeviceMissing) -> ConfigError:
    return ConfigError(f"--device {wanted}: {error}, or use --device cpu")
