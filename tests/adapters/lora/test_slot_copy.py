"""Adapters into slots through pinned memory, beside the steps: what the plain copy gives, never too early or late."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from loramux_adapters.device.cpu import CpuDevice
from loramux_adapters.device.cuda import CudaDevice
from loramux_adapters.device.device import Device
from loramux_adapters.lora.ops import Arena
from loramux_adapters.lora.slot_copy import LayerWeights, StagedCopySlot, copy_slot
from loramux_adapters.lora.slots import SMALLEST_RANK, Slot
from loramux_server.kernels.compiled.adapter_kernels import NativeCopySlot
from loramux_server.kernels.compiled.library import native_library
from support.emulated import EmulatedDevice
from support.plain_kernel import PlainKernel

ROWS, SHAPES = 64, ((24, 40), (40, 8))
MAKERS: dict[str, Callable[[], Device]] = {
    "cpu": CpuDevice,
    "emulated": EmulatedDevice,
    "emulated, some of it early": lambda: EmulatedDevice(early=0.4, seed=3),
}
if torch.cuda.is_available():
    MAKERS["cuda"] = lambda: CudaDevice(torch.device("cuda"))


def arenas_on(device: Device) -> list[Arena]:
    return [
        Arena(
            device.reserve((ROWS, inputs), torch.bfloat16),
            device.reserve((ROWS, outputs), torch.bfloat16),
            device.reserve((ROWS // SMALLEST_RANK,), torch.uint8),
            device.reserve((ROWS // SMALLEST_RANK, 2, outputs), torch.float32),
        )
        for inputs, outputs in SHAPES
    ]


def weights(rank: int, value: float) -> list[LayerWeights]:
    def matrix(size: int) -> torch.Tensor:
        return (torch.arange(rank * size).view(rank, size) % 31 + value).bfloat16()

    return [LayerWeights(matrix(inputs), matrix(outputs)) for inputs, outputs in SHAPES]


def with_affine(given: LayerWeights, value: float) -> LayerWeights:
    return given._replace(affine=torch.arange(2.0 * given.bt.shape[1]).view(2, -1) / 7 + value)


@pytest.mark.skipif(native_library() is None, reason="there are no compiled kernels")
def test_the_compiled_copy_gives_what_the_plain_one_gives() -> None:
    library = native_library()
    assert library is not None
    copy, ours, theirs = NativeCopySlot(library), arenas_on(CpuDevice()), arenas_on(CpuDevice())
    for turn, (slot, rank) in enumerate([(Slot(0, 16), 9), (Slot(8, 8), 8), (Slot(16, 16), 0), (Slot(0, 8), 3)]):
        new: list[LayerWeights | None] = [with_affine(given, turn) for given in weights(rank, turn)]
        if turn % 2:
            new[0] = None
        copy(slot, list(zip(ours, new, strict=True)))
        copy_slot(slot, list(zip(theirs, new, strict=True)))
        for one, other in zip(ours, theirs, strict=True):
            assert one.affine is not None and other.affine is not None
            assert torch.equal(one.a, other.a) and torch.equal(one.bt, other.bt)
            assert torch.equal(one.targeted, other.targeted) and torch.equal(one.affine, other.affine)


@pytest.mark.parametrize("staging_bytes", [2, 100, 1 << 20])
@pytest.mark.parametrize("made", MAKERS)
def test_slots_hold_what_the_plain_copy_gives(made: str, staging_bytes: int) -> None:
    device, host = MAKERS[made](), CpuDevice()
    copy, ours, theirs = StagedCopySlot(device, staging_bytes), arenas_on(device), arenas_on(host)
    choose = random.Random(0)
    for turn in range(12):
        slot = choose.choice([Slot(0, 8), Slot(8, 8), Slot(16, 16), Slot(32, 32), Slot(0, 16)])
        rank = choose.randint(1, slot.rank)
        new: list[LayerWeights | None] = [given if choose.random() < 0.7 else None for given in weights(rank, turn)]
        if choose.random() < 0.5:
            new = [given and with_affine(given, turn) for given in new]
        if turn == 7:  # gain and shift alone
            new = [with_affine(given, turn) for given in weights(0, turn)]
        copy(slot, list(zip(ours, new, strict=True)))
        copy_slot(slot, list(zip(theirs, new, strict=True)))
    for one, other in zip(ours, theirs, strict=True):
        assert one.affine is not None and other.affine is not None
        for got, expected in (
            (one.a, other.a),
            (one.bt, other.bt),
            (one.targeted, other.targeted),
            (one.affine, other.affine),
        ):
            assert torch.equal(device.take(got).cpu(), expected)


def read(to: torch.Tensor, x: torch.Tensor) -> None:
    to.copy_(x)


READ = PlainKernel(read)


@pytest.mark.parametrize("seed", range(10))
def test_steps_before_it_see_the_last_adapter_and_steps_after_it_the_new_one(seed: int) -> None:
    device = EmulatedDevice(early=0.0 if seed == 0 else 0.5, seed=seed)
    copy, (arena, _) = StagedCopySlot(device, 64), arenas_on(device)
    seen = [device.scratch((8, SHAPES[0][0]), torch.bfloat16) for _ in range(4)]
    for turn, to in enumerate(seen):
        (filling, _) = weights(8, 100.0 * turn)
        copy(Slot(8, 8), [(arena, filling)])
        for part in filling:
            if part is not None:
                part.fill_(-1)  # the host's memory may be used for something else at once
        device.launch(READ, (1,), to, arena.a[8:16])
    for turn, to in enumerate(seen):
        assert torch.equal(device.take(to), weights(8, 100.0 * turn)[0][0]), f"step {turn}"


def test_a_copy_to_a_slot_that_nobody_reads_does_not_wait_for_the_steps_before() -> None:
    """Those see the slots that they read; those after it see the new adapter."""
    device = EmulatedDevice()
    copy, (arena, _) = StagedCopySlot(device), arenas_on(device)
    (first, second) = (weights(8, value)[0] for value in (1.0, 2.0))
    copy(Slot(0, 8), [(arena, first)])
    before, after = (device.scratch((8, SHAPES[0][0]), torch.bfloat16) for _ in range(2))
    device.launch(READ, (1,), before, arena.a[:8])
    copy(Slot(8, 8), [(arena, second)], in_use=False)
    copied = copy._stream.record()
    device.launch(READ, (1,), after, arena.a[8:16])
    copied.synchronize()
    assert not torch.equal(before, first[0]), "the step before is done"
    assert torch.equal(device.take(before), first[0]) and torch.equal(device.take(after), second[0])


def test_the_host_waits_for_nothing_while_there_is_room_in_the_buffers() -> None:
    device = EmulatedDevice()
    copy, arenas = StagedCopySlot(device), arenas_on(device)
    for slot in (Slot(0, 8), Slot(8, 8)):
        copy(slot, list(zip(arenas, weights(8, 1.0), strict=True)))
    assert device.current.done == 0
