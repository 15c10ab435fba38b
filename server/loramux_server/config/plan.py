"""Everything that can be set for `loramux plan`, each setting defined once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loramux_adapters.errors import RecipeError
from loramux_adapters.training.recipe import Recipe
from loramux_server.base.source import EMBEDDED_NAME
from loramux_server.config.settings import fields_of, setting
from loramux_server.errors import ConfigError

_R = Recipe()


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanConfig:
    """Settings of one plan; checked when made, never changed. Raises ConfigError."""

    base: str = setting(
        EMBEDDED_NAME,
        "base model: a hub id, a directory, a .gguf file, or the name of the embedded one",
        group="machine",
    )
    device: str = setting(
        "auto", "where to train; auto takes CUDA if there is a device", group="machine", choices=("auto", "cpu", "cuda")
    )
    cache_dir: Path | None = setting(
        None, "where a converted base is kept", group="machine", unset="the user's cache directory"
    )
    rank: int = setting(_R.rank, "LoRA rank", group="recipe", between=(1, 1024))
    target_modules: str | None = setting(
        None, "layers that get an adapter, such as q_proj,v_proj", group="recipe", unset="every linear one but the head"
    )
    dropout: float = setting(_R.dropout, "of the adapter's inputs", group="recipe", between=(0, 1))
    batch: int = setting(_R.batch_size, "examples of one step", group="recipe", between=(1, 1 << 20))
    accumulation: int = setting(
        _R.accumulation, "parts that a step is computed in", group="recipe", between=(1, 1 << 20)
    )
    seq: int = setting(_R.max_length, "tokens of an example", group="recipe", between=(8, 1 << 20))
    learned: int | None = setting(
        None, "tokens of its answer", group="recipe", between=(1, 1 << 20), unset="a quarter of --seq"
    )
    gradient_checkpointing: bool = setting(False, "compute each layer twice, to save memory", group="recipe")

    def __post_init__(self) -> None:
        for field in fields_of(type(self)).values():
            field.check(getattr(self, field.name))
        try:
            self.recipe("nf4")
        except RecipeError as error:
            raise ConfigError(str(error)) from error

    def recipe(self, quantize: str) -> Recipe:
        """Raises RecipeError."""
        names = tuple(name.strip() for name in (self.target_modules or "").split(",") if name.strip())
        return Recipe(
            rank=self.rank,
            target_modules=names,
            dropout=self.dropout,
            quantize=quantize,
            batch_size=self.batch,
            accumulation=self.accumulation,
            max_length=self.seq,
            gradient_checkpointing=self.gradient_checkpointing,
        )
