from __future__ import annotations

import json
from pathlib import Path

import pytest

from loramux_adapters.errors import CheckpointError
from loramux_adapters.training.run.curves import draw_curves, smooth
from loramux_adapters.training.run.trace import EpochRecord, StepRecord, Trace, read_trace


def step(number: int, loss: float = 1.0, learned: int = 10) -> StepRecord:
    return StepRecord(
        step=number,
        epoch=number / 4,
        loss=loss,
        accuracy=0.5,
        learned=learned,
        tokens=100,
        learning_rate=1e-3,
        grad_norm=0.7,
        seconds=0.5,
    )


def epoch(number: int, held: float | None = 2.0) -> EpochRecord:
    return EpochRecord(
        step=number,
        epoch=number / 4,
        train_loss=1.0,
        train_accuracy=0.5,
        held_loss=held,
        held_accuracy=None if held is None else 0.25,
        seconds=2.0,
    )


def traced(path: Path, *records: StepRecord | EpochRecord) -> Trace:
    trace = Trace(path)
    for record in records:
        trace.add(record)
    return trace


def test_every_record_is_a_whole_line_at_once(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    trace = traced(path, epoch(0), step(1), step(2))

    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["kind"], line["step"]) for line in lines] == [("epoch", 0), ("step", 1), ("step", 2)]
    assert lines[1]["loss"] == 1.0 and lines[1]["learning_rate"] == 1e-3
    assert trace.lines() == path.read_bytes()
    assert trace.seconds == 3.0


def test_an_evaluation_stands_behind_the_step_it_was_made_after(tmp_path: Path) -> None:
    trace = traced(tmp_path / "log.jsonl", step(1), epoch(1), step(2), epoch(2))

    assert [json.loads(line)["kind"] for line in trace.lines().splitlines()] == ["step", "epoch", "step", "epoch"]
    assert trace.lines() == (tmp_path / "log.jsonl").read_bytes()


def test_what_happened_after_the_checkpoint_did_not_happen(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    kept = traced(path, epoch(0), step(1)).lines()
    traced(path, step(2), step(3))
    path.write_bytes(path.read_bytes() + b'{"kind": "st')  # killed by the power button

    trace = Trace(path)
    trace.restore(kept)
    trace.add(step(2, loss=0.9))

    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2]
    assert [record.loss for record in trace.steps] == [1.0, 0.9]
    assert [record.step for record in trace.epochs] == [0]


def test_the_training_loss_of_an_epoch_weighs_every_token_alike(tmp_path: Path) -> None:
    trace = traced(tmp_path / "log.jsonl", step(1, 100.0), epoch(1))
    assert trace.since_last_epoch() is None

    trace.add(step(2, loss=1.0, learned=30))
    trace.add(step(3, loss=2.0, learned=10))

    assert trace.since_last_epoch() == (1.25, 0.5)


def test_a_log_can_be_read_back(tmp_path: Path) -> None:
    trace = traced(tmp_path / "log.jsonl", step(1), epoch(1, held=None))

    assert read_trace(tmp_path / "log.jsonl").lines() == trace.lines()
    (tmp_path / "log.jsonl").write_text("[]\n")
    with pytest.raises(CheckpointError, match="not a line of a training log"):
        read_trace(tmp_path / "log.jsonl")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_trace(tmp_path / "nothing.jsonl")


def test_a_log_that_cannot_be_written_says_that_nothing_is_lost(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="what was saved before is still there"):
        Trace(tmp_path / "missing" / "log.jsonl").add(step(1))


def test_the_smoothed_line_is_a_mean_over_tokens_around_each_step() -> None:
    steps = [step(1, 1.0, 10), step(2, 2.0, 30), step(3, 6.0, 10)]

    assert smooth(steps, "loss", 3) == [1.75, 2.6, 3.0]
    assert smooth(steps, "loss", 1) == [1.0, 2.0, 6.0]


@pytest.mark.parametrize("held", [2.0, None])
def test_the_curves_are_a_picture_with_and_without_held_out_examples(tmp_path: Path, held: float | None) -> None:
    trace = traced(tmp_path / "log.jsonl", *(step(number, 3 / number) for number in range(1, 40)), epoch(39, held))

    draw_curves(trace, tmp_path / "curves.png", title="spam")

    picture = (tmp_path / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
