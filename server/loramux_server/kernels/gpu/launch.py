"""How a kernel is started: by the device, which may run it now, put it on a stream or record it into a graph."""

from __future__ import annotations

from typing import Any, Protocol


class Launch(Protocol):
    """Starts `kernel` over `grid`: arguments in order, constants and options (num_warps, num_stages) by name."""

    def __call__(self, kernel: Any, grid: tuple[int, ...], /, *args: Any, **constants: Any) -> None: ...


def launch_now(kernel: Any, grid: tuple[int, ...], /, *args: Any, **constants: Any) -> None:
    """On the current stream."""
    kernel[grid](*args, **constants)
