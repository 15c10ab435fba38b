"""Settings that several commands have in common: the base and where it runs, labelled examples, an adapter's shape."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import model_validator

from loramux_adapters.errors import DataError
from loramux_adapters.training.data.columns import Columns
from loramux_adapters.training.recipe import Recipe
from loramux_server.base.source import EMBEDDED_NAME
from loramux_server.config.settings import Settings, setting
from loramux_server.errors import ConfigError

MACHINE, LABELS, ADAPTER, MEMORY = "Base and machine", "Labels, and CSV columns", "Adapter", "Memory"
RECIPE = Recipe()  # the defaults


class FindsBase(Settings):
    """Which base, and where what is made of it is kept."""

    base: str = setting(
        EMBEDDED_NAME,
        "base model: a hub id, a directory, a .gguf file, or the name of the embedded one",
        group=MACHINE,
    )
    cache_dir: Path | None = setting(
        None, "where a converted base is kept between starts", group=MACHINE, unset="the user's cache directory"
    )


class NamesBase(FindsBase):
    """A base, and where it runs."""

    device: Literal["auto", "cpu", "cuda"] = setting(
        "auto", "where to run; auto takes CUDA if there is a device", group=MACHINE
    )


class RunsBase(NamesBase):
    """A command that computes with the base."""

    threads: int | None = setting(None, "CPU threads", group=MACHINE, between=(1, 1024), unset="PyTorch's choice")


class ComparesWithFp32(Settings):
    """A command that says how far what is served is from fp32."""

    fidelity: bool = setting(
        True,
        "say how far what is served is from fp32 on the same weights; the base is loaded once more for it",
        group="Result",
    )


class LabelledExamples(Settings):
    """How examples are read."""

    labels: str | None = setting(
        None,
        "the answers to choose from, such as ham,spam: a classifier is scored",
        group=LABELS,
        unset="seen in the answers, where these are few and short",
    )
    csv_prompt: str | None = setting(None, "CSV: column of the user's text", group=LABELS)
    csv_completion: str | None = setting(None, "CSV: column of the answer", group=LABELS)
    csv_template: str | None = setting(
        None, "CSV: the user's message, with {column} for a column's text", group=LABELS, unset="the prompt column"
    )
    csv_system: str | None = setting(None, "CSV: a system message for every example", group=LABELS)
    csv_labels: str | None = setting(
        None, "CSV: what stands in the completion column = the answer, such as 0=ham,1=spam", group=LABELS
    )
    csv_delimiter: str | None = setting(None, "CSV: the character between fields", group=LABELS, unset="a comma")

    @model_validator(mode="after")
    def _columns_are_named(self) -> Self:
        try:
            self.columns()
        except DataError as error:
            raise ConfigError(str(error)) from error
        return self

    @property
    def label_list(self) -> list[str]:
        return split(self.labels)

    def columns(self) -> Columns | None:
        """How CSV is read; None if no setting says so. Raises DataError."""
        given = {
            "prompt": self.csv_prompt,
            "completion": self.csv_completion,
            "template": self.csv_template,
            "system": self.csv_system,
            "delimiter": self.csv_delimiter,
        }
        texts = {name: text for name, text in given.items() if text is not None}
        if not texts and self.csv_labels is None:
            return None
        if "prompt" not in texts or "completion" not in texts:
            raise DataError("CSV needs both --csv-prompt and --csv-completion")
        return Columns(**texts, labels=Columns.parse_labels(self.csv_labels or ""))


class ShapesAdapter(Settings):
    """What of a training's recipe decides how much memory it takes."""

    rank: int = setting(RECIPE.rank, "LoRA rank", group=ADAPTER, between=(1, 1024), also=("-r", "--lora-rank"))
    target_modules: str | None = setting(
        None, "layers that get an adapter, such as q_proj,v_proj", group=ADAPTER, unset="every linear one but the head"
    )
    dropout: float = setting(
        RECIPE.dropout,
        "share of the adapter's inputs that is zeroed in training",
        group=ADAPTER,
        between=(0, 1),
        also=("--lora-dropout",),
    )
    accumulation: int = setting(
        RECIPE.accumulation,
        "parts that a step is computed in, to save memory; same gradients",
        group=MEMORY,
        between=(1, 1 << 20),
    )
    gradient_checkpointing: bool = setting(
        RECIPE.gradient_checkpointing, "compute each layer twice, to save memory", group=MEMORY
    )


def split(text: str | None) -> list[str]:
    """The parts of a,b,c."""
    return [part.strip() for part in text.split(",") if part.strip()] if text else []
