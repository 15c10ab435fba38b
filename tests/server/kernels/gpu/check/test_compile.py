"""A whole step is made of kernels that were checked, and says what of them was wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from loramux_server.kernels.attention.kv_cache import KVCache
from loramux_server.kernels.attention.paged_attention import attend_reference, use_our_attention
from loramux_server.kernels.choice import Kernels
from loramux_server.kernels.decoder.whole_step import StepLimits
from loramux_server.kernels.gpu.check import compile as module
from loramux_server.kernels.gpu.check.check import CheckedOperations
from loramux_server.kernels.gpu.step import graphs
from loramux_server.kernels.gpu.step.decoder import GpuDecoder
from loramux_server.kernels.gpu.step.operations import TRITON, Operations
from loramux_server.kernels.numerics import numerics_id
from support.emulated import EmulatedDevice
from support.gpu_steps import TinySteps


def compiled(
    monkeypatch: pytest.MonkeyPatch, operations: Operations, told: Callable[[str], None], *, same_bits: bool = False
) -> GpuDecoder:
    def check(*args: Any, **options: Any) -> CheckedOperations:
        return CheckedOperations(operations, same_bits, lines=("a line",), seconds=0.0)

    monkeypatch.setattr(module, "check_operations", check)
    monkeypatch.setattr(graphs, "row_counts", lambda largest, tile: [1])  # the interpreter is slow
    device = EmulatedDevice()
    steps = TinySteps(device)
    use_our_attention(steps.model)
    limits = StepLimits(rows=40, samples=40, sequences=3, blocks=3, adapters=2, ranks=32, graph_bytes=1 << 24)
    with device.used(), torch.inference_mode():
        cache = KVCache(steps.cache.shape, 9, device, spare=True)
        found = module.compile_gpu_step(device, attend_reference, steps.model, cache, limits, told)
    assert isinstance(found, GpuDecoder), found
    return found


@pytest.mark.parametrize(("name", "captures"), [("add_norm", True), ("attend", False)])
def test_a_step_takes_what_the_check_left_and_graphs_where_they_can_hold_it(
    monkeypatch: pytest.MonkeyPatch, name: str, captures: bool
) -> None:
    told: list[str] = []
    decoder = compiled(monkeypatch, TRITON.with_plain(name), told.append)

    assert decoder.operations == TRITON.with_plain(name) and decoder.replaced == (name,)
    assert decoder.notes[0] == "a line" and not decoder.equal_bits
    assert (decoder.graphs is not None) is captures
    assert any("graphs" in note for note in decoder.notes) is captures


def test_what_a_card_cannot_compute_by_our_kernels_is_another_numerics_id(monkeypatch: pytest.MonkeyPatch) -> None:
    device, names = EmulatedDevice(), ["whole step in Triton", ", but add_norm, sample by PyTorch"]
    replaced = TRITON.with_plain("sample").with_plain("add_norm")
    ids = []
    for operations in (TRITON, replaced):
        decoder = compiled(monkeypatch, operations, lambda line: None)
        ids.append(numerics_id(nn.Linear(2, 2), device, Kernels("triton"), decoder))
    assert [[name in one for name in names] for one in ids] == [[True, False], [True, True]]


@pytest.mark.parametrize("agree", [True, False])
def test_bits_are_equal_only_where_kernels_and_graphs_say_so(monkeypatch: pytest.MonkeyPatch, agree: bool) -> None:
    monkeypatch.setattr(graphs._Trials, "agree", lambda *args: agree)
    assert compiled(monkeypatch, TRITON, lambda line: None, same_bits=True).equal_bits is agree
