from __future__ import annotations

import pytest

from loramux_adapters.training.recipe import SCHEDULES, Recipe
from loramux_adapters.training.run.optimizer import learning_rate, total_steps, warmup_steps


def rates(steps: int, **changes: object) -> list[float]:
    recipe = Recipe(learning_rate=0.1, **changes)  # type: ignore[arg-type]
    return [learning_rate(step, steps, recipe) for step in range(steps)]


@pytest.mark.parametrize(
    ("epochs", "max_steps", "steps"), [(1.0, 0, 7), (2.5, 0, 18), (0.01, 0, 1), (3.0, 5, 5), (1 / 7, 0, 1)]
)
def test_the_steps_are_those_asked_for_or_those_of_the_epochs(epochs: float, max_steps: int, steps: int) -> None:
    assert total_steps(7, Recipe(epochs=epochs, max_steps=max_steps)) == steps


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_rate_rises_to_its_peak_and_no_step_is_for_nothing(schedule: str) -> None:
    found = rates(20, schedule=schedule, warmup=0.2)

    assert warmup_steps(20, Recipe(warmup=0.2)) == 4
    assert found[:4] == pytest.approx([0.025, 0.05, 0.075, 0.1])
    assert max(found) == pytest.approx(0.1)
    assert min(found) > 0


def test_after_the_warm_up_the_rate_falls_in_the_shape_that_was_asked_for() -> None:
    constant, linear, cosine = (rates(10, schedule=name, warmup=0) for name in ("constant", "linear", "cosine"))

    assert set(constant) == {0.1}
    assert linear == pytest.approx([0.1 - 0.01 * step for step in range(10)])
    assert cosine == sorted(cosine, reverse=True)
    assert cosine[5] == pytest.approx(0.05)
    assert cosine[2] > linear[2] and cosine[8] < linear[8]


def test_one_step_has_the_peak() -> None:
    assert rates(1, warmup=0.05) == rates(1, warmup=0) == [0.1]
