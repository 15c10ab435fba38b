"""What the system says of its memory and of this process's: total, available, the most ever."""

from __future__ import annotations

import os
import re
import resource
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_GROUP = Path("/sys/fs/cgroup")


def total_bytes() -> int:
    """Of the machine or, if it is less, of the control group that this process may not exceed."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(total, _number(_GROUP / "memory.max") or total)


def available_bytes() -> int:
    """Free memory of the machine or, if it is less, of the control group."""
    free = field(Path("/proc/meminfo"), "MemAvailable") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit, used = (_number(_GROUP / name) for name in ("memory.max", "memory.current"))
    if limit is not None and used is not None:
        free = min(free, max(0, limit - used))
    return free


def in_memory() -> int:
    """Bytes of this process that lie in memory; 0 where the system does not tell."""
    return field(_STATUS, "VmRSS")


class ProcessPeak:
    """The most that this process ever took, or took since `restart`, where the system lets the mark be set back."""

    def __init__(self) -> None:
        self._restarted = False

    def restart(self) -> None:
        try:
            _CLEAR.write_text("5")
            self._restarted = True
        except OSError:
            self._restarted = False  # then the mark since the process began is the best there is

    def bytes(self) -> int:
        return (field(_STATUS, "VmHWM") if self._restarted else 0) or _ever()


def field(path: Path, name: str) -> int:
    """A field of a /proc file in bytes; 0 if there is none."""
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB$", path.read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def _number(path: Path) -> int | None:
    """The number in a file; None where there is none, or no limit."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _ever() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
