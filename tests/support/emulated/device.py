"""`EmulatedDevice`: what goes wrong on a graphics processor goes wrong here too, every time.

Tensors are the CPU's; their memory counts as the device's if it was given by the device (`reserve`, `scratch`, `put`),
or is the result of an operation of PyTorch's on such memory. What a program forgets shows:

- A wait that is missing: work is done only when something waits for it, so its result is not there. Nor is it if the
  host reads it without `take` or an event. `early` and `seed` try other orders.
- Pinned memory that is used again too soon: copies read it when they are done.
- Memory that nobody wrote to: it is full of NaN, and `reserve` fills with zeros in the order of its stream.
- Graphs: they know addresses and numbers of the capture. Memory that was freed since raises FreedMemory; a number that
  changed since has no effect. Nothing is computed in a capture: results are NaN until the first replay. What no device
  can capture raises CannotCapture.
- A kernel that is given host memory, a copy from host memory that is not pinned: ValueError.
- Memory that ends: after `total` bytes, or at the allocations that `refuses` counts out.

Kernels of Triton's run in its interpreter: TRITON_INTERPRET=1 is set before Triton is imported.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from loramux_adapters.device.defaults import CARD_SIZES
from loramux_adapters.device.device import ON_CARD, Device, DeviceMemory, Replay, Result, WorkStream
from loramux_adapters.errors import CannotCapture, DeviceFull
from support.emulated.memory import Blocks, Kind
from support.emulated.recording import Operations, Recording
from support.emulated.streams import EmulatedStream, Streams, Work

_GARBAGE = 0x7B  # of integers: 31,611 in 16 bits


class _Here(threading.local):
    """What a thread does on the device: is in `capture`, and may only start work there; what it writes down; the mode
    it entered; its stream.
    """

    captures = False
    refuses = False
    recording: Recording | None = None
    operations: Operations | None = None
    current: EmulatedStream | None = None


class EmulatedDevice(Device):
    """See the module's text.

    Attributes:
        started: what was started so far, in order: ("launch", kernel), ("copy", ""), ("fill", ""), ("replay", "").
        refuses: allocations that fail, counted from 1 over all of the device's life; may be changed at any time.
        allocations: how many there were.
    """

    layout = ON_CARD
    sizes = CARD_SIZES
    is_host = False
    captures = True

    def __init__(
        self,
        *,
        total: int = 1 << 30,
        refuses: Collection[int] = (),
        early: float = 0.0,
        seed: int = 0,
        kernels: str = "cuda",
        capability: tuple[int, int] = (8, 0),
    ) -> None:
        """
        Args:
            total: bytes of the device.
            early: chance that some work is done at each start, and not only when it is waited for.
            seed: of that chance.
            kernels: the set that the server chooses for it.
            capability: what it tells kernels that choose by it.
        """
        self.place = torch.device("cpu")
        self.kernels = kernels
        self._capability = capability
        self.blocks = Blocks()
        self.refuses = refuses
        self.allocations = 0
        self.started: list[tuple[str, str]] = []
        self._total = total
        self._streams = Streams(early, seed)
        self._main = self._streams.add("the main stream", self.refuse_in_capture)
        self._here = _Here()

    def __str__(self) -> str:
        return "emulated"

    @property
    def name(self) -> str:
        return "emulated device"

    @property
    def capability(self) -> tuple[int, int]:
        return self._capability

    @property
    def processors(self) -> int:
        return 1

    @property
    def activations(self) -> torch.dtype:
        return torch.float16  # the interpreter has no products of bf16

    def in_words(self) -> str:
        return self.name

    def report(self) -> str:
        return f"{self}, computes in float16"

    @contextmanager
    def used(self) -> Iterator[None]:
        if self._operations is not None:
            yield
            return
        with Operations(self) as operations:
            self._here.operations = operations
            try:
                yield
            finally:
                self._here.operations = None

    # Memory

    def reserve(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        tensor = self._allocated(shape, dtype, "device")
        self._start("fill", "", "zeros", lambda to: to.zero_(), tensor)
        return tensor

    def scratch(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return self._allocated(shape, dtype, "device")

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        with self._own_work():
            return self._allocated(shape, dtype, "pinned").zero_()

    def memory(self) -> DeviceMemory:
        held = self.blocks.held
        return DeviceMemory(self._total, max(0, self._total - held), held, self.blocks.peak)

    def restart_peak(self) -> None:
        self.blocks.peak = self.blocks.held

    def held_of(self, reserved: int, written: int) -> int:
        return reserved

    def in_process(self, nbytes: int) -> int:
        return 0

    # Copies

    def put(self, source: torch.Tensor) -> torch.Tensor:
        if source.numel() and self.blocks.kind_of(source) == "device":
            self.refuse_in_capture("allocates memory")
            return source
        tensor = self._allocated(tuple(source.shape), source.dtype, "device")
        with self._own_work():
            return tensor.copy_(source)

    def take(self, source: torch.Tensor) -> torch.Tensor:
        self.refuse_in_capture("reads a result")
        self.current.run_until(self.current.started)
        with self._own_work():
            return source.detach().clone()

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        for tensor in (to, source):
            if self.blocks.kind_of(tensor) is None:
                raise ValueError(
                    "host memory that is not pinned cannot be copied while the host goes on: use put, take"
                )
        self._start("copy", "", "a copy", lambda to, source: to.copy_(source), to, source)

    def fill(self, to: torch.Tensor, value: float) -> None:
        self._on_device((to,), "fill")
        self._start("fill", "", "a fill", lambda to: to.fill_(value), to)

    # Order

    @property
    def main(self) -> WorkStream:
        return self._main

    @property
    def current(self) -> EmulatedStream:
        """The stream that this thread starts its work on."""
        return self._here.current or self._main

    def stream(self) -> WorkStream:
        return self._streams.add(f"side stream {len(self._streams.all)}", self.refuse_in_capture)

    @contextmanager
    def on(self, stream: WorkStream) -> Iterator[None]:
        assert isinstance(stream, EmulatedStream), "a stream of another device"
        self.refuse_in_capture("changes streams")
        before, self._here.current = self._here.current, stream
        try:
            yield
        finally:
            self._here.current = before

    def synchronize(self) -> None:
        self.refuse_in_capture("waits for the device")
        self._streams.run_all()

    # Kernels

    def launch(self, kernel: Any, grid: tuple[int, ...], /, *args: Any, **constants: Any) -> None:
        name = getattr(kernel, "__name__", None) or type(kernel).__name__
        self._on_device(args, name)
        self._start("launch", name, f"kernel {name}", lambda *given: kernel[grid](*given, **constants), *args)

    def capture(self, run: Callable[[], Result]) -> tuple[Replay, Result]:
        if self._here.captures:
            raise CannotCapture("what is captured captures")
        recording = Recording()
        self._here.captures = True
        try:
            with self.used():
                run()
                self._here.refuses = True
                run()
                self.current.run_until(self.current.started)
                self._here.recording = recording
                result = run()
        finally:
            self._here.captures = self._here.refuses = False
            self._here.recording = None
        return lambda: self._replay(recording), result

    # What the parts of the device ask of it

    @property
    def recording(self) -> Recording | None:
        """The capture that this thread makes."""
        return self._here.recording

    def adopt(self, result: torch.Tensor) -> None:
        """It lies on the device from now on. Raises DeviceFull: there is no room for it."""
        nbytes = result.untyped_storage().nbytes()
        if not self.blocks.has_room_for(nbytes, self._total):
            raise DeviceFull(f"there is no room on {self}: {nbytes} bytes of {self.memory().free} that are free")
        self.blocks.add(result, "device")

    def refuse_in_capture(self, what: str) -> None:
        """Raises CannotCapture if this thread captures now, or tries what it will capture."""
        if self._here.refuses:
            raise CannotCapture(f"what is captured {what}")

    @property
    def _operations(self) -> Operations | None:
        return self._here.operations

    @contextmanager
    def _own_work(self) -> Iterator[None]:
        with nullcontext() if self._operations is None else self._operations.paused():
            yield

    def _allocated(self, shape: tuple[int, ...], dtype: torch.dtype, kind: Kind) -> torch.Tensor:
        self.refuse_in_capture("allocates memory")
        self.allocations += 1
        nbytes = math.prod(shape) * dtype.itemsize
        full = kind == "device" and not self.blocks.has_room_for(nbytes, self._total)
        if full or self.allocations in self.refuses:
            raise DeviceFull(f"there is no room on {self}: {nbytes} bytes of {self.memory().free} that are free")
        with self._own_work():
            memory = torch.full((nbytes,), _GARBAGE, dtype=torch.uint8)
            self.blocks.add(memory, kind)
            tensor = memory.view(dtype).view(shape)
            return tensor.fill_(math.nan) if dtype.is_floating_point else tensor

    def _on_device(self, args: tuple[Any, ...], what: str) -> None:
        for number, arg in enumerate(args):
            if isinstance(arg, torch.Tensor) and self.blocks.kind_of(arg) != "device":
                raise ValueError(f"argument {number} of {what} lies in host memory")

    def _start(self, kind: str, name: str, what: str, call: Callable[..., Any], *args: Any) -> None:
        """Starts `call(*args)` on the current stream, or writes it down."""
        with self._own_work():
            self.started.append((kind, name))
            if self.recording is not None:
                self.recording.add(what, call, *args)
                return
            # as they are now: what is done to a tensor's shape later is not done to what was started
            given = [arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in args]
            self.current.start(Work(what, lambda: self._do(lambda: call(*given))))

    def _replay(self, recording: Recording) -> None:
        self.refuse_in_capture("replays a graph")
        with self._own_work():
            self.started.append(("replay", ""))
            for what, call in recording.play():
                self.current.start(Work(f"{what} of a graph", lambda call=call: self._do(call)))

    def _do(self, call: Callable[[], Any]) -> None:
        with self._own_work(), torch.inference_mode():
            call()
