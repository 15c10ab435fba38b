"""Plain operations in a graph, and those that cannot be in one; what they compute is tested with the check at start."""

from __future__ import annotations

import pytest
import torch

from loramux_adapters.errors import CannotCapture
from loramux_server.kernels.gpu.step import graphs as graphs_module
from loramux_server.kernels.gpu.step.graphs import StepGraphs
from loramux_server.kernels.gpu.step.operations import NAMES, PLAIN, TRITON, Operations
from loramux_server.kernels.gpu.step.tables import StepShape
from support.emulated import EmulatedDevice
from support.gpu_steps import MIXED, Row, TinySteps

ROWS = [Row(0, 0, (5,)), Row(1, 0, (6,)), Row(2, 0, (7,))]
HOST = ("add_lora", "attend")


def operations_in_graphs() -> Operations:
    """Plain ones wherever a graph can hold them."""
    found = TRITON
    for name in NAMES:
        found = found if name in HOST else found.with_plain(name)
    return found


def test_what_reads_tables_on_the_host_is_known() -> None:
    assert TRITON.captures and operations_in_graphs().captures
    for name in HOST:
        assert not TRITON.with_plain(name).captures
    assert not PLAIN.captures


def test_a_graph_of_plain_operations_gives_the_bits_of_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs_module, "row_counts", lambda largest, tile: [3])  # the interpreter is slow
    device = EmulatedDevice()
    steps = TinySteps(device)
    steps.decoder.operations = operations_in_graphs()
    graphs = StepGraphs(steps.decoder)
    graphs.capture(lambda line: None, 1 << 28)
    steps.load()

    found = []
    for plain in (False, True):
        for layer in (*steps.cache.k, *steps.cache.v):
            device.fill(layer, 0)
        before = len(device.started)
        answers = steps.start(ROWS, MIXED, plain=plain).read()
        assert (("replay", "") in device.started[before:]) is not plain
        found.append((answers, steps.logits(3).clone()))
    assert graphs.equal_bits and graphs.shapes
    assert found[0][0].tobytes() == found[1][0].tobytes()
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("name", HOST)
def test_a_graph_of_the_others_is_refused(name: str) -> None:
    device = EmulatedDevice()
    steps = TinySteps(device)
    steps.load()
    steps.decoder.operations = operations_in_graphs().with_plain(name)
    steps.start(ROWS, MIXED).read()
    with device.used(), torch.inference_mode(), pytest.raises(CannotCapture, match="reads a result"):
        device.capture(lambda: steps.decoder.run(StepShape(3, 3, lora=True, prompts=False, asks=3)))
