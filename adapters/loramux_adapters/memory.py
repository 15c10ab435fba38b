"""Host memory: mappings that take it only where they are written to, and memory that goes back when it is free."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
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


def resident_bytes() -> int:
    """Bytes of this process that lie in memory, files it has mapped included; 0 where the system does not tell."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if status.exists() else 0


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
