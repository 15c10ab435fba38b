"""The most memory of a run that may have begun in an earlier process."""

from __future__ import annotations

from loramux_adapters.device.device import Device


class PeakMemory:
    """The most memory of a device from now on; loading the base is not part of training."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._least = 0
        device.restart_peak()

    def at_least(self, peak: int) -> None:
        """Counts what an earlier process of the same run took."""
        self._least = max(self._least, peak)

    def peak(self) -> int:
        """Bytes."""
        return max(self._least, self._device.memory().peak)
