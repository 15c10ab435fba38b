"""Everything that can be set for `loramux eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import model_validator

from loramux_server.config.settings import setting
from loramux_server.config.shared import MACHINE, ComparesWithFp32, LabelledExamples, RunsBase
from loramux_server.errors import ConfigError


class EvalConfig(RunsBase, ComparesWithFp32, LabelledExamples):
    """Settings of one evaluation."""

    table = "eval"

    data: Path | None = setting(
        None, "held-out examples, never trained on: JSONL or CSV as for `loramux train`", group="Data", unset="needed"
    )
    train_data: Path | None = setting(
        None,
        "the training examples: gives the majority baseline, and shows overfitting",
        group="Data",
        unset="not looked at",
    )
    limit: int = setting(0, "evaluate on the first N examples; 0 takes all", group="Data", between=(0, 1 << 30))
    adapter: str | None = setting(
        None,
        "a PEFT directory, a run's directory, or the name of a trained adapter; with --url its name on the server",
        group="Adapters",
        unset="needed",
    )
    compare: str | None = setting(None, "a further adapter, named in the same way", group="Adapters")
    reference: str | None = setting(
        None, "an adapter trained with --quantize none; it is scored on the 16-bit base", group="Adapters"
    )
    out: Path | None = setting(
        None, "directory for evaluation.json, evaluation.md and confusion.png", group="Result", unset="only printed"
    )
    url: str | None = setting(
        None, "ask a running server instead of loading the base here", group=MACHINE, unset="in process"
    )
    quantize: Literal["nf4", "none"] | None = setting(
        None,
        "the base in NF4, as it is served, or in 16 bit",
        group=MACHINE,
        unset="what the adapter was trained on",
    )

    @model_validator(mode="after")
    def _all_is_there(self) -> Self:
        if self.data is None:
            raise ConfigError("--data is needed: a JSONL or CSV file of held-out examples")
        if not self.adapter:
            raise ConfigError("--adapter is needed: a PEFT directory, or the name of a trained adapter")
        if self.url is not None and self.reference is not None:
            raise ConfigError("--reference needs the 16-bit base, which no server holds: leave --url out")
        return self
