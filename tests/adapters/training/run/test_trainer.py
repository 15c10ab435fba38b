from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from loramux_adapters.errors import CheckpointError, DataError, MemoryShort, TrainingError
from loramux_adapters.training.data.batches import Row
from loramux_adapters.training.recipe import Recipe
from loramux_adapters.training.run.trace import StepRecord
from loramux_adapters.training.run.trainer import Trainer, step_seed
from support import crash_training
from support.fakes_training import FakeModel, Remembering, counting_rows
from support.tiny_models import save_tiny_model

ROOT = Path(__file__).parents[4]
RECIPE = Recipe(batch_size=8, epochs=3, learning_rate=0.05, seed=3, warmup=0)
ROWS, HELD = counting_rows(40), counting_rows(10, seed=1)


def trainer(
    directory: Path,
    model: FakeModel | None = None,
    recipe: Recipe = RECIPE,
    observer: Remembering | None = None,
    **changes: Any,
) -> Trainer:
    given = {"data_sha256": "d", "base_id": "b", "checkpoint_every": 4} | changes
    rows, held = given.pop("rows", ROWS), given.pop("held", HELD)
    return Trainer(
        model or FakeModel(), rows, held, recipe, run_dir=directory, observer=observer or Remembering(), **given
    )


def weights(model: FakeModel) -> dict[str, list[float]]:
    return {name: parameter.flatten().tolist() for name, parameter in model.trainable.items()}


class Killed(BaseException):
    """Ends a run where it is, as a kill would."""


def test_a_small_model_learns_a_small_set(tmp_path: Path) -> None:
    observer = Remembering()
    outcome = trainer(tmp_path, recipe=replace(RECIPE, epochs=40), observer=observer).run()

    first, last = observer.epochs[0], observer.epochs[-1]
    assert outcome.finished and outcome.step == 200 == len(observer.steps)
    assert first.step == 0 and first.held_loss == pytest.approx(math.log(32)) and first.train_loss is None
    assert last.held_loss is not None and last.held_loss < 0.3
    assert last.held_accuracy is not None and last.held_accuracy > 0.9
    assert [record.epoch for record in observer.epochs] == list(range(41))


def test_the_plan_counts_what_is_learned_and_what_has_nothing_to_learn(tmp_path: Path) -> None:
    empty = Row((1, 2, 3), (False, False, False), cut=5)
    observer = Remembering()

    outcome = trainer(tmp_path, rows=[*ROWS, empty], observer=observer).run()

    plan = observer.plans[0]
    assert plan == outcome.plan
    assert (plan.steps, plan.first, plan.steps_per_epoch, plan.left_out) == (15, 0, 5, 1)
    assert plan.tokens_per_epoch == sum(len(row.ids) for row in ROWS)
    assert plan.learned_per_epoch == sum(sum(row.learn) for row in ROWS) == sum(r.learned for r in observer.steps[:5])


def test_each_epoch_sees_every_example_once(tmp_path: Path) -> None:
    model = FakeModel()
    trainer(tmp_path, model, held=[]).run()

    seen = [batch.lengths for batch in model.losses[:5]]
    assert sorted(length for lengths in seen for length in lengths) == sorted(len(row.ids) for row in ROWS)


def test_accumulation_gives_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    whole, split = FakeModel(dropout=0.0), FakeModel(dropout=0.0)
    recipe = replace(RECIPE, max_steps=1, max_grad_norm=1e9)

    one, four = Remembering(), Remembering()
    trainer(tmp_path / "1", whole, recipe, one).run()
    trainer(tmp_path / "4", split, replace(recipe, accumulation=4), four).run()

    assert len(whole.losses) == 1 and len(split.losses) == 4
    assert four.steps[0].grad_norm == pytest.approx(one.steps[0].grad_norm, rel=1e-5)
    assert four.steps[0].loss == pytest.approx(one.steps[0].loss, rel=1e-6)
    for name, parameter in whole.trainable.items():
        torch.testing.assert_close(split.trainable[name], parameter)


def test_a_step_follows_adamw_with_clipped_gradients(tmp_path: Path) -> None:
    recipe = replace(RECIPE, max_steps=3, max_grad_norm=0.01, weight_decay=0.1, schedule="linear", batch_size=40)
    model, oracle = FakeModel(dropout=0.0), FakeModel(dropout=0.0)
    trainer(tmp_path, model, recipe, held=[]).run()

    parameters = list(oracle.trainable.values())
    optimizer = torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.1)
    for batch, rate in zip(model.losses, (0.05, 0.05 * 2 / 3, 0.05 / 3), strict=True):
        oracle.loss(batch, grad_scale=1 / batch.learned)
        torch.nn.utils.clip_grad_norm_(parameters, 0.01)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in oracle.trainable.items():
        torch.testing.assert_close(model.trainable[name], parameter, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("killed_after", "goes_on_from"), [(1, 0), (4, 0), (7, 4), (8, 4), (14, 12)])
