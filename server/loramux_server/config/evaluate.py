"""Everything that can be set for `loramux eval`, each setting defined once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loramux_adapters.errors import DataError
from loramux_server.base.source import EMBEDDED_NAME
from loramux_server.config.commands import load_settings
from loramux_server.config.csv import columns_of
from loramux_server.config.settings import fields_of, setting
from loramux_server.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig:
    """Settings of one evaluation; checked when made, never changed. Raises ConfigError."""

    data: Path | None = setting(
        None, "held-out examples, never trained on: JSONL or CSV as for `loramux train`", group="data", unset="needed"
    )
    train_data: Path | None = setting(
        None,
        "the training examples: gives the majority baseline, and shows overfitting",
        group="data",
        unset="not looked at",
    )
    labels: str | None = setting(
        None,
        "the answers to choose from, such as ham,spam",
        group="data",
        unset="seen in the answers, where these are few and short",
    )
    limit: int = setting(0, "evaluate on the first N examples; 0 takes all", group="data", between=(0, 1 << 30))
    csv_prompt: str | None = setting(None, "CSV: column of the user's text", group="data")
    csv_completion: str | None = setting(None, "CSV: column of the answer", group="data")
    csv_template: str | None = setting(
        None, "CSV: the user's message, with {column} for a column's text", group="data", unset="the prompt column"
    )
    csv_system: str | None = setting(None, "CSV: a system message for every example", group="data")
    csv_labels: str | None = setting(
        None, "CSV: what stands in the completion column = the answer, such as 0=ham,1=spam", group="data"
    )
    csv_delimiter: str | None = setting(None, "CSV: the character between fields", group="data", unset="a comma")

    adapter: str | None = setting(
        None,
        "a PEFT directory, a run's directory, or the name of a trained adapter; with --url its name on the server",
        group="adapters",
        unset="needed",
    )
    compare: str | None = setting(None, "a further adapter, named in the same way", group="adapters")
    reference: str | None = setting(
        None, "an adapter trained with --quantize none; it is scored on the 16-bit base", group="adapters"
    )

    url: str | None = setting(
        None, "ask a running server instead of loading the base here", group="machine", unset="in process"
    )
    base: str = setting(
        EMBEDDED_NAME,
        "base model: a hub id, a directory, a .gguf file, or the name of the embedded one",
        group="machine",
    )
    quantize: str | None = setting(
        None,
        "the base in NF4, as it is served, or in 16 bit",
        group="machine",
        choices=("nf4", "none"),
        unset="what the adapter was trained on",
    )
    device: str = setting(
        "auto", "where to run; auto takes CUDA if there is a device", group="machine", choices=("auto", "cpu", "cuda")
    )
    threads: int | None = setting(None, "CPU threads", group="machine", between=(1, 1024), unset="PyTorch's choice")
    cache_dir: Path | None = setting(
        None, "where a converted base is kept", group="machine", unset="the user's cache directory"
    )
    out: Path | None = setting(
        None, "directory for evaluation.json, evaluation.md and confusion.png", group="result", unset="only printed"
    )

    def __post_init__(self) -> None:
        for field in fields_of(type(self)).values():
            field.check(getattr(self, field.name))
        if self.data is None:
            raise ConfigError("--data is needed: a JSONL or CSV file of held-out examples")
        if not self.adapter:
            raise ConfigError("--adapter is needed: a PEFT directory, or the name of a trained adapter")
        if self.url is not None and self.reference is not None:
            raise ConfigError("--reference needs the 16-bit base, which no server holds: leave --url out")
        try:
            columns_of(self)
        except DataError as error:
            raise ConfigError(str(error)) from error

    @property
    def label_list(self) -> list[str]:
        return [part.strip() for part in self.labels.split(",") if part.strip()] if self.labels else []


def load_eval_config(
    flags: Mapping[str, object], environ: Mapping[str, str], config_file: str | None = None
) -> EvalConfig:
    """Puts a config together: flag, then environment, then the [eval] table of the file, then default.

    Raises:
        ConfigError: any value, key or variable is wrong, or the values do not go together.
    """
    return load_settings(EvalConfig, "eval", flags, environ, config_file)
