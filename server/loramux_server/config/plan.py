"""Everything that can be set for `loramux plan`."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from loramux_adapters.errors import RecipeError
from loramux_adapters.training.recipe import Recipe
from loramux_server.config.settings import setting
from loramux_server.config.shared import MACHINE, RECIPE, NamesBase, ShapesAdapter, split
from loramux_server.errors import ConfigError


class PlanConfig(NamesBase, ShapesAdapter):
    """Settings of one plan."""

    table = "plan"

    card: str | None = setting(
        None,
        "a card to plan for, which need not be here: the memory that it is sold with, such as 24GiB, or its name",
        group=MACHINE,
        unset="the device that is here",
    )

    batch: int = setting(
        RECIPE.batch_size, "examples of one step", group="Steps", between=(1, 1 << 20), also=("--batch-size",)
    )
    seq: int = setting(
        RECIPE.max_length, "tokens of an example", group="Steps", between=(8, 1 << 20), also=("--max-length",)
    )
    learned: int | None = setting(
        None, "tokens of its answer", group="Steps", between=(1, 1 << 20), unset="a quarter of --seq"
    )

    @model_validator(mode="after")
    def _is_a_recipe(self) -> Self:
        try:
            self.recipe("nf4")
        except RecipeError as error:
            raise ConfigError(str(error)) from error
        return self

    def recipe(self, quantize: str) -> Recipe:
        """Raises RecipeError."""
        return Recipe(
            rank=self.rank,
            target_modules=tuple(split(self.target_modules)),
            dropout=self.dropout,
            quantize=quantize,
            batch_size=self.batch,
            accumulation=self.accumulation,
            max_length=self.seq,
            gradient_checkpointing=self.gradient_checkpointing,
        )
