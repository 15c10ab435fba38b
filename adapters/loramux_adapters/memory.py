"""Host memory: tensors that take it only where they are written to, memory that goes back when free, and peaks."""

from __future__ import annotations

import ctypes
import gc
import math
import mmap
import os
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

_HUGE_PAGE = 2 << 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def mapping(nbytes: int, *, huge_pages: bool = False) -> torch.Tensor:
    """[nbytes] uint8 zeros in host memory, a mapping of its own: all of it goes back to the system with its last view.

    Args:
        huge_pages: ask for pages of 2 MiB, where the system has them: a processor then waits less often for what it
            reads once and not soon again. The tensor begins at such a page.
    Raises:
        MemoryError: there is no room for it.
    """
    huge_pages &= nbytes >= _HUGE_PAGE
    size = (-(-nbytes // _HUGE_PAGE) + 1) * _HUGE_PAGE if huge_pages else max(1, nbytes)
    try:
        mapped = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{nbytes} bytes of host memory cannot be had") from error
    offset = 0
    if huge_pages:
        offset = -torch.frombuffer(mapped, dtype=torch.uint8).data_ptr() % _HUGE_PAGE
        with suppress(OSError, AttributeError):  # small pages do as well
            mapped.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(mapped, dtype=torch.uint8, count=max(1, nbytes), offset=offset)[:nbytes]


def reserve(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of zeros of this shape.

    On the CPU the system maps its pages at the first write, so what is reserved and never used costs nothing, and what
    another process left in memory can never be read. Elsewhere all of it is allocated now.

    Raises:
        MemoryError, torch.OutOfMemoryError: there is no room for it.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return mapping(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)


def resident_bytes() -> int:
    """Bytes of this process that lie in memory, files it has mapped included; 0 where the system does not tell."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if status.exists() else 0


def available_bytes() -> int:
    """Bytes that this process can still take: of the machine or, if it is less, of its control group."""
    free = _field(Path("/proc/meminfo"), "MemAvailable") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit, used = (_number(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current"))
    return free if limit is None or used is None else min(free, max(0, limit - used))


@contextmanager
def returning_memory() -> Iterator[None]:
    """For work that allocates much and frees it again, as loading a model does: what it frees goes back to the system.

    glibc would keep it: once large blocks have been freed it takes later ones from its heaps, where they leave holes.
    Inside, every large block is a mapping of its own; afterwards blocks that come and go in each step stay in the heap,
    where they are cheap. Other C libraries are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if mallopt is None or trim is None:
        yield
        return
    mallopt(_M_MMAP_THRESHOLD, 128 * 1024)
    try:
        yield
    finally:
        mallopt(_M_MMAP_THRESHOLD, 32 * 1024 * 1024)  # the most that glibc takes
        mallopt(_M_TRIM_THRESHOLD, 64 * 1024 * 1024)
        gc.collect()
        trim(0)


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
        return max(self._least, (_field(_STATUS, "VmHWM") if self._resets else 0) or _ever())


def _field(file: Path, name: str) -> int:
    """A field of a /proc file, in bytes; 0 if the system does not tell."""
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB$", file.read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def _number(file: Path) -> int | None:
    """The number in a file; None where there is none, or no limit."""
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _ever() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
