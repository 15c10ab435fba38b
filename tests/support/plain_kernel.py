"""Kernels written in PyTorch that are started as Triton's are, for tests that need no Triton."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class PlainKernel:
    """`kernel[grid](*args, **constants)` calls `run(*args, **constants)`, whatever the grid."""

    def __init__(self, run: Callable[..., None]) -> None:
        self._run = run
        self.__name__ = run.__name__

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._call

    def _call(self, *args: Any, num_warps: int = 4, num_stages: int = 1, **constants: Any) -> None:
        self._run(*args, **constants)
