"""What the settings of every command have in common: a frozen model, each of whose fields is written once.

A field declared with `setting(...)` gives the flag `--max-num-seqs`, the variable `LORAMUX_MAX_NUM_SEQS`, the TOML key
`max_num_seqs`, the line in `--help` and the check. `sources` reads these places, `load` puts them together.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar, Literal, Self, cast, get_args, get_origin

from pydantic import Field, ValidationError, model_validator
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from loramux_server.did_you_mean import suggest
from loramux_server.errors import ConfigError
from loramux_server.plain_text import shortened

ENV_PREFIX = "LORAMUX_"
KINDS = {int: "a whole number", float: "a number", str: "text", Path: "a path", bool: "true or false"}
_OUTSIDE = ("greater_than_equal", "less_than_equal")


def setting(
    default: object,
    help: str,
    *,
    group: str,
    between: tuple[int, int] | None = None,
    unset: str = "none",
    also: tuple[str, ...] = (),
    secret: bool = False,
) -> Any:
    """Declares one field of a `Settings` class; returns Any for the type checker, as `Field` does.

    Args:
        group: the heading it stands under in `--help`.
        between: lowest and highest number allowed.
        unset: what `--help` shows as default where the default is None.
        also: further flags, those that other tools of the field call it by.
        secret: no flag exists, and no message or repr shows the value.
    """
    low, high = between or (None, None)
    extra: dict[str, Any] = {"group": group, "unset": unset, "also": also}
    return Field(default, description=help, ge=low, le=high, repr=not secret, json_schema_extra=extra)


class Settings(BaseSettings):
    """Base class of one command's settings: checked when made, never changed. Raises ConfigError."""

    model_config = SettingsConfigDict(
        frozen=True, strict=True, extra="forbid", hide_input_in_errors=True, defer_build=True
    )
    table: ClassVar[str]
    """The table of the config file that holds them."""

    def __init__(self, **given: Any) -> None:
        try:
            super().__init__(**given)
        except ValidationError as error:
            raise ConfigError(in_words(type(self), error.errors()[0])) from error

    @model_validator(mode="after")
    def _can_be_named(self) -> Self:
        """A NUL ends every path, host and name for the system; only a config file can hold one."""
        for name, value in self:
            if isinstance(value, str | Path) and "\0" in str(value):
                one = settings_of(type(self))[name]
                raise ConfigError(f"{one.variable if one.secret else one.flag} must not hold a NUL character")
        return self

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, *_: Any, **__: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Made directly, settings take what they are given and read no environment; `load` names its own sources."""
        return (init_settings,)


@dataclass(frozen=True, slots=True)
class Setting:
    """One field of a `Settings` class, as the command line and messages see it."""

    name: str
    kind: type
    default: object
    help: str
    group: str
    unset: str
    also: tuple[str, ...]
    choices: tuple[str, ...]
    between: tuple[int, int] | None
    secret: bool

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return ENV_PREFIX + self.name.upper()

    def refusal(self, error: str, value: object) -> str:
        """What is wrong with a value, in words that name the flag, or the variable of a secret.

        Args:
            error: pydantic's type of it.
        """
        label = self.variable if self.secret else self.flag
        if error in _OUTSIDE and self.between:
            return f"{label} must be from {self.between[0]} to {self.between[1]}, not {shortened(value)}"
        shown = "" if self.secret else f", not {shortened(repr(value) if isinstance(value, str) else value)}"
        if self.choices:
            return f"{label} must be one of {', '.join(self.choices)}{shown}{suggest(value, self.choices)}"
        return f"{label} must be {KINDS[self.kind]}{shown}"


@cache
def settings_of(cls: type[Settings]) -> dict[str, Setting]:
    """Every setting of a class by name, in the order of its help: groups that the class itself declares come first."""
    found: dict[str, Setting] = {}
    for name, field in cls.model_fields.items():
        kind = next(part for part in (get_args(field.annotation) or (field.annotation,)) if part is not NoneType)
        choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else get_args(kind)
        low, high = (
            next((getattr(bound, side) for bound in field.metadata if hasattr(bound, side)), None)
            for side in ("ge", "le")
        )
        extra = cast(dict[str, Any], field.json_schema_extra)
        found[name] = Setting(
            name=name,
            kind=str if choices else cast(type, kind),
            default=field.default,
            help=field.description or "",
            group=extra["group"],
            unset=extra["unset"],
            also=extra["also"],
            choices=choices,
            between=None if low is None or high is None else (low, high),
            secret=not field.repr,
        )
    own = cls.__dict__.get("__annotations__", {})
    groups = [found[name].group for name in [*(name for name in found if name in own), *found]]
    return {each.name: each for each in sorted(found.values(), key=lambda each: groups.index(each.group))}


def in_words(cls: type[Settings], error: ErrorDetails) -> str:
    """The first thing that pydantic finds wrong with settings, in our words."""
    name = str(error["loc"][0])
    known = settings_of(cls)
    if name not in known:
        return f"unknown setting {name}{suggest(name, known)}"
    return known[name].refusal(error["type"], error["input"])
