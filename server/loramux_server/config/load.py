"""A command's settings, put together: flag, then environment, then the config file's table, then default."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from loramux_server.config.environment import ISA_VARIABLE, KERNELS_VARIABLE
from loramux_server.config.settings import ENV_PREFIX, Settings, settings_of
from loramux_server.config.sources import from_environment, from_file, from_flags

CONFIG_VARIABLE = "LORAMUX_CONFIG"
# LORAMUX_URL is read by `loramux adapters`, LORAMUX_KERNELS and LORAMUX_ISA by whatever loads a base
OTHER_VARIABLES = (CONFIG_VARIABLE, KERNELS_VARIABLE, ISA_VARIABLE, "LORAMUX_URL")
TABLES = ("serve", "train", "eval", "plan", "merge")  # every command reads the same file and the same environment

S = TypeVar("S", bound=Settings)


def load(
    cls: type[S], given: Mapping[str, object], environ: Mapping[str, str], config_file: str | Path | None = None
) -> S:
    """One command's settings.

    Args:
        given: options of the parsed command line, by field name; only given ones may be present.
        environ: the process environment.
        config_file: value of `--config`; LORAMUX_CONFIG is taken where it is None.

    Raises:
        ConfigError: any value, key, table or variable is wrong, or the values do not go together.
    """
    path = config_file if config_file is not None else environ.get(CONFIG_VARIABLE)
    in_file = [from_file(cls, Path(path), TABLES, also=_keys_of_others(cls))] if path is not None else []
    in_environment = from_environment(cls, environ, also={*OTHER_VARIABLES, *_variables_of_others(cls, environ)})
    return cls(_build_sources=((from_flags(cls, given), in_environment, *in_file), {}))


def all_settings() -> tuple[type[Settings], ...]:
    """The settings of every table, in the order of TABLES."""
    from loramux_server.config.evaluate import EvalConfig
    from loramux_server.config.merge import MergeConfig
    from loramux_server.config.plan import PlanConfig
    from loramux_server.config.serve import ServeConfig
    from loramux_server.config.train import TrainConfig

    return ServeConfig, TrainConfig, EvalConfig, PlanConfig, MergeConfig


def _of_all_commands() -> tuple[type[Settings], ...]:
    """Two of them read the server's table."""
    from loramux_server.config.plan_serve import PlanServeConfig

    return *all_settings(), PlanServeConfig


def _keys_of_others(cls: type[Settings]) -> set[str]:
    """Keys of the same table that another command reads: a server's table is read by its plan too."""
    return {name for other in _of_all_commands() if other.table == cls.table for name in settings_of(other)}


def _variables_of_others(cls: type[Settings], environ: Mapping[str, str]) -> set[str]:
    """Variables that other commands read; their settings are imported only if some variable is not this one's."""
    own = {setting.variable for setting in settings_of(cls).values()}.union(OTHER_VARIABLES)
    if all(variable in own for variable in environ if variable.startswith(ENV_PREFIX)):
        return set()
    return {setting.variable for other in _of_all_commands() for setting in settings_of(other).values()}
