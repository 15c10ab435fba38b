"""What every device does alike: the CPU, the emulated one, and CUDA where there is one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from loramux_adapters.device.choice import device_at, device_named
from loramux_adapters.device.cpu import CpuDevice
from loramux_adapters.device.cuda import CudaDevice
from loramux_adapters.device.device import Device, in_host_memory
from loramux_adapters.device.peak import PeakMemory
from loramux_adapters.errors import CannotCapture, DeviceFull, DeviceMissing, MemoryShort
from support.emulated import EmulatedDevice
from support.plain_kernel import PlainKernel

CUDA = CudaDevice(torch.device("cuda"))
MAKERS: dict[str, Callable[[], Device]] = {
    "cpu": CpuDevice,
    "emulated": EmulatedDevice,
    "emulated, some of it early": lambda: EmulatedDevice(early=0.5, seed=1),
}
if torch.cuda.is_available():
    MAKERS["cuda"] = lambda: CUDA


@pytest.fixture(params=MAKERS)
def device(request: pytest.FixtureRequest) -> Device:
    made: Device = MAKERS[request.param]()
    return made


@pytest.fixture(params=[name for name in MAKERS if name != "cpu"])
def capturing(request: pytest.FixtureRequest) -> Device:
    made: Device = MAKERS[request.param]()
    return made


def add(to: torch.Tensor, x: torch.Tensor, factor: float) -> None:
    to += x * factor


ADD = PlainKernel(add)


def numbers(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def test_what_is_reserved_is_zero_and_what_is_put_is_taken_back(device: Device) -> None:
    for dtype in (torch.float32, torch.float16, torch.uint8, torch.int64):
        zeros = device.reserve((2, 3), dtype)
        assert zeros.dtype == dtype and zeros.shape == (2, 3)
        assert device.take(zeros).tolist() == [[0, 0, 0], [0, 0, 0]]
    assert device.take(device.put(numbers(1, 2))).tolist() == [1, 2]
    assert device.scratch((0, 4), torch.float32).shape == (0, 4)


def test_launches_copies_and_fills_are_done_in_order(device: Device) -> None:
    with device.used():
        x, y = device.put(numbers(1, 2)), device.reserve((2,), torch.float32)
        device.launch(ADD, (1,), y, x, 2.0)
        device.copy(x, y)
        device.launch(ADD, (1,), y, x, 1.0, num_warps=8)
        device.fill(x, 7.0)
        assert device.take(y).tolist() == [4, 8]
        assert device.take(x).tolist() == [7, 7]


def test_a_copy_through_pinned_memory_is_there_once_its_event_is_over(device: Device) -> None:
    there, back = device.pinned((3,), torch.float32), device.pinned((3,), torch.float32)
    there.copy_(numbers(1, 2, 3))
    x = device.scratch((3,), torch.float32)
    device.copy(x, there)
    device.copy(back, x)
    event = device.main.record()
    event.synchronize()
    assert event.is_over() and back.tolist() == [1, 2, 3]


def test_streams_that_wait_for_each_other_are_in_order(device: Device) -> None:
    side = device.stream()
    x, y = device.put(numbers(1)), device.reserve((1,), torch.float32)
    side.wait(device.main.record())
    for _ in range(3):
        with device.on(side):
            device.launch(ADD, (1,), x, x, 1.0)  # 2, 5, 11
        device.main.wait(side.record())
        device.launch(ADD, (1,), y, x, 1.0)  # 2, 7, 18
        device.launch(ADD, (1,), x, device.put(numbers(1)), 1.0)  # 3, 6, 12
        side.wait(device.main.record())
    side.synchronize()
    device.synchronize()
    assert device.take(y).tolist() == [2 + 6 + 14]
    assert device.take(x).tolist() == [15]


def test_pytorchs_own_operations_are_in_order_with_the_rest(device: Device) -> None:
    with device.used():
        x = device.reserve((2,), torch.float32)
        device.fill(x, 2.0)
        y = x * 3 + device.put(numbers(1, 2))
        device.launch(ADD, (1,), x, y, 1.0)
        assert float(x.sum()) == 2 + 7 + 2 + 8
        assert device.take(y).tolist() == [7, 8]


def test_its_memory_is_told(device: Device) -> None:
    before = device.memory()
    assert 0 < before.free <= before.total
    peak = PeakMemory(device)
    held = device.scratch((1 << 20,), torch.float32)
    device.fill(held, 1.0)
    device.synchronize()
    now = device.memory()
    assert now.held - before.held >= 4 << 20 or device.is_host  # other tests may have left room in the process
    assert peak.peak() >= now.held > 0
    peak.at_least(1 << 60)
    assert peak.peak() == 1 << 60


def test_memory_that_cannot_be_had_is_an_error_of_its_own(device: Device) -> None:
    for allocate in (device.reserve, device.scratch):
        with pytest.raises(DeviceFull) as caught:
            allocate((1 << 60,), torch.uint8)
        assert isinstance(caught.value, MemoryShort) and isinstance(caught.value, MemoryError)


def test_what_it_is_is_told(device: Device) -> None:
    assert device.name and device.in_words() and str(device) in device.report()
    assert device.activations in (torch.float32, torch.bfloat16, torch.float16)
    assert device.layout.packed == device.is_host
    assert (device.capability == (0, 0)) == device.is_host
    assert device.held_of(10, 4) == (4 if device.is_host else 10)
    assert device.in_process(5) == (5 if device.is_host else 0)


def test_a_graph_does_again_what_was_started(capturing: Device) -> None:
    device = capturing
    with device.used():
        x, y = device.put(numbers(1, 2)), device.reserve((2,), torch.float32)
        out = device.scratch((2,), torch.float32)

        def step() -> torch.Tensor:
            device.launch(ADD, (1,), y, x, 2.0)
            device.copy(out, y)
            device.fill(x, 5.0)
            return out

        replay, result = device.capture(step)
        device.fill(y, 0.0)
        device.fill(x, 1.0)
        replay()
        assert device.take(result).tolist() == [2, 2]
        replay()
        assert device.take(result).tolist() == [12, 12]


def test_pytorchs_own_operations_are_part_of_a_graph(capturing: Device) -> None:
    device = capturing
    with device.used():
        x, rows = device.put(torch.arange(6.0).view(3, 2)), device.put(torch.tensor([0, 1]))
        replay, result = device.capture(lambda: (x[rows] @ x.t() + 1).softmax(-1))
        for chosen in ([2, 0], [1, 1]):
            rows.copy_(device.put(torch.tensor(chosen)))
            replay()
            host = torch.arange(6.0).view(3, 2)
            torch.testing.assert_close(device.take(result), (host[chosen] @ host.t() + 1).softmax(-1))


def test_what_cannot_be_captured_is_refused_and_leaves_the_device_as_it_was(capturing: Device) -> None:
    device = capturing
    side, event = device.stream(), device.main.record()
    x = device.reserve((1,), torch.float32)

    def change_streams() -> None:
        with device.on(side):
            pass

    steps: list[Callable[[], object]] = [
        lambda: device.take(x),
        lambda: device.put(numbers(1)),
        lambda: device.reserve((1,), torch.float32),
        lambda: device.scratch((1,), torch.float32),
        lambda: device.pinned((1,), torch.float32),
        device.synchronize,
        side.synchronize,
        event.synchronize,
        lambda: device.main.wait(event),
        lambda: device.main.record(),
        change_streams,
        lambda: device.capture(lambda: None),
        lambda: float(x.sum()),
    ]
    for step in steps:
        with device.used(), pytest.raises(CannotCapture):
            device.capture(step)
        device.launch(ADD, (1,), x, device.put(numbers(1)), 1.0)
    assert device.take(x).tolist() == [len(steps)]


def test_host_memory_that_is_not_pinned_is_not_copied_while_the_host_goes_on(capturing: Device) -> None:
    x = capturing.reserve((1,), torch.float32)
    for to, source in ((x, numbers(1)), (numbers(1), x)):
        with pytest.raises(ValueError, match="not pinned"):
            capturing.copy(to, source)


def test_a_cpu_has_no_graphs() -> None:
    with pytest.raises(CannotCapture):
        CpuDevice().capture(lambda: None)


def test_devices_are_found_by_name_and_by_place() -> None:
    assert str(device_named("cpu")) == "cpu" and str(device_at(torch.device("cuda"))) == "cuda"
    if torch.cuda.is_available():
        assert str(device_named("auto")) == str(device_named("cuda")) == "cuda"
    else:
        assert str(device_named("auto")) == "cpu"
        with pytest.raises(DeviceMissing, match="no CUDA device|a build without CUDA"):
            device_named("cuda")
    assert in_host_memory(torch.zeros(1)) and not in_host_memory(torch.zeros(1, device="meta"))
