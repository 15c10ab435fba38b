"""What the CUDA device asks of PyTorch, and in which order: tried without one, against PyTorch's own signatures.

tests/adapters/device/test_devices.py runs on a device where there is one; these say what would be wrong before that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import pytest
import torch

from loramux_adapters.device.cuda import CudaDevice
from loramux_adapters.errors import CannotCapture, DeviceFull
from support.plain_kernel import PlainKernel

GIB = 1 << 30
FACTS: dict[str, Any] = {
    "get_device_name": "NVIDIA H100 80GB HBM3",
    "get_device_capability": (9, 0),
    "mem_get_info": (60 * GIB, 80 * GIB),
    "memory_allocated": 10 * GIB,
    "memory_reserved": 15 * GIB,
    "max_memory_allocated": 12 * GIB,
    "graph_pool_handle": (0, 1),
}


class Recorded:
    """Stands for torch.cuda: functions have PyTorch's own signatures, streams and graphs write down what is asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.mode, self.current = 0, self.stream("default")
        self.capture_fails = False
        for name, value in FACTS.items():
            self.patch(monkeypatch, name, lambda *args, value=value: value)
        self.patch(monkeypatch, "default_stream", lambda *args: self.default)
        self.patch(monkeypatch, "current_stream", lambda *args: self.current)
        self.patch(monkeypatch, "set_stream", lambda stream: setattr(self, "current", stream))
        self.patch(monkeypatch, "get_sync_debug_mode", lambda: self.mode)
        self.patch(monkeypatch, "set_sync_debug_mode", self._set_mode)
        self.patch(monkeypatch, "synchronize", lambda *args: self.log.append("synchronize"))
        self.patch(monkeypatch, "reset_peak_memory_stats", lambda *args: self.log.append("reset"))
        self.default = self.current
        made = iter(range(100))
        monkeypatch.setattr(torch.cuda, "Stream", lambda place: self.stream(f"side {next(made)}"))
        monkeypatch.setattr(torch.cuda, "stream", self._on)
        monkeypatch.setattr(torch.cuda, "graph", create_autospec(torch.cuda.graph, side_effect=self._graph))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: self.log.append("replay")))
        event = SimpleNamespace(record=lambda stream: None, query=lambda: True, synchronize=lambda: None)
        monkeypatch.setattr(torch.cuda, "Event", lambda: event)

    def patch(self, monkeypatch: pytest.MonkeyPatch, name: str, call: Callable[..., Any]) -> None:
        monkeypatch.setattr(torch.cuda, name, create_autospec(getattr(torch.cuda, name), side_effect=call))

    def stream(self, name: str) -> Any:
        def wait_stream(other: Any) -> None:
            self.log.append(f"{name} waits for {other.name}")

        return SimpleNamespace(
            name=name,
            wait_stream=wait_stream,
            wait_event=lambda event: self.log.append(f"{name} waits for an event"),
            synchronize=lambda: self.log.append(f"the host waits for {name}"),
        )

    def _set_mode(self, mode: int | str) -> None:
        self.mode = 2 if mode == "error" else int(mode)

    @contextmanager
    def _on(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before  # not where an error passes: PyTorch's does not come back from every capture

    @contextmanager
    def _graph(self, graph: Any, *, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        assert pool == FACTS["graph_pool_handle"] and capture_error_mode == "thread_local" and self.mode == 0
        self.log.append(f"capture on {stream.name}")
        with self._on(stream):
            yield
        if self.capture_fails:
            raise RuntimeError("operation not permitted when stream is capturing")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    return Recorded(monkeypatch)


@pytest.fixture
def device(cuda: Recorded) -> CudaDevice:
    return CudaDevice(torch.device("cuda"))


def note(log: list[str], text: str) -> None:
    log.append(text)


NOTE = PlainKernel(note)


def test_what_it_is_is_told(device: CudaDevice, cuda: Recorded) -> None:
    assert device.report() == (
        "cuda: NVIDIA H100 80GB HBM3, sm_90, computes in bfloat16, 81,920 MiB, 66,560 of them free"
    )
    assert (device.memory().held, device.memory().peak) == (10 * GIB, 12 * GIB)
    device.restart_peak()
    assert cuda.log == ["reset"]


def test_a_card_of_another_maker_is_said_to_be_untried(device: CudaDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "AMD's, NOT tried with loramux" in device.report() and "sm_" not in device.report()


@pytest.mark.parametrize(
    "capability, dtype", [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((12, 0), torch.bfloat16)]
)
def test_old_cards_compute_in_fp16(
    capability: tuple[int, int], dtype: torch.dtype, device: CudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda place: capability)
    assert device.activations == dtype


def test_a_step_is_tried_twice_and_then_captured_on_a_stream_of_its_own(device: CudaDevice, cuda: Recorded) -> None:
    x = torch.zeros(1)

    def step() -> torch.Tensor:
        device.launch(NOTE, (1,), cuda.log, f"step on {cuda.current.name}, mode {cuda.mode}")
        device._hold((x,))
        return x

    replay, result = device.capture(step)
    assert cuda.log == [
        "side 0 waits for default",
        "step on side 0, mode 0",
        "step on side 0, mode 2",
        "default waits for side 0",
        "capture on side 0",
        "step on side 0, mode 0",
    ]
    assert result is x and any(held is x for held in replay._holds)  # type: ignore[attr-defined]
    replay()
    assert cuda.log[-1] == "replay"
    device.capture(step)
    assert "side 1 waits for default" not in cuda.log, "all graphs are captured on one stream"


def test_a_capture_that_fails_leaves_no_trace(device: CudaDevice, cuda: Recorded) -> None:
    def waits() -> None:
        if cuda.mode == 2:
            raise RuntimeError("called a synchronizing CUDA operation")

    def full() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    for step, error in (
        (waits, CannotCapture),
        (full, DeviceFull),
        (lambda: device.take(torch.zeros(1)), CannotCapture),
        (device.synchronize, CannotCapture),
        (lambda: device.capture(lambda: None), CannotCapture),
    ):
        with pytest.raises(error):
            device.capture(step)
        assert (cuda.mode, cuda.current) == (0, cuda.default)
        assert cuda.log[-1] == "default waits for side 0"
    cuda.capture_fails = True
    with pytest.raises(CannotCapture, match="not permitted"):
        device.capture(lambda: None)
    assert (cuda.mode, cuda.current) == (0, cuda.default)
    device.synchronize()
    assert cuda.log[-1] == "synchronize"


def test_streams_wait_by_events_and_what_is_used_beside_the_main_one_is_kept(
    device: CudaDevice, cuda: Recorded
) -> None:
    kept: list[str] = []

    class OnDevice(torch.Tensor):
        is_cuda = True

        def record_stream(self, stream: Any) -> None:
            kept.append(stream.name)

    x = torch.zeros(1).as_subclass(OnDevice)
    side = device.stream()
    side.wait(device.main.record())
    device._hold((x,))
    with device.on(side):
        device._hold((x, 3))
        with device.on(device.main):
            device._hold((x,))
        device._hold((x,))
    device.main.wait(side.record())
    side.synchronize()
    assert kept == ["side 0", "side 0"]
    assert cuda.log == ["side 0 waits for an event", "default waits for an event", "the host waits for side 0"]
    assert cuda.current is cuda.default


def test_memory_that_cannot_be_had_is_named_with_what_is_free(device: CudaDevice) -> None:
    def refuse(message: str, kind: type[RuntimeError]) -> Callable[[], torch.Tensor]:
        def allocate() -> torch.Tensor:
            raise kind(message)

        return allocate

    for kind in (torch.OutOfMemoryError, RuntimeError):
        with pytest.raises(DeviceFull, match="on cuda: of 81,920 MiB 66,560 are free .CUDA error: out of memory"):
            device._allocated(refuse("CUDA error: out of memory\nmore", kind), "cuda")
    with pytest.raises(RuntimeError, match="illegal"):
        device._allocated(refuse("an illegal memory access was encountered", RuntimeError), "cuda")
