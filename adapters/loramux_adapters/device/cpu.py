"""The CPU as a device: what is started is done when the call returns, so there is nothing to order."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from loramux_adapters.device.defaults import HOST_SIZES
from loramux_adapters.device.device import (
    ON_HOST,
    Device,
    DeviceMemory,
    Event,
    Replay,
    Result,
    WorkStream,
)
from loramux_adapters.device.process_memory import ProcessPeak, available_bytes, total_bytes
from loramux_adapters.errors import CannotCapture, DeviceFull
from loramux_adapters.memory import mapping, resident_bytes

_NOTHING: AbstractContextManager[None] = nullcontext()


class _Done:
    """Event and stream of what is done already."""

    def record(self) -> Event:
        return self

    def wait(self, event: Event) -> None: ...

    def synchronize(self) -> None: ...

    def is_over(self) -> bool:
        return True


_DONE = _Done()


class CpuDevice(Device):
    """This machine's processor and memory."""

    layout = ON_HOST
    sizes = HOST_SIZES
    is_host = True
    kernels = "native"
    captures = False

    def __init__(self) -> None:
        self.place = torch.device("cpu")
        self._peak = ProcessPeak()

    @property
    def name(self) -> str:
        return "CPU"

    @property
    def capability(self) -> tuple[int, int]:
        return 0, 0

    @property
    def processors(self) -> int:
        return torch.get_num_threads()

    @property
    def activations(self) -> torch.dtype:
        return torch.float32

    def in_words(self) -> str:
        return f"CPU, {torch.get_num_threads()} threads"

    def report(self) -> str:
        return f"cpu, {torch.get_num_threads()} threads"

    def used(self) -> AbstractContextManager[None]:
        return _NOTHING

    def reserve(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The system maps its pages at the first write, so what is reserved and never used costs nothing, and what
        another process left in memory can never be read.
        """
        try:
            return mapping(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)
        except MemoryError as error:
            raise DeviceFull(str(error)) from error

    def scratch(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return self.reserve(shape, dtype)

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return self.reserve(shape, dtype)

    def memory(self) -> DeviceMemory:
        return DeviceMemory(total_bytes(), available_bytes(), resident_bytes(), self._peak.bytes())

    def restart_peak(self) -> None:
        self._peak.restart()

    def held_of(self, reserved: int, written: int) -> int:
        return written

    def in_process(self, nbytes: int) -> int:
        return nbytes

    def put(self, source: torch.Tensor) -> torch.Tensor:
        return source

    def take(self, source: torch.Tensor) -> torch.Tensor:
        return source

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        to.copy_(source)

    def fill(self, to: torch.Tensor, value: float) -> None:
        to.fill_(value)

    @property
    def main(self) -> WorkStream:
        return _DONE

    def stream(self) -> WorkStream:
        return _DONE

    def on(self, stream: WorkStream) -> AbstractContextManager[None]:
        return _NOTHING

    def synchronize(self) -> None: ...

    def launch(self, kernel: Any, grid: tuple[int, ...], /, *args: Any, **constants: Any) -> None:
        """In Triton's interpreter, which tests have switched on."""
        kernel[grid](*args, **constants)

    def capture(self, run: Callable[[], Result]) -> tuple[Replay, Result]:
        raise CannotCapture("a CPU has no graphs")
