"""`Device`: the one object that owns what differs between a CPU and a graphics processor.

It gives memory and says when there is no more, copies between host and device, orders work (streams and events), starts
kernels, captures them as graphs, and tells figures. Who is handed one asks it, and never what kind it is. The CPU's
(cpu.py) has nothing to order; CUDA's (cuda.py) is PyTorch's; the tests have a third on which everything runs as late as
it may (tests/support/emulated/), so that a wait that is missing makes a test fail.

Rules for what runs on every one of them:

- Work that is started (`launch`, `copy`, `fill`, a replay) goes onto the current stream: the device's `main`, or the
  one given to `on`. Streams know nothing of each other but by events: `b.wait(a.record())`.
- The host sees a result in what `take` returns, or in pinned memory after it waited for an event recorded behind the
  copy. Pinned memory that a copy reads is not written to before such an event is over.
- What is captured starts work on the current stream alone: it does not wait, read, allocate, or change streams. Every
  number of a launch stays as it was; what differs from replay to replay lies in tensors.
- A thread enters `used` before it computes on a device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

from loramux_adapters.device.defaults import SizeDefaults

Replay = Callable[[], None]
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class DeviceLayout:
    """How a base, its cache and an optimizer lie on a kind of device: what a plan of memory counts by.

    Attributes:
        packed: NF4 as the compiled kernels read it, with fp32 scales and the output head in whole numbers, and the
            cache in whole numbers of 16 bits with an fp32 scale for each head; else NF4 as bitsandbytes quantizes it,
            and floats of 16 bits.
        activation_bytes: of a number between layers.
        moments_8_bit: the optimizer keeps its moments in 8 bits.
    """

    packed: bool
    activation_bytes: int
    moments_8_bit: bool


ON_HOST = DeviceLayout(packed=True, activation_bytes=4, moments_8_bit=False)
ON_CARD = DeviceLayout(packed=False, activation_bytes=2, moments_8_bit=True)


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes of a device's memory.

    Attributes:
        total: that there are; where a control group limits this process, its limit if that is less.
        free: that can still be taken.
        held: that this process has taken.
        peak: the most it held since the device was made or `restart_peak` was called.
    """

    total: int
    free: int
    held: int
    peak: int


class Event(Protocol):
    """A moment in a stream's work."""

    def synchronize(self) -> None:
        """The calling thread waits for it."""

    def is_over(self) -> bool:
        """Whether all work before it is done; never waits."""


class WorkStream(Protocol):
    """Work that is done in the order in which it was started."""

    def record(self) -> Event:
        """The moment when all that was started here so far is done."""

    def wait(self, event: Event) -> None:
        """What is started here from now on begins after the event. The calling thread does not wait."""

    def synchronize(self) -> None:
        """The calling thread waits for all that was started here."""


