"""Everything that can be set for `loramux train`, each setting defined once; defaults of the recipe are its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loramux_adapters.errors import DataError, RecipeError
from loramux_adapters.store.store import NAME_PATTERN
from loramux_adapters.training.data.columns import Columns
from loramux_adapters.training.recipe import BATCHINGS, INITS, QUANTIZATIONS, SAVED_DTYPES, SCHEDULES, Recipe
from loramux_server.base.source import EMBEDDED_NAME
from loramux_server.config.commands import load_settings
from loramux_server.config.csv import columns_of
from loramux_server.config.settings import fields_of, setting
from loramux_server.errors import ConfigError

DEFAULT_OUT = Path("adapters-trained")
_R = Recipe()


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Settings of one training; checked when made, never changed. Raises ConfigError."""

    data: Path | None = setting(
        None,
        'examples to learn: JSONL with {"messages": [...]} or {"prompt": ..., "completion": ...} on each line, or CSV',
        group="data",
        unset="none, it must be given",
    )
    eval_data: Path | None = setting(
        None, "held-out examples of the same form, never trained on; without them nothing is evaluated", group="data"
    )
    labels: str | None = setting(
        None, "answers of a labelled task, such as ham,spam: the evaluation then scores a classifier", group="data"
    )
    csv_prompt: str | None = setting(None, "CSV: column of the user's text", group="data")
    csv_completion: str | None = setting(None, "CSV: column of the answer", group="data")
    csv_template: str | None = setting(
        None, "CSV: the user's message, with {column} for a column's text", group="data", unset="the prompt column"
    )
    csv_system: str | None = setting(None, "CSV: a system message for every example", group="data")
    csv_labels: str | None = setting(
        None, "CSV: what stands in the completion column = the answer to learn, such as 0=ham,1=spam", group="data"
    )
    csv_delimiter: str | None = setting(None, "CSV: the character between fields", group="data", unset="a comma")

    name: str | None = setting(
        None,
        "name of the adapter; letters, digits and . _ -, at most 63",
        group="result",
        unset="none, it must be given",
    )
    out: Path | None = setting(None, "directory of the run", group="result", unset=f"{DEFAULT_OUT}/NAME")
    upload: str | None = setting(
        None, "URL of a running server that gets the adapter when it is done, such as http://127.0.0.1:8000",
        group="result", unset="not uploaded",
    )  # fmt: skip
    save_dtype: str = setting(
        _R.save_dtype, "precision of the adapter's weights on disk", group="result", choices=SAVED_DTYPES
    )
    checkpoint_every: int = setting(
        50, "steps between two checkpoints", group="result", between=(1, 1 << 30)
    )  # fmt: skip

    rank: int = setting(_R.rank, "LoRA rank", group="adapter", between=(1, 1024))
    alpha: float = setting(_R.alpha, "LoRA alpha: the adapter's output is scaled by alpha/rank", group="adapter")
    dropout: float = setting(
        _R.dropout, "share of the adapter's inputs that is zeroed in training", group="adapter", between=(0, 1)
    )
    rslora: bool = setting(_R.rslora, "scale by alpha/sqrt(rank) instead, for high ranks", group="adapter")
    target_modules: str | None = setting(
        None,
        "layers that get an adapter, such as q_proj,v_proj",
        group="adapter",
        unset="every linear one but the head",
    )
    init: str = setting(
        _R.init, "how it starts; loftq begins at what NF4 lost of the 16-bit weights", group="adapter", choices=INITS
    )
    quantize: str = setting(
        _R.quantize, "train on the NF4 base (QLoRA), or on the 16-bit one to compare", group="adapter",
        choices=QUANTIZATIONS,
    )  # fmt: skip

    epochs: float = setting(_R.epochs, "passes over the data", group="steps")
    max_steps: int = setting(
        _R.max_steps, "optimizer steps; 0 means as many as --epochs takes", group="steps", between=(0, 1 << 30)
    )
    batch_size: int = setting(_R.batch_size, "examples of one step", group="steps", between=(1, 1 << 20))
    accumulation: int = setting(
        _R.accumulation, "parts that a step is computed in, to save memory; same gradients", group="steps",
        between=(1, 1 << 20),
    )  # fmt: skip
    max_length: int = setting(
        _R.max_length, "tokens of an example; of a longer one the middle of the question is cut, and counted",
        group="steps", between=(8, 1 << 20),
    )  # fmt: skip
    batching: str = setting(
        _R.batching,
        "length puts examples of similar length together, which is faster",
        group="steps",
        choices=BATCHINGS,
    )
    learning_rate: float = setting(_R.learning_rate, "peak learning rate", group="steps")
    schedule: str = setting(_R.schedule, "how the rate falls after the warm-up", group="steps", choices=SCHEDULES)
    warmup: float = setting(_R.warmup, "share of all steps in which the rate rises", group="steps", between=(0, 1))
    weight_decay: float = setting(_R.weight_decay, "AdamW's weight decay", group="steps")
    max_grad_norm: float = setting(_R.max_grad_norm, "gradients are clipped to this norm", group="steps")
    gradient_checkpointing: bool = setting(
        _R.gradient_checkpointing, "compute each layer twice, to save memory", group="steps"
    )
    seed: int = setting(_R.seed, "of initialisation, order and dropout", group="steps", between=(0, (1 << 31) - 1))

    base: str = setting(
        EMBEDDED_NAME,
        "base model: a hub id, a directory, a .gguf file, or the name of the embedded one",
        group="machine",
    )
    device: str = setting(
        "auto", "where to train; auto takes CUDA if there is a device", group="machine", choices=("auto", "cpu", "cuda")
    )
    threads: int | None = setting(None, "CPU threads", group="machine", between=(1, 1024), unset="PyTorch's choice")
    cache_dir: Path | None = setting(
        None, "where a converted base is kept", group="machine", unset="the user's cache directory"
    )

    def __post_init__(self) -> None:
        for field in fields_of(type(self)).values():
            field.check(getattr(self, field.name))
        if self.data is None:
            raise ConfigError("--data is needed: a JSONL or CSV file of examples to learn")
        if self.name is None:
            raise ConfigError("--name is needed: what the adapter is to be called")
        if not NAME_PATTERN.fullmatch(self.name):
            raise ConfigError(
                f"--name {self.name!r}: an adapter's name is 1 to 63 characters of A-Z a-z 0-9 . _ - and starts with a "
                "letter or a digit"
            )
        if self.labels is not None and (len(self.label_list) < 2 or len(set(self.label_list)) < len(self.label_list)):
            raise ConfigError(
                f"--labels must name two or more different answers, such as ham,spam; not {self.labels!r}"
            )
        if self.labels is not None and self.eval_data is None:
            raise ConfigError("--labels is for the evaluation: name held-out examples with --eval-data")
        try:
            self.recipe()
            self.columns()
        except (RecipeError, DataError) as error:
            raise ConfigError(_as_flag(str(error))) from error

    @property
    def run_dir(self) -> Path:
        assert self.name is not None
        return self.out or DEFAULT_OUT / self.name

    @property
    def label_list(self) -> list[str]:
        return _split(self.labels)

    def recipe(self) -> Recipe:
        """Everything that decides the adapter's bits. Raises RecipeError."""
        values: dict[str, Any] = {name: getattr(self, name) for name in _R.as_json()}
        return Recipe(**(values | {"target_modules": tuple(_split(self.target_modules))}))

    def columns(self) -> Columns | None:
        """How CSV is read; None if no setting says so. Raises DataError."""
        return columns_of(self)


def load_train_config(
    flags: Mapping[str, object], environ: Mapping[str, str], config_file: str | None = None
) -> TrainConfig:
    """Puts a config together: flag, then environment, then the [train] table of the file, then default.

    Raises:
        ConfigError: any value, key or variable is wrong, or the values do not go together.
    """
    return load_settings(TrainConfig, "train", flags, environ, config_file)


def _as_flag(message: str) -> str:
    """A recipe's message, which begins with the name of a field, in the words of the command line."""
    name, space, rest = message.partition(" ")
    field = fields_of(TrainConfig).get(name)
    return f"{field.flag if field is not None else name}{space}{rest}"


def _split(text: str | None) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()] if text else []
