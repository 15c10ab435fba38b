"""Layers with many adapters: loading into slots, subsets of targets, stale contents, and a whole forward."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import nn

from loramux_adapters.device.cpu import CpuDevice
from loramux_adapters.errors import AdapterRejected
from loramux_adapters.lora.host_cache import HostAdapter
from loramux_adapters.lora.lora_linear import AdapterSlots, LoRALinear, linears, row_bytes
from loramux_adapters.lora.ops import LoraRows
from loramux_adapters.lora.slot_copy import copy_slot
from loramux_adapters.lora.slots import ScaledSlot, Slot
from loramux_server.kernels.choice import choose_kernels
from loramux_server.kernels.compiled.library import native_library

KERNELS = choose_kernels(CpuDevice())

SHAPES = {"first": (64, 96), "second": (96, 64), "head": (64, 160)}


class Net(nn.Module):
    """Two layers and a head that sees only some rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = (nn.Linear(*SHAPES[name]) for name in SHAPES)

    def forward(self, x: torch.Tensor, keep: list[int]) -> torch.Tensor:
        hidden: torch.Tensor = self.second(torch.relu(self.first(x)))
        logits: torch.Tensor = self.head(hidden[keep])
        return logits


def adapter(rank: int, targets: Mapping[str, tuple[int, int]] = SHAPES, seed: int = 0) -> HostAdapter:
    generator = torch.Generator().manual_seed(seed)
    modules = {
        name: (
            torch.randn(rank, inputs, generator=generator).bfloat16(),
            (torch.randn(rank, outputs, generator=generator) * 0.1).bfloat16(),
        )
        for name, (inputs, outputs) in targets.items()
    }
    return HostAdapter(f"v{seed}", rank, 0, modules)


def make(rows: int = 64) -> tuple[Net, AdapterSlots]:
    net = Net()
    return net, AdapterSlots(net, rows, KERNELS.add_lora, KERNELS.copy_slot, head="head", device=CpuDevice())


def merged(one: HostAdapter) -> Net:
    """The plain network with one adapter merged."""
    net = Net()
    for name, (a, bt) in one.modules.items():
        layer = net.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        layer.weight.data = layer.weight + (a.float().T @ bt.float()).T
    return net


@torch.no_grad()
def test_each_row_gets_its_own_adapter_in_layers_and_head() -> None:
    net, slots = make()
    first, second = adapter(8, seed=1), adapter(12, seed=2)
    slots.load(Slot(8, 8), first)
    slots.load(Slot(16, 16), second)
    x = torch.randn(6, 64)
    keep = [1, 3, 5]
    rows = [((), 2), ((ScaledSlot(Slot(8, 8)),), 2), ((ScaledSlot(Slot(16, 16)),), 2)]
    slots.set_lora(LoraRows.build(rows), LoraRows.build([(slots_of_row, 1) for slots_of_row, _ in rows]))
    together = net(x, keep)
    slots.reset_lora()
    for index, expected in enumerate([Net(), merged(first), merged(second)]):
        part = expected(x, keep)[index]
        assert (together[index] - part).abs().max() < 1e-5 * part.abs().max()


@torch.no_grad()
def test_without_adapters_the_network_is_exactly_the_base() -> None:
    net, slots = make()
    slots.load(Slot(0, 8), adapter(8))
    x = torch.randn(3, 64)
    assert torch.equal(net(x, [0, 2]), Net()(x, [0, 2]))


@torch.no_grad()
def test_what_an_adapter_does_not_fill_is_empty_whoever_was_there_before() -> None:
    small = {"first": SHAPES["first"]}
    x, slot = torch.randn(2, 64), Slot(16, 16)
    results = []
    for before in (None, adapter(16, seed=5)):
        net, slots = make()
        if before is not None:
            slots.load(slot, before)
        slots.load(slot, adapter(3, small, seed=6))
        rows = LoraRows.build([((ScaledSlot(slot),), 2)])
        slots.set_lora(rows, rows)
        results.append(net(x, [0, 1]))
        arena = slots.layers["second"].arena
        assert not arena.a[16:32].any() and not arena.targeted[2:4].any()
        assert not slots.layers["first"].arena.a[19:32].any()
    assert torch.equal(*results)


@pytest.mark.skipif(native_library() is None, reason="no compiler was there at installation")
def test_the_compiled_copy_leaves_what_the_copy_by_tensors_leaves() -> None:
    both = make()[1], make()[1]
    both[1]._copy = copy_slot
    small = {"second": SHAPES["second"]}
    for slot, one in [
        (Slot(8, 8), adapter(8, seed=1)),
        (Slot(16, 16), adapter(11, seed=2)),
        (Slot(16, 8), adapter(3, small)),
    ]:
        for slots in both:
            slots.load(slot, one)
    assert both[0].held_bytes == both[1].held_bytes
    for path in SHAPES:
        ours, theirs = (slots.layers[path].arena for slots in both)
        assert torch.equal(ours.a, theirs.a) and torch.equal(ours.bt, theirs.bt)
        assert torch.equal(ours.targeted, theirs.targeted)


@pytest.mark.parametrize(
    "bad", [{"third": (64, 64)}, {"first": (32, 96)}, {"first": (64, 95)}], ids=["unknown", "narrow", "short"]
)
def test_an_adapter_that_does_not_fit_is_refused(bad: dict[str, tuple[int, int]]) -> None:
    _, slots = make()
    with pytest.raises(AdapterRejected):
        slots.load(Slot(0, 8), adapter(8, bad))


def test_a_rank_above_the_slots_is_refused() -> None:
    _, slots = make()
    with pytest.raises(AdapterRejected):
        slots.load(Slot(0, 8), adapter(9))


def test_bytes_are_counted_as_they_lie_in_memory() -> None:
    _, slots = make(rows=64)
    held = sum(t.numel() * t.element_size() for layer in slots.layers.values() for t in (layer.arena.a, layer.arena.bt))
    assert held == 64 * slots.row_bytes == 64 * row_bytes(SHAPES)


def test_no_rows_wrap_nothing() -> None:
    net = Net()
    assert not AdapterSlots(net, 0, KERNELS.add_lora, KERNELS.copy_slot, head=None, device=CpuDevice()).layers
    assert isinstance(net.first, nn.Linear)


def test_rows_that_make_no_whole_slot_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 8"):
        make(rows=12)


def test_every_linear_layer_is_found_and_keeps_its_weight_visible() -> None:
    net = Net()
    assert {path: (m.in_features, m.out_features) for path, m in linears(net)} == SHAPES
    weight = net.first.weight
    AdapterSlots(net, 8, KERNELS.add_lora, KERNELS.copy_slot, head="head", device=CpuDevice())
    assert isinstance(net.first, LoRALinear)
    assert net.first.weight is weight
