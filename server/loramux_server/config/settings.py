"""How a frozen dataclass of settings becomes flags, environment variables and a TOML table, each field written once.

A field declared with `setting(...)` carries its help text and allowed values; its type and default are the dataclass's
own. From that one declaration come the flag `--max-num-seqs`, the variable `LORAMUX_MAX_NUM_SEQS`, the TOML key
`max_num_seqs`, the line in `--help` and the check.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from loramux_server.errors import ConfigError

ENV_PREFIX = "LORAMUX_"
KINDS = {int: "a whole number", float: "a number", str: "text", Path: "a path", bool: "true or false"}
_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@dataclass(frozen=True, slots=True)
class Setting:
    """What a field's declaration says beside its type and default.

    Attributes:
        group: the heading it stands under in `--help`.
        between: lowest and highest number allowed.
        choices: the only values allowed.
        unset: what `--help` shows as default where the default is None.
        secret: no flag exists, and no message or repr shows the value.
    """

    help: str
    group: str
    between: tuple[int, int] | None = None
    choices: tuple[str, ...] = ()
    unset: str = "none"
    secret: bool = False

    @property
    def allowed(self) -> str:
        """The allowed values in words; empty if anything of the right type is."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.between:
            return "from {} to {}".format(*self.between)
        return ""


def setting(
    default: object,
    help: str,
    *,
    group: str,
    between: tuple[int, int] | None = None,
    choices: tuple[str, ...] = (),
    unset: str = "none",
    secret: bool = False,
) -> Any:
    """Declares one field; see `Setting` for the arguments. Returns Any for the type checker, as `field` does."""
    declared = Setting(help, group, between, choices, unset, secret)
    return dataclasses.field(default=default, repr=not secret, metadata={"setting": declared})


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a settings class, as seen from outside."""

    name: str
    kind: type
    optional: bool
    default: object
    setting: Setting

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return ENV_PREFIX + self.name.upper()

    @property
    def label(self) -> str:
        """How messages call it: the flag, or the variable of a secret."""
        return self.variable if self.setting.secret else self.flag

    def check(self, value: object) -> None:
        """Raises ConfigError unless the value is of the right type and among the allowed ones."""
        if value is None and self.optional:
            return
        is_kind = isinstance(value, (int, float) if self.kind is float else self.kind)
        is_kind &= isinstance(value, bool) == (self.kind is bool)
        if not is_kind:
            raise ConfigError(f"{self.label} must be {KINDS[self.kind]}{self._got(value)}")
        declared = self.setting
        if declared.choices and value not in declared.choices:
            raise ConfigError(
                f"{self.label} must be {declared.allowed}{self._got(value)}{suggest(value, declared.choices)}"
            )
        if declared.between and isinstance(value, (int, float)):
            low, high = declared.between
            if not low <= value <= high:  # NaN is outside any bounds
                raise ConfigError(f"{self.label} must be {declared.allowed}{self._got(value)}")

    def parse(self, text: str) -> object:
        """The value that a flag's or a variable's text means."""
        try:
            return _WORDS[text.lower()] if self.kind is bool else self.kind(text)
        except (ValueError, KeyError) as error:
            raise ConfigError(f"{self.label} must be {KINDS[self.kind]}{self._got(text)}") from error

    def convert(self, value: object) -> object:
        """The value that a TOML value means: paths are written as strings there, and 30 is as good as 30.0."""
        if self.kind is Path and isinstance(value, str):
            return Path(value)
        if self.kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        return value

    def _got(self, value: object) -> str:
        if self.setting.secret:
            return ""
        return f", not {value!r}" if isinstance(value, str) else f", not {value}"


def fields_of(cls: type) -> dict[str, Field]:
    """Every setting of a dataclass by name, in order of declaration."""
    hints = get_type_hints(cls)
    found = {}
    for field in dataclasses.fields(cls):
        parts = get_args(hints[field.name]) or (hints[field.name],)
        kind = next(part for part in parts if part is not NoneType)
        found[field.name] = Field(field.name, kind, NoneType in parts, field.default, field.metadata["setting"])
    return found


def suggest(word: object, known: Iterable[str]) -> str:
    """`; did you mean X?`, or nothing when no known word is close."""
    close = difflib.get_close_matches(str(word), list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def add_flags(parser: argparse.ArgumentParser, cls: type) -> None:
    """Gives the parser one flag per setting that is no secret. Flags that are not given leave no attribute behind."""
    groups: dict[str, Any] = {}
    for field in fields_of(cls).values():
        declared = field.setting
        if declared.secret:
            continue
        if declared.group not in groups:
            groups[declared.group] = parser.add_argument_group(declared.group)
        default = declared.unset if field.default is None else field.default
        if field.kind is bool:
            default = "yes" if default else "no"
        details = [f"default: {default}", declared.allowed, field.variable]
        takes: dict[str, Any] = {"metavar": {int: "N", float: "X", Path: "PATH"}.get(field.kind, "TEXT")}
        if field.kind is bool:
            takes = {"action": argparse.BooleanOptionalAction}
        groups[declared.group].add_argument(
            field.flag,
            default=argparse.SUPPRESS,
            help=f"{declared.help} ({'; '.join(part for part in details if part)})".replace("%", "%%"),
            **takes,
        )


def from_flags(cls: type, given: Mapping[str, object]) -> dict[str, object]:
    """The settings among a parsed command line's attributes."""
    return {name: field.parse(str(given[name])) for name, field in fields_of(cls).items() if name in given}