class Device(ABC):
    """See the module's text. Any thread may use one; order between threads is theirs to keep.

    Attributes:
        place: where PyTorch's own operations find its tensors.
        layout: how what is kept lies there.
        sizes: what a server takes there where its settings say nothing.
        is_host: its memory is this process's own, and the compiled code of this project runs on it.
        kernels: the set of the server's kernels that is written for it (kernels/choice.py there).
        captures: `capture` can be called.
        main: the stream of steps, and of all for which nothing else is said.
    """

    place: torch.device
    layout: DeviceLayout
    sizes: SizeDefaults
    is_host: bool
    kernels: str
    captures: bool

    def __str__(self) -> str:
        """As PyTorch and --device call it: "cpu", "cuda"."""
        return str(self.place)

    @property
    @abstractmethod
    def name(self) -> str:
        """The hardware's own: "NVIDIA H100 80GB HBM3"."""

    @property
    @abstractmethod
    def capability(self) -> tuple[int, int]:
        """The compute capability of CUDA's architectures: (9, 0) is sm_90. (0, 0): it has none."""

    @property
    @abstractmethod
    def processors(self) -> int:
        """Units that run programs of a kernel side by side: multiprocessors."""

    @property
    @abstractmethod
    def activations(self) -> torch.dtype:
        """What numbers are kept in between kernels."""

    @abstractmethod
    def in_words(self) -> str:
        """What it is, for a model card."""

    @abstractmethod
    def report(self) -> str:
        """What it is, for the start report."""

    @abstractmethod
    def used(self) -> AbstractContextManager[None]:
        """Entered by a thread around what it computes there; may be entered again inside."""

    # Memory

    @abstractmethod
    def reserve(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Zeros of this shape, to be kept.

        Raises:
            DeviceFull: there is no room for it.
            CannotCapture: a capture is going on.
        """

    @abstractmethod
    def scratch(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of this shape with whatever lies there. Raises as `reserve` does."""

    @abstractmethod
    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Zeros in host memory that `copy` reads or writes while the host goes on. Raises as `reserve` does."""

    @abstractmethod
    def memory(self) -> DeviceMemory:
        """What there is now."""

    @abstractmethod
    def restart_peak(self) -> None:
        """`memory().peak` begins anew, where the system lets it."""

    @abstractmethod
    def held_of(self, reserved: int, written: int) -> int:
        """Bytes that are really held of `reserved` bytes, of which only `written` were ever written to."""

    @abstractmethod
    def in_process(self, nbytes: int) -> int:
        """How many of these bytes of the device count among what the system sees this process take."""

    # Copies

    @abstractmethod
    def put(self, source: torch.Tensor) -> torch.Tensor:
        """A tensor of any host memory, on the device; it may be the same one. `source` may be changed afterwards only
        where it is not.

        Raises:
            DeviceFull: there is no room for it.
            CannotCapture: a capture is going on.
        """

    @abstractmethod
    def take(self, source: torch.Tensor) -> torch.Tensor:
        """A tensor of the device, in host memory: waits for the current stream. It may be the same one.

        Raises:
            CannotCapture: a capture is going on.
        """

    @abstractmethod
    def copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        """to[...] = source on the current stream; the host goes on. Each is on the device or pinned.

        `source` is read when the stream gets there, and not before.

        Raises:
            ValueError: one is in host memory that is not pinned.
        """

    @abstractmethod
    def fill(self, to: torch.Tensor, value: float) -> None:
        """to[...] = value on the current stream."""

    # Order

    @property
    @abstractmethod
    def main(self) -> WorkStream: ...

    @abstractmethod
    def stream(self) -> WorkStream:
        """A stream beside `main`, for as long as the device is used: they are few."""

    @abstractmethod
    def on(self, stream: WorkStream) -> AbstractContextManager[None]:
        """What this thread starts inside goes onto this stream. Raises CannotCapture while a capture is going on."""

    @abstractmethod
    def synchronize(self) -> None:
        """The calling thread waits for all streams. Raises CannotCapture while a capture is going on."""

    # Kernels

    @abstractmethod
    def launch(self, kernel: Any, grid: tuple[int, ...], /, *args: Any, **constants: Any) -> None:
        """Starts a kernel of Triton's over `grid` on the current stream.

        Args:
            args: tensors and numbers, in the kernel's order.
            constants: its constants and options (num_warps, num_stages), by name.
        """

    @abstractmethod
    def capture(self, run: Callable[[], Result]) -> tuple[Replay, Result]:
        """Runs `run` twice, then once more to write down what it starts, without doing it.

        Who captures keeps the tensors that the work was started with for as long as it replays it, where they are.

        Returns:
            What starts all of it again on the current stream in one call, and what `run` returned at the last time: its
            tensors have their values only after a replay, and a replay of any graph may use memory of the others'
            intermediate results.
        Raises:
            CannotCapture: it waits, reads, allocates or changes streams, or the device cannot capture.
            DeviceFull: there is no room for it.
        """


def in_host_memory(tensor: torch.Tensor) -> bool:
    """Whether compiled code of this process can read it by its address."""
    return tensor.device.type == "cpu"


def is_pinned_or_on(place: torch.device, tensor: torch.Tensor) -> bool:
    """Whether `copy` may read or write it."""
    return tensor.device.type == place.type or tensor.is_pinned()
