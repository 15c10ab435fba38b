"""Steps that choose tokens, and graphs of them: the bits of launches that are waited for one by one."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from loramux_adapters.device.device import Device
from loramux_server.kernels.compiled.sampling import Draw
from loramux_server.kernels.gpu.sampling import Ask
from loramux_server.kernels.gpu.step import graphs as module
from loramux_server.kernels.gpu.step.graphs import StepGraphs
from loramux_server.kernels.gpu.step.tables import StepShape
from support.emulated import EmulatedDevice
from support.gpu_steps import MIXED, NO_ADAPTERS, AtOnce, Row, TinySteps

DRAWN = Ask(0, Draw(0, 0.7, temperature=0.9, top_p=0.8), top=2)
# Steps one after another: rows, and whose adapters. Sequences come, go and come back; blocks of 16 fill up on the way.
STEPS: list[tuple[list[Row], Any]] = [
    ([Row(0, 14, (5,)), Row(1, 31, (6,), DRAWN), Row(2, 0, (7,))], MIXED),
    ([Row(0, 15, (-1,), DRAWN), Row(1, 32, (-2,)), Row(2, 1, (-3,))], MIXED),
    ([Row(2, 2, (-3,), Ask(0, token=9, top=0)), Row(0, 16, (-1,))], MIXED),
    ([Row(0, 17, (-2,), DRAWN)], NO_ADAPTERS),
    ([Row(1, 33, (8, 9)), Row(0, 18, (-1,))], MIXED[::-1]),
    ([Row(1, 35, (-1,)), Row(0, 19, (-2,), DRAWN), Row(2, 3, (3,))], NO_ADAPTERS),
]


def with_history(device: Device, **sizes: Any) -> TinySteps:
    """Sequences have random keys and values already."""
    steps = TinySteps(device, **sizes)
    generator = torch.Generator().manual_seed(3)
    with device.used(), torch.inference_mode():
        for layer in (*steps.cache.k, *steps.cache.v):
            layer[:-1] = torch.randn(layer[:-1].shape, generator=generator).to(layer.dtype)
    return steps


@pytest.fixture
def few_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs for one row and for three: the interpreter is slow."""
    monkeypatch.setattr(module, "row_counts", lambda largest, tile: [1, 3])


@cache
def expected() -> list[tuple[np.ndarray, torch.Tensor]]:
    """Answers and logits of STEPS where each launch is done at once, and each step read before the next."""
    steps = with_history(AtOnce())
    steps.load()
    found = []
    for rows, adapters in STEPS:
        answers = steps.start(rows, adapters).read()
        found.append((answers, steps.logits(len(answers)).clone()))
    return found


def told(answers: np.ndarray, rows: list[Row]) -> list[Any]:
    """What was asked for."""
    asks = [row.ask for row in rows if row.ask is not None]
    found: list[Any] = [answers["finite"].tolist(), answers["greedy"].tolist(), answers["chosen"].tolist()]
    for answer, ask in zip(answers, asks, strict=True):
        if ask.top is not None:
            found += [answer["logprob"], answer["log_sum"]]
            found += [answer["likeliest"][: ask.top].tolist(), answer["logprobs"][: ask.top].tolist()]
    return found


@pytest.fixture(scope="module")
def captured() -> Iterator[tuple[EmulatedDevice, TinySteps, StepGraphs, list[str]]]:
    """A device whose graphs are for one row and for three (the interpreter is slow), and what was told of them."""
    device = EmulatedDevice()
    steps = with_history(device)
    graphs = StepGraphs(steps.decoder)
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "row_counts", lambda largest, tile: [1, 3])
        graphs.capture(lines.append, 1 << 20)
    steps.load()
    yield device, steps, graphs, lines