def from_environment(cls: type, environ: Mapping[str, str], *, also: Iterable[str] = ()) -> dict[str, object]:
    """The settings among the environment's variables. `also` names LORAMUX_ variables that other parts read.

    Raises:
        ConfigError: a variable of our prefix that nothing reads, or a value of the wrong type.
    """
    by_variable = {field.variable: field for field in fields_of(cls).values()}
    values: dict[str, object] = {}
    for variable, text in environ.items():
        if not variable.startswith(ENV_PREFIX) or (variable in also and variable not in by_variable):
            continue
        if variable not in by_variable:
            raise ConfigError(
                f"unknown environment variable {variable}{suggest(variable, by_variable)}{_by_kubernetes(text)}"
            )
        field = by_variable[variable]
        try:
            values[field.name] = field.parse(text)
            field.check(values[field.name])
        except ConfigError as error:
            raise ConfigError(f"environment variable {variable}: {error}{_by_kubernetes(text)}") from error
    return values


def from_toml(cls: type, path: Path, table: str, *, also: Iterable[str] = ()) -> dict[str, object]:
    """The settings in one table of a TOML file. `also` names the tables that other parts read.

    Raises:
        ConfigError: the file cannot be read or parsed, a key is unknown, or a value has the wrong type.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the config file {path}: {error.strerror}") from error
    except ValueError as error:  # TOML syntax, or not UTF-8
        raise ConfigError(f"the config file {path} is not valid TOML: {error}") from error
    fields = fields_of(cls)
    for key, value in document.items():
        if not isinstance(value, dict):
            hint = f"; settings belong under [{table}]" if key in fields else suggest(key, [table])
            raise ConfigError(f"config file {path}: unknown key {key} outside any table{hint}")
        if key != table and key not in also:
            raise ConfigError(f"config file {path}: unknown table [{key}]; settings belong under [{table}]")
    values: dict[str, object] = {}
    for key, value in document.get(table, {}).items():
        if key not in fields:
            raise ConfigError(f"config file {path}: unknown key {key} in [{table}]{suggest(key, fields)}")
        values[key] = fields[key].convert(value)
        try:
            fields[key].check(values[key])
        except ConfigError as error:
            raise ConfigError(f"config file {path}, key {key}: {error}") from error
    return values


def _by_kubernetes(text: str) -> str:
    """A Kubernetes service called loramux sets LORAMUX_PORT=tcp://... and its like in every pod of the namespace."""
    if "://" not in text:
        return ""
    return " (if a Kubernetes service named loramux put it there, set enableServiceLinks: false in the pod)"