def test_a_killed_run_goes_on_to_the_same_weights_bit_for_bit(
    tmp_path: Path, killed_after: int, goes_on_from: int
) -> None:
    whole = FakeModel()
    trainer(tmp_path / "whole", whole).run()

    def kill(record: StepRecord) -> None:
        if record.step == killed_after:
            raise Killed

    with pytest.raises(Killed):
        trainer(tmp_path / "killed", observer=Remembering(kill)).run()
    torch.rand(killed_after)  # another process stands elsewhere in its random numbers
    resumed, observer = FakeModel(seed=99 if goes_on_from else 0), Remembering()
    outcome = trainer(tmp_path / "killed", resumed, observer=observer).run()

    assert observer.plans[0].first == goes_on_from
    assert outcome.finished
    assert weights(resumed) == weights(whole)

    def lines(name: str) -> list[dict[str, Any]]:
        read = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        return [{key: value for key, value in line.items() if key != "seconds"} for line in read]

    assert lines("killed") == lines("whole")


def test_checkpoints_keep_to_multiples_of_the_interval_after_a_resume(tmp_path: Path) -> None:
    stopping: list[Trainer] = []

    def stop(record: StepRecord) -> None:
        if record.step == 6:
            stopping[0].stop()

    stopping.append(trainer(tmp_path, observer=Remembering(stop)))
    stopping[0].run()
    resumed = Remembering()
    trainer(tmp_path, observer=resumed).run()

    assert resumed.checkpoints == ["step-00000008", "step-00000012", "step-00000015"]


class Clock:
    """Goes on by so many minutes at each step."""

    def __init__(self) -> None:
        self.now = 1000.0

    def minutes(self, count: float) -> Callable[[StepRecord], None]:
        def after_step(record: StepRecord) -> None:
            self.now += 60 * count

        return after_step

    def __call__(self) -> float:
        return self.now


def test_a_checkpoint_is_made_when_the_last_one_is_so_many_minutes_old(tmp_path: Path) -> None:
    clock = Clock()
    observer = Remembering(clock.minutes(2.5))
    timed = {"checkpoint_every": 7, "checkpoint_minutes": 10, "clock": clock}
    trainer(tmp_path / "timed", observer=observer, **timed).run()
    by_steps = Remembering()
    trainer(tmp_path / "by steps", observer=by_steps, checkpoint_every=7).run()

    assert observer.checkpoints == [f"step-{step:08d}" for step in (4, 7, 11, 14, 15)]
    assert by_steps.checkpoints == [f"step-{step:08d}" for step in (7, 14, 15)]


def test_a_run_that_goes_on_from_a_timed_checkpoint_makes_the_same_weights_bit_for_bit(tmp_path: Path) -> None:
    whole = FakeModel()
    trainer(tmp_path / "whole", whole).run()
    clock = Clock()

    def kill(record: StepRecord) -> None:
        clock.minutes(4)(record)
        if record.step == 8:
            raise Killed

    timed = {"checkpoint_every": 1000, "checkpoint_minutes": 10, "clock": clock}
    with pytest.raises(Killed):
        trainer(tmp_path / "killed", observer=Remembering(kill), **timed).run()
    resumed, observer = FakeModel(seed=99), Remembering()
    trainer(tmp_path / "killed", resumed, observer=observer).run()

    assert observer.plans[0].first == 6
    assert weights(resumed) == weights(whole)


def test_another_seed_or_another_dropout_is_another_adapter(tmp_path: Path) -> None:
    runs = {}
    for name, recipe, dropout in (
        ("a", RECIPE, 0.2),
        ("b", replace(RECIPE, seed=4), 0.2),
        ("c", RECIPE, 0.0),
        ("again", RECIPE, 0.2),
    ):
        model = FakeModel(dropout=dropout)
        trainer(tmp_path / name, model, recipe).run()
        runs[name] = weights(model)

    assert runs["a"] == runs["again"]
    assert runs["a"] != runs["b"] and runs["a"] != runs["c"]
    assert len({step_seed(seed, step) for seed in range(20) for step in range(50)}) == 1000


def test_stop_ends_the_run_after_the_step_with_a_checkpoint(tmp_path: Path) -> None:
    whole = FakeModel()
    trainer(tmp_path / "whole", whole).run()
    stopping: list[Trainer] = []

    def stop(record: StepRecord) -> None:
        if record.step == 6:
            stopping[0].stop()

    observer = Remembering(stop)
    stopping.append(trainer(tmp_path / "stopped", observer=observer))
    outcome = stopping[0].run()

    assert not outcome.finished and outcome.step == 6
    assert observer.checkpoints == ["step-00000004", "step-00000006"]
    resumed, second = FakeModel(), Remembering()
    assert trainer(tmp_path / "stopped", resumed, observer=second).run().finished
    assert second.plans[0].first == 6
    assert weights(resumed) == weights(whole)


