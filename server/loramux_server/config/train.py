"""Everything that can be set for `loramux train`; defaults of the recipe are its own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import model_validator

from loramux_adapters.errors import InvalidAdapterName, RecipeError
from loramux_adapters.names import check_name, file_name_of
from loramux_adapters.training.recipe import Recipe
from loramux_server.config.settings import setting, settings_of
from loramux_server.config.shared import ADAPTER, RECIPE, LabelledExamples, RunsBase, ShapesAdapter, split
from loramux_server.errors import ConfigError
from loramux_server.plain_text import masked

DEFAULT_OUT = Path("adapters-trained")
URL_PATTERN = re.compile(r"https?://[^/\s]", re.IGNORECASE)


class TrainConfig(RunsBase, ShapesAdapter, LabelledExamples):
    """Settings of one training."""

    table = "train"

    data: Path | None = setting(
        None,
        'examples to learn: JSONL with {"messages": [...]} or {"prompt": ..., "completion": ...} on each line, or CSV',
        group="Data",
        unset="needed",
        also=("--train-data",),
    )
    eval_data: Path | None = setting(
        None, "held-out examples of the same form, never trained on; without them nothing is evaluated", group="Data"
    )

    name: str | None = setting(
        None,
        "name of the adapter, such as spam or org/spam: letters, digits and . _ - /",
        group="Result",
        unset="needed",
    )
    out: Path | None = setting(
        None, "directory of the run", group="Result", unset=f"{DEFAULT_OUT}/NAME", also=("--output-dir",)
    )
    upload: str | None = setting(
        None,
        "URL of a running server that gets the adapter when it is done, such as http://127.0.0.1:8000",
        group="Result",
        unset="not uploaded",
    )
    save_dtype: Literal["bfloat16", "float32"] = setting(
        RECIPE.save_dtype, "precision of the adapter's weights on disk", group="Result"
    )
    checkpoint_every: int = setting(
        50, "a checkpoint at each multiple of so many steps", group="Result", between=(1, 1 << 30)
    )
    checkpoint_minutes: float = setting(
        10.0, "and one where the last is so many minutes old; 0: by steps alone", group="Result", between=(0, 1 << 20)
    )

    alpha: float = setting(
        RECIPE.alpha, "LoRA alpha: the adapter's output is scaled by alpha/rank", group=ADAPTER, also=("--lora-alpha",)
    )
    rslora: bool = setting(RECIPE.rslora, "scale by alpha/sqrt(rank) instead, for high ranks", group=ADAPTER)
    init: Literal["default", "loftq"] = setting(
        RECIPE.init, "how it starts; loftq begins at what NF4 lost of the 16-bit weights", group=ADAPTER
    )
    quantize: Literal["nf4", "none"] = setting(
        RECIPE.quantize, "train on the NF4 base (QLoRA), or on the 16-bit one to compare", group=ADAPTER
    )

    epochs: float = setting(
        RECIPE.epochs, "passes over the data", group="Steps", also=("--num-epochs", "--num-train-epochs")
    )
    max_steps: int = setting(
        RECIPE.max_steps, "optimizer steps; 0 means as many as --epochs takes", group="Steps", between=(0, 1 << 30)
    )
    batch_size: int = setting(
        RECIPE.batch_size, "examples of one step", group="Steps", between=(1, 1 << 20), also=("--batch",)
    )
    max_length: int = setting(
        RECIPE.max_length,
        "tokens of an example; of a longer one the middle of the question is cut, and counted",
        group="Steps",
        between=(8, 1 << 20),
        also=("--max-seq-length",),
    )
    batching: Literal["length", "shuffle"] = setting(
        RECIPE.batching, "length puts examples of similar length together, which is faster", group="Steps"
    )
    learning_rate: float = setting(RECIPE.learning_rate, "peak learning rate", group="Steps", also=("--lr",))
    schedule: Literal["cosine", "linear", "constant"] = setting(
        RECIPE.schedule, "how the rate falls after the warm-up", group="Steps", also=("--lr-scheduler-type",)
    )
    warmup: float = setting(
        RECIPE.warmup,
        "share of all steps in which the rate rises",
        group="Steps",
        between=(0, 1),
        also=("--warmup-ratio",),
    )
    weight_decay: float = setting(RECIPE.weight_decay, "AdamW's weight decay", group="Steps")
    max_grad_norm: float = setting(RECIPE.max_grad_norm, "gradients are clipped to this norm", group="Steps")
    seed: int = setting(RECIPE.seed, "of initialisation, order and dropout", group="Steps", between=(0, (1 << 31) - 1))

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if self.data is None:
            raise ConfigError("--data is needed: a JSONL or CSV file of examples to learn")
        if self.name is None:
            raise ConfigError("--name is needed: what the adapter is to be called")
        try:
            check_name(self.name)
        except InvalidAdapterName as error:
            raise ConfigError(f"--name {self.name!r}: {error}") from error
        if self.labels is not None and (len(self.label_list) < 2 or len(set(self.label_list)) < len(self.label_list)):
            raise ConfigError(
                f"--labels must name two or more different answers, such as ham,spam; not {self.labels!r}"
            )
        if self.labels is not None and self.eval_data is None:
            raise ConfigError("--labels is for the evaluation: name held-out examples with --eval-data")
        if self.upload is not None and not URL_PATTERN.match(self.upload):
            raise ConfigError(f"--upload {masked(self.upload)!r} is not a URL such as http://127.0.0.1:8000")
        if self.upload is not None and self.quantize == "none":
            raise ConfigError("--upload: a server holds the NF4 base and refuses an adapter of --quantize none")
        try:
            self.recipe()
        except RecipeError as error:
            raise ConfigError(_as_flag(str(error))) from error
        return self

    @property
    def run_dir(self) -> Path:
        assert self.name is not None
        return self.out or DEFAULT_OUT / file_name_of(self.name)

    def recipe(self) -> Recipe:
        """Everything that decides the adapter's bits. Raises RecipeError."""
        values: dict[str, Any] = {name: getattr(self, name) for name in RECIPE.as_json()}
        return Recipe(**(values | {"target_modules": tuple(split(self.target_modules))}))


def _as_flag(message: str) -> str:
    """A recipe's message, which begins with the name of a field, in the words of the command line."""
    name, space, rest = message.partition(" ")
    known = settings_of(TrainConfig).get(name)
    return f"{known.flag if known is not None else name}{space}{rest}"
