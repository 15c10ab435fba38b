"""The settings of one command among those of all: every command reads the same file and the same environment."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from loramux_server.config.environment import KERNELS_VARIABLE
from loramux_server.config.settings import fields_of, from_environment, from_flags, from_toml

CONFIG_VARIABLE = "LORAMUX_CONFIG"
# LORAMUX_URL is read by `loramux adapters`, LORAMUX_KERNELS by whatever loads a base
OTHER_VARIABLES = (CONFIG_VARIABLE, KERNELS_VARIABLE, "LORAMUX_URL")

T = TypeVar("T")


def load_settings(
    cls: type[T], table: str, flags: Mapping[str, object], environ: Mapping[str, str], config_file: str | None = None
) -> T:
    """Puts a command's settings together: flag, then environment, then the file's table, then default.

    Args:
        flags: attributes of the parsed command line; only given flags may be present.
        environ: the process environment.
        config_file: value of `--config`; LORAMUX_CONFIG is taken where it is None.

    Raises:
        ConfigError: any value, key, table or variable is wrong, or the values do not go together.
    """
    others = {name: other for name, other in _tables().items() if name != table}
    path = config_file if config_file is not None else environ.get(CONFIG_VARIABLE)
    in_file = from_toml(cls, Path(path), table, also=others) if path is not None else {}
    foreign = {field.variable for other in others.values() for field in fields_of(other).values()}
    in_environment = from_environment(cls, environ, also=foreign.union(OTHER_VARIABLES))
    merged: dict[str, Any] = in_file | in_environment | from_flags(cls, flags)
    return cls(**merged)


def _tables() -> dict[str, type]:
    """Table of the config file -> the settings in it, of every command."""
    from loramux_server.config.evaluate import EvalConfig
    from loramux_server.config.merge import MergeConfig
    from loramux_server.config.plan import PlanConfig
    from loramux_server.config.serve import ServeConfig  # here, since most of these modules use this one
    from loramux_server.config.train import TrainConfig

    return {"serve": ServeConfig, "train": TrainConfig, "eval": EvalConfig, "plan": PlanConfig, "merge": MergeConfig}
