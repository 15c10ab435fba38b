"""How many steps a training takes and which learning rate each of them has. Plain Python, so that it is exact."""

from __future__ import annotations

import math

from loramux_adapters.training.recipe import Recipe


def total_steps(steps_per_epoch: int, recipe: Recipe) -> int:
    """Optimizer steps of the whole training: `max_steps`, or else what `epochs` takes, at least one."""
    return recipe.max_steps or max(1, math.ceil(recipe.epochs * steps_per_epoch - 1e-9))


def warmup_steps(steps: int, recipe: Recipe) -> int:
    """Steps in which the rate rises; the last of them has the recipe's peak."""
    return min(steps, math.ceil(recipe.warmup * steps - 1e-9))


def learning_rate(step: int, steps: int, recipe: Recipe) -> float:
    """The rate of a step, counted from 0, of `steps`. None has the rate 0, which would be a step for nothing."""
    rising = warmup_steps(steps, recipe)
    if step < rising:
        return recipe.learning_rate * (step + 1) / rising
    done = (step - rising) / max(1, steps - rising)  # from 0 to just below 1
    if recipe.schedule == "constant":
        return recipe.learning_rate
    if recipe.schedule == "linear":
        return recipe.learning_rate * (1 - done)
    return recipe.learning_rate * (1 + math.cos(math.pi * done)) / 2
