"""What `--device` means on this machine."""

from __future__ import annotations

from loramux_adapters.device.choice import device_named
from loramux_adapters.device.device import Device
from loramux_adapters.errors import DeviceMissing
from loramux_server.errors import ConfigError


def device_of(wanted: str) -> Device:
    """What `--device` (auto, cpu or cuda) means here. Raises ConfigError where there is no such device."""
    try:
        return device_named(wanted)
    except DeviceMissing as error:
        raise ConfigError(f"--device {wanted}: {error}; use --device cpu") from error