def test_stop_within_an_evaluation_gives_it_up_and_the_next_run_makes_it(tmp_path: Path) -> None:
    class Stopping(Remembering):
        def evaluating(self, done: int, total: int) -> None:
            super().evaluating(done, total)
            if self.steps:
                first.stop()

    first = trainer(tmp_path, observer=Stopping())
    outcome = first.run()

    assert not outcome.finished and outcome.step == 5
    assert [record.step for record in outcome.trace.epochs] == [0]
    observer = Remembering()
    assert trainer(tmp_path, observer=observer).run().finished
    assert [record.step for record in observer.epochs] == [5, 10, 15]


def test_a_run_that_was_killed_at_its_end_is_only_finished(tmp_path: Path) -> None:
    model = FakeModel()
    trainer(tmp_path, model).run()

    again, observer = FakeModel(seed=5), Remembering()
    outcome = trainer(tmp_path, again, observer=observer).run()

    assert outcome.finished and observer.steps == []
    assert weights(again) == weights(model)
    assert len(outcome.trace.steps) == 15


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"recipe": replace(RECIPE, rank=9)}, "rank was 8, is 9"),
        ({"data_sha256": "x"}, 'data was "d", is "x"'),
        ({"base_id": "x"}, 'base was "b", is "x"'),
        ({"rows": ROWS[1:]}, "tokens was "),
    ],
)
def test_another_recipe_base_or_data_does_not_continue_a_run(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    trainer(tmp_path).run()

    with pytest.raises(CheckpointError, match=said):
        trainer(tmp_path, **change).run()


def test_held_out_examples_are_evaluated_in_parts_no_larger_than_a_steps(tmp_path: Path) -> None:
    model = FakeModel()
    trainer(tmp_path, model, replace(RECIPE, accumulation=2, max_steps=1)).run()

    assert [len(batch.lengths) for batch in model.evaluated] == [4, 4, 2] * 2


def test_without_held_out_examples_the_epochs_show_training_alone(tmp_path: Path) -> None:
    observer = Remembering()
    trainer(tmp_path, held=[], observer=observer).run()

    assert [record.step for record in observer.epochs] == [5, 10, 15]
    assert all(record.held_loss is None and record.train_loss is not None for record in observer.epochs)


@pytest.mark.parametrize("rows", [[], [Row((1, 2), (False, False), cut=3)], [Row((1,), (True,))]])
def test_nothing_to_learn_is_refused_before_the_start(tmp_path: Path, rows: list[Row]) -> None:
    with pytest.raises(DataError, match="nothing to learn"):
        trainer(tmp_path, rows=rows)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_what_was_saved(tmp_path: Path, bad: float) -> None:
    model = FakeModel()

    def poison(record: StepRecord) -> None:
        if record.step == 6:
            with torch.no_grad():
                model.trainable["b"][0, 0] = bad

    with pytest.raises(TrainingError, match=r"step 7: the loss is .*lower learning_rate \(now 0.05\)"):
        trainer(tmp_path, model, observer=Remembering(poison)).run()

    observer = Remembering()
    assert trainer(tmp_path, observer=observer).run().finished
    assert observer.plans[0].first == 4


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("alloc: can't allocate memory: 12345")],
)
def test_too_little_memory_says_what_to_lower(tmp_path: Path, error: Exception) -> None:
    model = FakeModel()

    def fail() -> None:
        raise error

    model.on_loss = fail
    with pytest.raises(MemoryShort) as caught:
        trainer(tmp_path, model).run()

    message = str(caught.value)
    for said in ("accumulation (now 1)", "gradient_checkpointing", "batch_size (now 8)", "max_length", "rank"):
        assert said in message


def test_other_errors_are_not_hidden(tmp_path: Path) -> None:
    model = FakeModel()

    def fail() -> None:
        raise RuntimeError("shapes do not match")

    model.on_loss = fail
    with pytest.raises(RuntimeError, match="shapes"):
        trainer(tmp_path, model).run()


def test_the_warning_of_wrong_gradients_is_an_error(tmp_path: Path) -> None:
    model = FakeModel()
    model.on_loss = lambda: warnings.warn(
        "bitsandbytes::gemv_4bit: an autograd kernel was not registered to the Autograd key(s)", stacklevel=1
    )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(TrainingError, match="gradients would be wrong"):
            trainer(tmp_path, model).run()


def test_kill_9_at_any_moment_makes_the_same_adapter_bit_for_bit(tmp_path: Path) -> None:
    checkpoint = save_tiny_model(tmp_path / "base")

    done = subprocess.run(
        [sys.executable, crash_training.__file__, str(checkpoint), str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("server", "adapters", "tests"))},
        timeout=120,
    )

    assert done.returncode == 0, done.stderr
    made = {
        case: (tmp_path / case / "adapter" / "adapter_model.safetensors").read_bytes() for case in crash_training.CASES
    }
    assert [case for case, content in made.items() if content != made["unharmed"]] == []
