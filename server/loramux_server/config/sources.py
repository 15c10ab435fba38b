"""Where a setting may stand: on the command line, in the environment, in a TOML file; each is read strictly."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError
from pydantic_settings import InitSettingsSource

from loramux_server.config.settings import ENV_PREFIX, Settings, settings_of
from loramux_server.did_you_mean import suggest
from loramux_server.errors import ConfigError


def from_flags(cls: type[Settings], given: Mapping[str, object]) -> InitSettingsSource:
    """The settings among a parsed command line's options: texts, and switches as they are. Raises ConfigError."""
    return InitSettingsSource(
        cls, {name: _from_text(cls, name, str(given[name])) for name in settings_of(cls) if name in given}
    )


def from_environment(cls: type[Settings], environ: Mapping[str, str], also: Collection[str] = ()) -> InitSettingsSource:
    """The settings among the environment's variables.

    Args:
        also: variables of our prefix that other parts read.

    Raises:
        ConfigError: a variable of our prefix that nothing reads, or a value of the wrong type.
    """
    by_variable = {setting.variable: setting for setting in settings_of(cls).values()}
    values: dict[str, object] = {}
    for variable, text in environ.items():
        if variable not in by_variable:
            if variable.startswith(ENV_PREFIX) and variable not in also:
                hint = suggest(variable, by_variable) + _by_kubernetes(text)
                raise ConfigError(f"unknown environment variable {variable}{hint}")
            continue
        name = by_variable[variable].name
        try:
            values[name] = _from_text(cls, name, text)
        except ConfigError as error:
            raise ConfigError(f"environment variable {variable}: {error}{_by_kubernetes(text)}") from error
    return InitSettingsSource(cls, values)


def from_file(
    cls: type[Settings], path: Path, tables: Collection[str], also: Collection[str] = ()
) -> InitSettingsSource:
    """The settings in one table of a TOML file, which may hold these tables.

    Args:
        also: keys of the table that other commands read.
    Raises:
        ConfigError: the file cannot be read or parsed, a key is unknown, or a value has the wrong type.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the config file {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # TOML syntax, not UTF-8, or nested too deeply to be read
        raise ConfigError(f"the config file {path} is not valid TOML: {error}") from error
    table, known = cls.table, settings_of(cls)
    for key, value in document.items():
        if not isinstance(value, dict):
            hint = f"; settings belong under [{table}]" if key in known else suggest(key, [table])
            raise ConfigError(f"config file {path}: unknown key {key} outside any table{hint}")
        if key not in tables:
            raise ConfigError(f"config file {path}: unknown table [{key}]; settings belong under [{table}]")
    values: dict[str, object] = {}
    for key, value in document.get(table, {}).items():
        if key not in known and key in also:
            continue
        if key not in known:
            raise ConfigError(f"config file {path}: unknown key {key} in [{table}]{suggest(key, known)}")
        try:
            values[key] = _from_toml(cls, key, value)
        except ConfigError as error:
            raise ConfigError(f"config file {path}, key {key}: {error}") from error
    return InitSettingsSource(cls, values)


@cache
def _adapter(cls: type[Settings], name: str) -> TypeAdapter[Any]:
    """Checks one field alone, so that the message can say where its value stands."""
    field = cls.model_fields[name]
    checked: Any = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
    return TypeAdapter(checked)


def _from_text(cls: type[Settings], name: str, text: str) -> object:
    """The value that a flag's or a variable's text means. Raises ConfigError."""
    setting = settings_of(cls)[name]
    try:
        if setting.kind is int and "." in text:  # pydantic would take "8000.0", which a file may not say either
            raise ConfigError(setting.refusal("int_parsing", text))
        return _adapter(cls, name).validate_strings(text)
    except ValidationError as error:
        raise ConfigError(setting.refusal(error.errors()[0]["type"], text)) from error


def _from_toml(cls: type[Settings], name: str, value: object) -> object:
    """The value that a TOML value means, read as JSON is: a path is text there, and 30 is as good as 30.0."""
    try:
        in_json = json.dumps(value, default=lambda moment: {})  # a date or a time, which no setting is, nor a table
        return _adapter(cls, name).validate_json(in_json, strict=True)
    except ValidationError as error:
        raise ConfigError(settings_of(cls)[name].refusal(error.errors()[0]["type"], value)) from error


def _by_kubernetes(text: str) -> str:
    """A Kubernetes service called loramux sets LORAMUX_PORT=tcp://... and its like in every pod of the namespace."""
    if "://" not in text:
        return ""
    return " (if a Kubernetes service named loramux put it there, set enableServiceLinks: false in the pod)"
