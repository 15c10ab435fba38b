"""Which steps become graphs, and what is refused. Nothing is computed here: launches are written down."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from loramux_adapters.device.device import Replay, Result
from loramux_adapters.errors import CannotCapture, DeviceFull
from loramux_server.kernels.gpu.sampling import Ask, SamplingError
from loramux_server.kernels.gpu.step import decoder as decoder_module
from loramux_server.kernels.gpu.step.graphs import StepGraphs, _Trials, row_counts
from loramux_server.kernels.gpu.step.tables import StepShape
from support.emulated import EmulatedDevice
from support.gpu_steps import MIXED, NO_ADAPTERS, Row, TinySteps

BUDGET = 1 << 20


class Idle(EmulatedDevice):
    """Launches do nothing."""

    def launch(self, kernel: Any, grid: tuple[int, ...], /, *args: Any, **constants: Any) -> None:
        self.started.append(("launch", kernel.__name__))


class Hungry(Idle):
    """A graph takes 1,000 bytes, for as long as it is held; after `most` of them there is no room."""

    most = 100

    def capture(self, run: Callable[[], Result]) -> tuple[Replay, Result]:
        replay, result = super().capture(run)
        self.most -= 1
        if self.most < 0:
            raise DeviceFull("no room for a graph")
        held = self.scratch((1000,), torch.uint8)
        return lambda: (held, replay())[1], result


class Unable(Idle):
    def capture(self, run: Callable[[], Result]) -> tuple[Replay, Result]:
        raise CannotCapture("not in this driver")


def captured(steps: TinySteps, budget: int = BUDGET) -> StepGraphs:
    graphs = StepGraphs(steps.decoder)
    graphs.capture(lambda line: None, budget)
    return graphs


def kinds(shapes: list[StepShape]) -> list[tuple[int, bool]]:
    return [(shape.rows, shape.lora) for shape in shapes]


@pytest.mark.parametrize(
    ("largest", "tile", "expected"),
    [
        (1, 64, [1]),
        (12, 64, [1, 2, 4, 8, 12]),
        (256, 64, [1, 2, 4, 8, 16, 32, 64, 128, 192, 256]),
        (1000, 64, [1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 320, 384, 448, 512, 768, 1000]),
        (70, 8, [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 70]),
    ],
)
def test_there_are_few_graphs_for_any_number_of_rows(largest: int, tile: int, expected: list[int]) -> None:
    assert row_counts(largest, tile) == expected


def test_a_step_takes_the_smallest_graph_that_holds_it() -> None:
    steps = TinySteps(Idle(), sequences=5, samples=9)
    graphs = captured(steps)
    assert kinds(graphs.shapes) == [(count, lora) for count in (5, 4, 2, 1) for lora in (True, False)]

    def for_a_step(rows: int, samples: int, asks: int, *, lora: bool = False, prompts: bool = False) -> Any:
        shape = graphs.shape_for(StepShape(rows, samples, lora, prompts, asks))
        return (shape.rows, shape.samples, shape.asks, shape.lora) if shape in graphs.shapes else None

    assert for_a_step(3, 3, 3) == (4, 4, 4, False)
    assert for_a_step(3, 3, 3, lora=True) == (4, 4, 4, True)
    assert for_a_step(1, 1, 0) == (1, 1, 1, False), "forward, without asks"
    assert for_a_step(2, 1, 5) == (5, 5, 5, False), "more asks than rows"
    assert for_a_step(5, 2, 2) == (5, 5, 5, False), "a short prompt beside others"
    assert for_a_step(6, 6, 6) is None
    assert for_a_step(5, 0, 0) is None, "no logits: the last layer ends early"
    assert for_a_step(4, 2, 2, prompts=True) is None


def test_steps_with_short_prompts_have_graphs_of_their_own() -> None:
    device = Idle()
    steps = TinySteps(device, sequences=20, samples=20)
    graphs = captured(steps)
    ours = [(shape.rows, shape.lora) for shape in graphs.shapes if shape.prompts]
    assert ours == [(20, True), (16, True)], "16 rows are the fewest of a large tile"
    assert len(graphs.shapes) == 2 * len([1, 2, 4, 8, 16, 20]) + len(ours)
    assert graphs.shape_for(StepShape(17, 2, False, True, 2)) == StepShape(20, 20, True, True, 20)
    assert graphs.shape_for(StepShape(16, 16, False, False, 16)) == StepShape(16, 16, False, False, 16)
    device.started.clear()
    steps.start([Row(0, 4, (1,)), Row(1, 0, tuple(range(16)))]).read()
    assert {kind for kind, _ in device.started} == {"copy", "replay"}
    none = TinySteps(Idle(capability=(7, 5)), sequences=20, samples=20)
    assert not any(shape.prompts for shape in captured(none).shapes), "there are no large tiles"
    device = none.device
    device.started.clear()
    none.start([Row(0, 4, (1,)), Row(1, 0, tuple(range(16)))]).read()
    assert {kind for kind, _ in device.started} == {"copy", "replay"}


def test_where_a_row_alone_fills_a_large_tile_graphs_have_large_tiles() -> None:
    device = Idle()
    steps = TinySteps(device, heads=32)
    graphs = captured(steps)
    assert all(shape.prompts for shape in graphs.shapes)
    device.started.clear()
    steps.start([Row(0, 3, (1,)), Row(1, 5, (2,))]).read()
    assert {kind for kind, _ in device.started} == {"copy", "replay"}


def test_steps_with_prompts_are_launched_and_others_replayed() -> None:
    device = Idle()
    steps = TinySteps(device)
    captured(steps)
    for rows, expected in (
        ([Row(0, 3, (1,)), Row(1, 0, (2, 3))], {"copy", "replay"}),
        ([Row(0, 4, (1,)), Row(1, 0, tuple(range(16)))], {"copy", "launch"}),
    ):
        device.started.clear()
        steps.start(rows, MIXED).read()
        assert {kind for kind, _ in device.started} == expected
    device.started.clear()
    steps.start([Row(0, 3, (1,))], plain=True).read()
    assert "replay" not in {kind for kind, _ in device.started}


def test_graphs_keep_within_their_budget_and_say_what_is_left_out() -> None:
    device = Hungry()
    steps = TinySteps(device)
    before = device.memory().held
    graphs = captured(steps, budget=2500)
    assert kinds(graphs.shapes) == [(3, True), (3, False)]
    assert kinds(graphs.left_out) == [(2, True), (2, False), (1, True), (1, False)]
    assert graphs.held == 2000 == device.memory().held - before
    assert "beyond the" in graphs.why_left_out
    assert "; none for 2 rows with adapters, 2 rows, 1 row with adapters, 1 row: " in graphs.report()
    assert graphs.shape_for(StepShape(1, 1, False, False, 1)).rows == 3, "smaller steps take a larger one"
    assert steps.decoder.graphs is graphs


def test_where_nothing_is_set_apart_for_graphs_there_are_none() -> None:
    device = Idle()
    steps = TinySteps(device)
    device.started.clear()
    graphs = captured(steps, budget=0)
    assert not device.started and steps.decoder.graphs is None and len(graphs.left_out) == 6
    assert graphs.report() == "steps are no graphs: no memory is set apart for them"


def test_where_the_device_has_no_room_for_more_the_rest_goes_without() -> None:
    device = Hungry()
    device.most = 3
    steps = TinySteps(device)
    graphs = captured(steps)
    assert kinds(graphs.shapes) == [(3, True), (3, False), (2, True)]
    assert graphs.why_left_out == "no room for a graph"
    assert graphs.shape_for(StepShape(2, 2, False, False, 2)).lora, "one with adapters serves a step without"
    assert graphs.shape_for(StepShape(1, 1, True, False, 1)).rows == 2


def test_where_the_device_cannot_capture_steps_are_launched() -> None:
    steps = TinySteps(Unable())
    graphs = captured(steps)
    assert not graphs.shapes and steps.decoder.graphs is None
    assert graphs.report() == "steps are no graphs: not in this driver"
    steps.start([Row(0, 3, (1,))]).read()


def test_a_graph_that_remembers_a_number_is_found_and_none_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = TinySteps(Idle())
    run, numbers = steps.decoder.run, iter(range(1000))

    def baked(shape: StepShape) -> None:
        run(shape)
        steps.device.fill(steps.decoder.logits, next(numbers))

    monkeypatch.setattr(steps.decoder, "run", baked)
    graphs = captured(steps)
    assert not graphs.shapes and not graphs.held and steps.decoder.graphs is None
    assert "the graph of 3 rows with adapters gave other logits or answers" in graphs.why_left_out


def test_bits_that_depend_on_the_number_of_rows_are_told_and_graphs_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for by_rows in (False, True):
        steps = TinySteps(Idle(), sequences=4)
        run = steps.decoder.run

        def filled(shape: StepShape, by_rows: bool = by_rows, steps: TinySteps = steps, run: Any = run) -> None:
            run(shape)
            steps.device.fill(steps.decoder.logits, shape.rows if by_rows else 7)

        monkeypatch.setattr(steps.decoder, "run", filled)
        graphs = captured(steps)
        assert len(graphs.shapes) == 6 and graphs.equal_bits == (not by_rows)
        assert ("a row's last bits depend on how many rows are beside it" in graphs.report()) == by_rows


def test_slots_are_left_as_they_were() -> None:
    steps = TinySteps(Idle())
    captured(steps)
    for target in steps.decoder.targets:
        for tensor in (target.arena.a, target.arena.bt, target.arena.targeted):
            assert not steps.device.take(tensor).any()
    steps.load()
    with pytest.raises(ValueError, match="before the first adapter is loaded"):
        captured(steps)
    assert all(steps.device.take(target.arena.targeted).all() for target in steps.decoder.targets)


def test_without_a_block_of_their_own_there_are_no_graphs() -> None:
    steps = TinySteps(Idle())
    steps.decoder.spare_block = None
    with pytest.raises(ValueError, match="without a spare block"):
        captured(steps)


def test_rows_that_a_graph_is_compared_on_write_to_one_block_and_never_two_things_to_one_place() -> None:
    steps = TinySteps(Idle(), sequences=24, samples=24)
    decoder = steps.decoder
    _Trials(decoder).fill(StepShape(24, 24, True, False, 24), 20, seed=1, asked=24)
    positions = steps.device.take(decoder.tables.attention.positions)[:20].tolist()
    tokens = steps.device.take(decoder.tables.tokens)[:24].tolist()
    assert [position % 16 for position in positions] == [row % 16 for row in range(20)]
    assert positions[16:] == positions[:4] and tokens[16:20] == tokens[:4]
    assert len({position // 16 for position in positions}) == 3, "near and far"
    assert min(tokens) < 0 <= max(tokens) and tokens[20:] == [0] * 4
    starts = steps.device.take(decoder.tables.attention.starts)[:20].tolist()
    blocks = steps.device.take(decoder.tables.attention.blocks)
    assert all(blocks[start] == decoder.spare_block for start in starts)


def test_what_a_step_cannot_be_asked_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = TinySteps(Idle())
    steps.start([Row(0, 3, (1,)), Row(1, 3, (1,))])
    steps.start([Row(0, 4, (-2,))])
    with pytest.raises(ValueError, match="token -2 is of ask 1, and the step before had 1 asks"):
        steps.start([Row(0, 5, (-2,))])
    with pytest.raises(SamplingError, match="a row that is none of the 1 with logits"):
        steps.decoder.start([1], [0], None, None, None, [Ask(1)])  # type: ignore[arg-type]
    assert steps.start([Row(0, 5, (1,), None)]).read().shape == (0,), "nothing is asked"

    monkeypatch.setattr(decoder_module, "LARGEST_VOCABULARY", 299)
    steps = TinySteps(Idle())
    assert not steps.decoder.chooses and kinds(captured(steps).shapes)[0] == (3, True)
    with pytest.raises(SamplingError, match="a vocabulary of 300 tokens is sampled on the host: use `forward`"):
        steps.start([Row(0, 5, (1,))], NO_ADAPTERS)
