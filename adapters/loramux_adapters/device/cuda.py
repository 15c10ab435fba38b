"""A CUDA device, through PyTorch. Nothing of it is touched before it is asked for, so it can be named anywhere."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch

from loramux_adapters.device.defaults import CARD_SIZES
from loramux_adapters.device.device import (
    ON_CARD,
    Device,
    DeviceMemory,
    Event,
    Replay,
    Result,
    WorkStream,
    is_pinned_or_on,
)
from loramux_adapters.errors import CannotCapture, DeviceFull

MIB = 2**20
_BF16_FROM = (8, 0)  # the first compute capability whose tensor cores multiply bf16


class CudaEvent:
    """`Event` of a CUDA stream."""

    def __init__(self, device: CudaDevice, raw: torch.cuda.Event) -> None:
        self._device, self.raw = device, raw

    def synchronize(self) -> None:
        self._device.refuse_in_capture("waits for an event")
        self.raw.synchronize()

    def is_over(self) -> bool:
        self._device.refuse_in_capture("asks for an event")
        return bool(self.raw.query())  # type: ignore[no-untyped-call]


class CudaStream:
    """`WorkStream` of a CUDA device."""

    def __init__(self, device: CudaDevice, raw: torch.cuda.Stream) -> None:
        self._device, self.raw = device, raw

    def record(self) -> Event:
        self._device.refuse_in_capture("records an event")
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self.raw)
        return CudaEvent(self._device, event)

    def wait(self, event: Event) -> None:
        assert isinstance(event, CudaEvent), "an event of another device"
        self._device.refuse_in_capture("waits for another stream")
        self.raw.wait_event(event.raw)

    def synchronize(self) -> None:
        self._device.refuse_in_capture("waits for a stream")
        self.raw.synchronize()


class _Here(threading.local):
    """What a thread does on the device.

    Attributes:
        captures: it is in `capture`.
        refuses: it captures, or tries what it will capture.
        holds: what the captured work was started with; None while nothing is captured.
        beside: it starts work on another stream than `main`.
    """

    captures = False
    refuses = False
    holds: list[torch.Tensor] | None = None
    beside = False


class CudaDevice(Device):
    """One graphics processor of NVIDIA's.

    Steps run on PyTorch's default stream, so that libraries' own operations are in order with our kernels. Captures
    have a stream of their own, and one pool of memory for all graphs.
    """

    layout = ON_CARD
    sizes = CARD_SIZES
    is_host = False
    kernels = "triton"
    captures = True

    def __init__(self, place: torch.device) -> None:
        self.place = place
        self._here = _Here()

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.place)

    @cached_property
    def capability(self) -> tuple[int, int]:
        return torch.cuda.get_device_capability(self.place)

    @cached_property
    def processors(self) -> int:
        return int(torch.cuda.get_device_properties(self.place).multi_processor_count)

    @property
    def activations(self) -> torch.dtype:
        return torch.bfloat16 if self.capability >= _BF16_FROM else torch.float16

    def in_words(self) -> str:
        return self.name

    def report(self) -> str:
        memory = self.memory()
        kind = str(self.activations).removeprefix("torch.")
        built_for = "AMD's, NOT tried with loramux" if torch.version.hip else "sm_{}{}".format(*self.capability)
        return (
            f"{self}: {self.name}, {built_for}, computes in {kind}, "
            f"{memory.total / MIB:,.0f} MiB, {memory.free / MIB:,.0f} of them free"
        )

    def used(self) -> AbstractContextManager[None]:
        return nullcontext() if self.place.index is None else _current(self.place)

    def reserve(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return self._allocated(lambda: torch.zeros(shape, dtype=dtype, device=self.place), str(self))

    def scratch(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return self._allocated(lambda: torch.empty(shape, dtype=dtype, device=self.place), str(self))

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return self._allocated(lambda: torch.zeros(shape, dtype=dtype, pin_memory=True), "the host, pinned")

    def memory(self) -> DeviceMemory:
        free, total = torch.cuda.mem_get_info(self.place)
        held = torch.cuda.memory_allocated(self.place)
        # What PyTorch took from the device and gave nobody yet is free as well.
        free += torch.cuda.memory_reserved(self.place) - held
        return DeviceMemory(total, free, held, torch.cuda.max_memory_allocated(self.place))

    def restart_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.place)

    def held_of(self, reserved: int, written: int) -> int:
        return reserved

    def in_process(self, nbytes: int) -> int:
        return 0

    def put(self, source: torch.Tensor) -> torch.Tensor:
        return self._allocated(lambda: source.to(self.place), str(self))

    def take(self, source: torch.Tensor) -> torch.Tensor:
        self.refuse_in_capture("reads a result")
        return source.cpu()

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        for tensor in (to, source):
            if not is_pinned_or_on(self.place, tensor):
                raise ValueError(
                    "host memory that is not pinned cannot be copied while the host goes on: use put, take"
                )
        to.copy_(source, non_blocking=True)
        self._hold((to, source))

    def fill(self, to: torch.Tensor, value: float) -> None:
        to.fill_(value)
        self._hold((to,))

    @cached_property
    def main(self) -> WorkStream:
        return CudaStream(self, torch.cuda.default_stream(self.place))

    def stream(self) -> WorkStream:
        return CudaStream(self, torch.cuda.Stream(self.place))  # type: ignore[no-untyped-call]

    @contextmanager
    def on(self, stream: WorkStream) -> Iterator[None]:
        assert isinstance(stream, CudaStream), "a stream of another device"
        self.refuse_in_capture("changes streams")
        beside, self._here.beside = self._here.beside, stream is not self.main
        try:
            with torch.cuda.stream(stream.raw):
                yield
        finally:
            self._here.beside = beside

    def synchronize(self) -> None:
        self.refuse_in_capture("waits for the device")
        torch.cuda.synchronize(self.place)

    def launch(self, kernel: Any, grid: tuple[int, ...], /, *args: Any, **constants: Any) -> None:
        kernel[grid](*args, **constants)
        self._hold(args)

    def capture(self, run: Callable[[], Result]) -> tuple[Replay, Result]:
        """No other thread may read results while it lasts: PyTorch then refuses it as it does here."""
        if self._here.captures:
            raise CannotCapture("what is captured captures")
        before, mode = torch.cuda.current_stream(self.place), torch.cuda.get_sync_debug_mode()
        side, pool = self._for_captures
        side.wait_stream(before)
        holds: list[torch.Tensor] = []
        graph = torch.cuda.CUDAGraph()
        self._here.captures = True
        try:
            try:
                with torch.cuda.stream(side):
                    run()  # what libraries allocate and compile at the first call must not be part of the graph
                    # Who waits for the device shows before the capture begins.
                    torch.cuda.set_sync_debug_mode("error")
                    self._here.refuses = True
                    run()
            finally:
                torch.cuda.set_sync_debug_mode(mode)
                before.wait_stream(side)
            # Other threads may use the device meanwhile.
            with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                self._here.holds = holds
                result = run()
        except torch.OutOfMemoryError as error:
            raise DeviceFull(f"{self} has no room for a graph: {error}") from error
        except RuntimeError as error:
            raise CannotCapture(str(error)) from error
        finally:
            self._here.captures = self._here.refuses = False
            self._here.holds = None
            torch.cuda.set_stream(before)  # a capture that fails would leave its own
        return _Replay(graph, holds), result

    @cached_property
    def _for_captures(self) -> tuple[torch.cuda.Stream, Any]:
        return torch.cuda.Stream(self.place), torch.cuda.graph_pool_handle()  # type: ignore[no-untyped-call]

    def refuse_in_capture(self, what: str) -> None:
        """Raises CannotCapture if this thread captures now, or tries what it will capture; `what` that does."""
        if self._here.refuses:
            raise CannotCapture(f"what is captured {what}")

    def _allocated(self, allocate: Callable[[], torch.Tensor], where: str) -> torch.Tensor:
        self.refuse_in_capture("allocates memory")
        try:
            return allocate()
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "out of memory" not in str(error):
                raise  # pinned memory that cannot be had is an error of CUDA's in general
            memory = self.memory()
            raise DeviceFull(
                f"there is no room on {where}: of {memory.total / MIB:,.0f} MiB {memory.free / MIB:,.0f} are free "
                f"({str(error).splitlines()[0]})"
            ) from error

    def _hold(self, args: tuple[Any, ...]) -> None:
        """Keeps memory from being used for something else: by a graph for as long as it lives, on a stream beside
        `main` until its work is done.
        """
        if self._here.holds is not None:
            self._here.holds += [arg for arg in args if isinstance(arg, torch.Tensor)]
        elif self._here.beside:
            stream = torch.cuda.current_stream(self.place)
            for arg in args:
                if isinstance(arg, torch.Tensor) and arg.is_cuda:
                    arg.record_stream(stream)


class _Replay:
    """A graph, and the tensors that it was made with."""

    def __init__(self, graph: torch.cuda.CUDAGraph, holds: list[torch.Tensor]) -> None:
        self._graph, self._holds = graph, holds

    def __call__(self) -> None:
        self._graph.replay()


@contextmanager
def _current(place: torch.device) -> Iterator[None]:
    with torch.cuda.device(place):
        yield
