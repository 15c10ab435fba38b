"""Everything that can be set for `loramux merge`, each setting defined once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loramux_server.base.source import EMBEDDED_NAME
from loramux_server.config.settings import fields_of, setting
from loramux_server.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeConfig:
    """Settings of one merge; checked when made, never changed. Raises ConfigError."""

    adapter: str | None = setting(
        None, "a PEFT directory, a run's directory, or the name of a trained adapter", group="merge", unset="needed"
    )
    out: Path | None = setting(None, "directory of the checkpoint, new or empty", group="merge", unset="needed")
    onto: str | None = setting(
        None,
        "what the adapter is added to: the weights as NF4 holds them, or the original 16-bit ones",
        group="merge",
        choices=("nf4", "16bit"),
        unset="what it was trained on",
    )
    base: str = setting(
        EMBEDDED_NAME,
        "base model: a hub id, a directory, a .gguf file, or the name of the embedded one",
        group="machine",
    )
    device: str = setting(
        "auto",
        "where to compute; auto takes CUDA if there is a device",
        group="machine",
        choices=("auto", "cpu", "cuda"),
    )
    threads: int | None = setting(None, "CPU threads", group="machine", between=(1, 1024), unset="PyTorch's choice")
    cache_dir: Path | None = setting(
        None, "where a converted base is kept", group="machine", unset="the user's cache directory"
    )

    def __post_init__(self) -> None:
        for field in fields_of(type(self)).values():
            field.check(getattr(self, field.name))
        if not self.adapter:
            raise ConfigError("--adapter is needed: a PEFT directory, or the name of a trained adapter")
        if self.out is None:
            raise ConfigError("--out is needed: the directory that the checkpoint is written to")
