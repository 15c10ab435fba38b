"""The most memory that a training takes, as the system or the device counts it."""

from __future__ import annotations

import re
import resource
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """The most memory from now on: of the device on CUDA, else of the process."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._least = 0
        self._resets = False
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            _CLEAR.write_text("5")  # the high-water mark starts anew: loading the base is not part of training
            self._resets = True
        except OSError:
            pass  # then the mark since the process began is the best there is

    def at_least(self, peak: int) -> None:
        """Counts what an earlier process of the same run took."""
        self._least = max(self._least, peak)

    def peak(self) -> int:
        """Bytes."""
        if self._device.type == "cuda":
            return max(self._least, torch.cuda.max_memory_allocated(self._device))
        return max(self._least, (_status("VmHWM") if self._resets else 0) or _ever())


def _status(name: str) -> int:
    """A field of the process's status, in bytes; 0 if the system does not tell."""
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def _ever() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
