"""Everything that can be set for `loramux merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import model_validator

from loramux_server.config.settings import setting
from loramux_server.config.shared import ComparesWithFp32, RunsBase
from loramux_server.errors import ConfigError


class MergeConfig(RunsBase, ComparesWithFp32):
    """Settings of one merge."""

    table = "merge"

    adapter: str | None = setting(
        None, "a PEFT directory, a run's directory, or the name of a trained adapter", group="Merge", unset="needed"
    )
    out: Path | None = setting(
        None, "directory of the checkpoint, new or empty", group="Merge", unset="needed", also=("--output-dir",)
    )
    onto: Literal["nf4", "16bit"] | None = setting(
        None,
        "what the adapter is added to: the weights as NF4 holds them, or the original 16-bit ones",
        group="Merge",
        unset="what it was trained on",
    )

    @model_validator(mode="after")
    def _all_is_there(self) -> Self:
        if not self.adapter:
            raise ConfigError("--adapter is needed: a PEFT directory, or the name of a trained adapter")
        if self.out is None:
            raise ConfigError("--out is needed: the directory that the checkpoint is written to")
        return self
