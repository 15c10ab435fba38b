"""A command's settings as its options: made from the fields of its `Settings`, so that none is written twice."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from loramux_server.cli.frame import Command, new_app
from loramux_server.config.load import CONFIG_VARIABLE, load
from loramux_server.config.serve import ServeConfig
from loramux_server.config.settings import Setting, Settings, settings_of

METAVARS = {int: "N", float: "X", Path: "PATH", str: "TEXT"}
RULE = (
    "Every setting is a flag (--cache-dir), an environment variable (LORAMUX_CACHE_DIR) and a key (cache_dir) of the "
    "[{table}] table of the config file; the first of these that has a value wins."
)


def settings_app(
    cls: type[Settings], run: Callable[..., int], *, usage: str = "[OPTIONS]", epilog: str = ""
) -> typer.Typer:
    """One command, `run(config, ctx, **others)`, that takes every setting of a class as an option.

    Its docstring is the help; its own parameters become arguments and options beside the settings.
    """
    settings = {setting.name: setting for setting in settings_of(cls).values() if not setting.secret}
    others = list(inspect.signature(run, eval_str=True).parameters.values())[2:]

    def act(ctx: typer.Context, config: str | None, **options: Any) -> int:
        own = {other.name: options[other.name] for other in others}
        given = {name: options[name] for name in settings if options[name] is not None}
        return run(load(cls, given, ctx.obj, config), ctx, **own)

    parameters = [
        inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context),
        *(other.replace(kind=inspect.Parameter.KEYWORD_ONLY) for other in others),
        _option(
            "config",
            str,
            "--config",
            metavar="FILE",
            help=f"TOML file with the [{cls.table}] table ({CONFIG_VARIABLE})",
        ),
        *(_setting_option(setting) for setting in settings.values()),
    ]
    act.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    app = new_app()
    rule = RULE.format(table=cls.table)
    app.command(cls=Command, help=inspect.getdoc(run), epilog=f"{epilog}\n\n{rule}".strip(), options_metavar=usage)(act)
    return app


def once(flag: str, help: str) -> Any:
    """A switch that stands on the command line only, since it holds for this one time."""
    return typer.Option(flag, help=help, rich_help_panel="For this time only")


def _setting_option(setting: Setting) -> inspect.Parameter:
    """A setting's option. What is given is text, which the settings read; of a switch's two flags the last counts."""
    shown = {"help": _help(setting), "rich_help_panel": setting.group}
    if setting.kind is bool:
        return _option(setting.name, bool, f"{setting.flag}/--no-{setting.flag[2:]}", **shown)
    metavar = "|".join(setting.choices) or METAVARS[setting.kind]
    return _option(setting.name, str, setting.flag, *setting.also, metavar=metavar, **shown)


def _option(name: str, kind: Any, *flags: str, **shown: Any) -> inspect.Parameter:
    annotation = Annotated[kind | None, typer.Option(*flags, **shown)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _help(setting: Setting) -> str:
    """The field's line, its further flags, and its default."""
    if setting.kind is bool:
        default = f"default: {'yes' if setting.default else 'no'}"
    elif setting.default is None:
        default = {"none": "", "needed": "needed"}.get(setting.unset, f"default: {setting.unset}")
    else:
        default = f"default: {setting.default:g}" if setting.kind is float else f"default: {setting.default}"
    also = ", ".join(flag for flag in setting.also if flag.startswith("--"))
    told = "; ".join(each for each in (also and f"also {also}", default) if each)
    return f"{setting.help} ({told})" if told else setting.help


_STORE = settings_of(ServeConfig)["adapter_dir"]


def store_option(what: str) -> Any:
    """The store's directory, for commands that work on it; `store_directory` reads it. `what`: it is to them."""
    default = f"(default: {_STORE.variable}, or else {_STORE.default})"
    return typer.Option(_STORE.flag, metavar="DIR", help=f"{what} {default}")


def store_directory(ctx: typer.Context, given: Path | None) -> Path:
    """What a command line says, or else the environment, or else the default."""
    return given or Path(ctx.obj.get(_STORE.variable) or str(_STORE.default))
