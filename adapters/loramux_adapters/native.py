"""Finds the compiled CPU kernels that ship beside a package; none is needed, every kernel has a tensor twin."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path


def load_library(package_dir: Path, stem: str) -> ctypes.CDLL | None:
    """The shared library `<stem>*.so` in `package_dir`, or None where none was built or it does not load here.

    Load it after torch: both then share the OpenMP runtime that torch ships, and so its pool of threads.
    """
    if os.name != "posix":
        return None
    for path in sorted(package_dir.glob(f"{stem}*.so")):
        try:
            return ctypes.CDLL(str(path))
        except OSError:
            continue  # built for another machine
    return None