def run_ahead(steps: TinySteps) -> None:
    """STEPS, each started before the answers of the last one or two are read."""
    started = []
    for (rows, adapters), (_, logits) in zip(STEPS, expected(), strict=True):
        started.append(steps.start(rows, adapters))
        if len(started) == 3:  # one more than there is memory for
            found = [told(each.read(), rows) for each, (rows, _) in zip(started[::-1], STEPS[2::-1], strict=True)]
            first = zip(expected()[2::-1], STEPS[2::-1], strict=True)
            assert found == [told(answers, rows) for (answers, _), (rows, _) in first]
        if len(started) > 3:
            assert torch.equal(steps.logits(len(logits)), logits)
    for each, (rows, _), (answers, _) in zip(started, STEPS, expected(), strict=True):
        assert told(each.read(), rows) == told(answers, rows)


@pytest.mark.parametrize(("early", "seed"), [(0.0, 0), (0.4, 1)])
def test_steps_that_are_started_ahead_choose_the_tokens_of_steps_that_are_waited_for(early: float, seed: int) -> None:
    steps = with_history(EmulatedDevice(early=early, seed=seed))
    steps.load()
    run_ahead(steps)


def test_graphs_give_the_bits_of_launches(captured: Any) -> None:
    device, steps, graphs, lines = captured
    assert [(shape.rows, shape.lora) for shape in graphs.shapes] == [(3, True), (3, False), (1, True), (1, False)]
    assert graphs.equal_bits and not graphs.left_out and len(lines) == 4
    device.started.clear()
    run_ahead(steps)
    assert {kind for kind, _ in device.started} == {"copy", "replay"}


def test_graphs_of_steps_with_gain_and_shift_give_the_bits_of_launches(few_counts: None) -> None:
    """And other logits than without them; a graph is captured before an adapter has any."""
    found = []
    for device in (AtOnce(), EmulatedDevice()):
        steps = with_history(device, affine=True)
        if device.captures:
            graphs = StepGraphs(steps.decoder)
            graphs.capture(lambda line: None, 1 << 20)
            assert len(graphs.shapes) == 4 and graphs.equal_bits
            arenas = [layer.arena for layer in steps.slots.layers.values()]
            assert not any(arena.affine is None or device.take(arena.affine).any() for arena in arenas)
        steps.load()
        logits = []
        for rows, adapters in STEPS:
            answers = steps.start(rows, adapters).read()
            logits.append((steps.logits(len(answers)).clone(), told(answers, rows)))
        found.append(logits)
    for launched, replayed, (rows, adapters), (_, without) in zip(*found, STEPS, expected(), strict=True):
        assert torch.equal(launched[0], replayed[0]) and launched[1] == replayed[1], rows
        if adapters is MIXED:
            assert not torch.equal(launched[0], without)


def test_a_step_for_its_logits_in_between_changes_no_answers(captured: Any) -> None:
    device, steps, _, _ = captured
    steps.start(*STEPS[0])
    device.started.clear()
    assert torch.equal(steps.forward(*STEPS[0]), expected()[0][1])
    assert ("replay", "") in device.started
    rows, adapters = STEPS[1]  # its tokens are what the first chose
    assert told(steps.start(rows, adapters).read(), rows) == told(expected()[1][0], rows)


def test_a_graph_with_prompts_gives_the_bits_of_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt that fills a large tile of the attention, beside a row that does not."""
    rows = [Row(0, 3, (5,)), Row(1, 9, tuple(range(40, 56)), DRAWN)]
    with_prompts = StepShape(17, 17, True, True, 17)
    monkeypatch.setattr(StepGraphs, "_wanted", lambda self: [with_prompts])
    found = []
    for device in (AtOnce(), EmulatedDevice()):
        steps = with_history(device, sequences=17, samples=17)
        if device.captures:
            graphs = StepGraphs(steps.decoder)
            graphs.capture(lambda line: None, 1 << 20)
            assert graphs.shapes == [with_prompts] and graphs.equal_bits
        steps.load()
        answers = steps.start(rows, (MIXED[0], MIXED[2], *MIXED))
        found.append((steps.logits(2), told(answers.read(), rows)))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]
