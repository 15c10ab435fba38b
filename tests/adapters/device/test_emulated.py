"""The emulated device: each mistake that it is there for makes a difference on it, and the right way does not.

Each test does something wrong, as code that was only ever run on a CPU does it, and sees that it shows.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch

from loramux_adapters.device.device import Device, WorkStream
from loramux_adapters.errors import CannotCapture, DeviceFull
from support.emulated import EmulatedDevice, FreedMemory
from support.plain_kernel import PlainKernel

BYTES = torch.uint8


def add(to: torch.Tensor, x: torch.Tensor, factor: float) -> None:
    to += x * factor


def widen(to: torch.Tensor, x: torch.Tensor, count: int) -> None:
    to.fill_(0)
    to[:count] += x[0]


ADD, WIDEN = PlainKernel(add), PlainKernel(widen)


def ones(device: Device, count: int = 2) -> torch.Tensor:
    return device.put(torch.ones(count))


def test_work_that_nobody_waited_for_is_not_done() -> None:
    device = EmulatedDevice()
    x, y = ones(device), device.reserve((2,), torch.float32)
    device.launch(ADD, (1,), y, x, 3.0)
    assert y.isnan().all(), "not even its zeros are there"
    event = device.main.record()
    assert not event.is_over()
    event.synchronize()
    assert event.is_over() and y.tolist() == [3, 3]
    device.fill(y, 0.0)
    assert y.tolist() == [3, 3]
    device.synchronize()
    assert y.tolist() == [0, 0]


@pytest.mark.parametrize("waits", [False, True])
def test_a_stream_that_does_not_wait_for_another_reads_what_was_there_before(waits: bool) -> None:
    device = EmulatedDevice()
    x, y, side = device.put(torch.zeros(2)), ones(device), device.stream()
    with device.on(side):
        device.launch(ADD, (1,), x, y, 5.0)
    if waits:
        device.main.wait(side.record())
    device.launch(ADD, (1,), y, x, 1.0)
    assert device.take(y).tolist() == ([6, 6] if waits else [1, 1])


def overwrite(device: EmulatedDevice, x: torch.Tensor, side: WorkStream, *, waits: bool) -> list[float]:
    """A step reads x, and the side stream then overwrites it for the next one."""
    y = device.put(torch.zeros(2))
    device.launch(ADD, (1,), y, x, 1.0)
    if waits:
        side.wait(device.main.record())
    with device.on(side):
        device.fill(x, 100.0)
    side.synchronize()
    found: list[float] = device.take(y).tolist()
    return found


def test_memory_that_is_overwritten_while_a_step_reads_it_shows() -> None:
    for waits, expected in ((False, [100, 100]), (True, [1, 1])):
        device = EmulatedDevice()
        assert overwrite(device, ones(device), device.stream(), waits=waits) == expected


def test_other_orders_can_be_tried() -> None:
    """A side stream that reads without waiting is right by chance when the device is fast."""
    seen = set()
    for seed in range(20):
        device = EmulatedDevice(early=0.6, seed=seed)
        x, y, side = device.put(torch.zeros(1)), device.put(torch.zeros(1)), device.stream()
        device.fill(x, 1.0)
        with device.on(side):
            device.launch(ADD, (1,), y, x, 1.0)
        side.synchronize()
        seen.add(device.take(y).item())
    assert seen == {0.0, 1.0}


@pytest.mark.parametrize("waits", [False, True])
def test_pinned_memory_that_is_used_again_too_soon_shows(waits: bool) -> None:
    device = EmulatedDevice()
    staging, to = device.pinned((2,), torch.float32), device.scratch((2, 2), torch.float32)
    for row in range(2):
        staging.fill_(row + 1.0)
        device.copy(to[row], staging)
        if waits:
            device.main.record().synchronize()
    assert device.take(to).tolist() == [[1.0 if waits else 2.0] * 2, [2.0] * 2]


def test_a_result_in_pinned_memory_is_not_there_before_its_event() -> None:
    device = EmulatedDevice()
    back = device.pinned((2,), torch.float32)
    device.copy(back, ones(device))
    event = device.main.record()
    assert back.tolist() == [0, 0]
    event.synchronize()
    assert back.tolist() == [1, 1]


def test_memory_that_nobody_wrote_to_is_full_of_nan() -> None:
    device = EmulatedDevice()
    assert device.take(device.scratch((3,), torch.float16)).isnan().all()
    assert device.take(device.scratch((2,), torch.int16)).tolist() == [0x7B7B] * 2


def test_kernels_read_no_host_memory() -> None:
    device = EmulatedDevice()
    x = ones(device)
    for other in (torch.ones(2), device.pinned((2,), torch.float32)):
        with pytest.raises(ValueError, match="argument 1 of add lies in host memory"):
            device.launch(ADD, (1,), x, other, 1.0)
    where = x.data_ptr()
    del x
    again = [torch.empty(2) for _ in range(100)]  # one may lie where x was
    for tensor in again:
        assert device.blocks.kind_of(tensor) is None, f"{tensor.data_ptr()} {where}"
    with pytest.raises(ValueError, match="argument 0 of fill"):
        device.fill(torch.ones(2), 0.0)


def test_pytorchs_operations_do_not_wait_for_other_streams() -> None:
    device = EmulatedDevice()
    with device.used():
        x, side = device.put(torch.zeros(2)), device.stream()
        with device.on(side):
            device.fill(x, 1.0)
        y = x + 1
        device.main.wait(side.record())
        assert (device.take(y).tolist(), device.take(x + 1).tolist()) == ([1, 1], [2, 2])
        device.launch(ADD, (1,), y, x, 1.0)  # y lies on the device too


def test_a_number_that_changed_since_the_capture_has_no_effect() -> None:
    device = EmulatedDevice()
    x, to, count = ones(device, 1), device.scratch((4,), torch.float32), 1
    replay, _ = device.capture(lambda: device.launch(WIDEN, (1,), to, x, count))
    count = 3
    replay()
    assert device.take(to).tolist() == [1, 0, 0, 0]


def test_memory_that_was_freed_or_moved_since_the_capture_is_named() -> None:
    device = EmulatedDevice()
    held, to = [ones(device)], device.reserve((2,), torch.float32)
    replay, _ = device.capture(lambda: device.launch(ADD, (1,), to, held[0], 1.0))
    replay()
    device.synchronize()  # what was started holds its memory until it is done
    held[0] = ones(device)
    with pytest.raises(FreedMemory, match=r"tensor 1 of kernel add \(float32 \[2\]\) was freed or moved"):
        replay()


def test_a_tensor_that_was_replaced_and_lives_on_gives_what_it_had() -> None:
    device = EmulatedDevice()
    old, to = ones(device), device.reserve((2,), torch.float32)
    current = old
    replay, _ = device.capture(lambda: device.launch(ADD, (1,), to, current, 1.0))
    device.fill(to, 0.0)
    current = device.put(torch.full((2,), 9.0))
    replay()
    assert device.take(to).tolist() == [1, 1]


def test_nothing_is_computed_in_a_capture() -> None:
    device = EmulatedDevice()
    with device.used():
        x, to = ones(device), device.reserve((2,), torch.float32)

        def step() -> torch.Tensor:
            device.launch(ADD, (1,), to, x, 1.0)
            return to * 2

        replay, out = device.capture(step)
        assert device.take(to).tolist() == [2, 2], "from the two trials before it"
        assert device.take(out).isnan().all()
        replay()
        assert device.take(out).tolist() == [6, 6]


@pytest.mark.parametrize("infers", [False, True])
def test_a_number_that_was_read_on_the_host_cannot_be_captured(infers: bool) -> None:
    device = EmulatedDevice()
    with device.used(), torch.inference_mode(infers):
        x = ones(device)
        for read in (lambda: x.sum().item(), lambda: x[0] > 0 or None, lambda: x.nonzero(), lambda: device.take(x)):
            with pytest.raises(CannotCapture, match="reads a result"):
                device.capture(read)


def test_replays_are_late_and_in_order_as_well() -> None:
    device = EmulatedDevice()
    x, to = ones(device), device.reserve((2,), torch.float32)
    replay, _ = device.capture(lambda: device.launch(ADD, (1,), to, x, 1.0))
    device.fill(to, 0.0)
    device.synchronize()
    replay()
    replay()
    assert to.tolist() == [0, 0]
    assert device.take(to).tolist() == [2, 2]
    assert [kind for kind, _ in device.started[-2:]] == ["replay", "replay"]


def test_memory_runs_out_where_the_test_says() -> None:
    device = EmulatedDevice(total=100)
    kept = [device.scratch((60,), BYTES)]
    with pytest.raises(DeviceFull, match="50 bytes of 40 that are free"):
        device.reserve((50,), BYTES)
    kept.append(device.reserve((40,), BYTES))
    assert (device.memory().free, device.memory().held, device.memory().peak) == (0, 100, 100)
    with device.used(), pytest.raises(DeviceFull):
        kept[0].float()  # PyTorch's own results take memory too
    device.synchronize()
    del kept[0]
    device.restart_peak()
    assert (device.memory().free, device.memory().peak) == (60, 40)

    counted = EmulatedDevice(refuses={2})
    counted.put(torch.ones(1))
    with pytest.raises(DeviceFull):
        counted.pinned((1,), BYTES)
    counted.put(torch.ones(1))
    assert counted.allocations == 3


def test_an_error_in_late_work_says_where_it_was_started() -> None:
    device = EmulatedDevice()
    device.launch(ADD, (1,), ones(device), ones(device, 3), 1.0)
    with pytest.raises(RuntimeError, match="size of tensor") as caught:
        device.synchronize()
    assert caught.value.__notes__ == ["in kernel add, which was started on the main stream"]


def test_a_kernel_of_tritons_runs_and_is_captured_in_the_interpreter() -> None:
    """In a process of its own: Triton interprets only what was decorated after TRITON_INTERPRET was set."""
    pytest.importorskip("triton", reason="Triton comes with PyTorch's CUDA build, and with the development tools")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(TRITON)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["[2.0, 4.0, 6.0]", "[12.0, 14.0, 16.0]"]


TRITON = '''
    import os, sys, linecache, tempfile
    os.environ["TRITON_INTERPRET"] = "1"
    source = """
    import triton, triton.language as tl

    @triton.jit
    def double(to, x, count, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        tl.store(to + at, 2 * tl.load(x + at, mask=at < count), mask=at < count)
    """
    with tempfile.TemporaryDirectory() as place:
        import textwrap
        open(place + "/double_kernel.py", "w").write(textwrap.dedent(source))
        sys.path.insert(0, place)
        import torch
        from double_kernel import double
        from support.emulated import EmulatedDevice

        device = EmulatedDevice()
        with device.used():
            x, to = device.put(torch.tensor([1.0, 2.0, 3.0])), device.reserve((4,), torch.float32)
            replay, _ = device.capture(lambda: device.launch(double, (1,), to, x, 3, BLOCK=4, num_warps=1))
            replay()
            print(device.take(to)[:3].tolist())
            device.fill(to, 0.0)
            x += 5
            replay()
            print(device.take(to)[:3].tolist())
'''
