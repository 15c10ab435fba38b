"""What every command has in common: help for people and for pipes, errors as one line, exit codes.

Exit codes: 0 done, 1 it could not be done (the reason is on stderr), 2 the command line or the configuration is wrong,
130 interrupted.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
from collections.abc import Mapping, Sequence
from copy import copy
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import typer
from typer.core import MarkupMode, TyperCommand, TyperGroup, TyperOption
from typer.exceptions import TyperException
from typer.main import get_command

from loramux_adapters.errors import AdapterError, InvalidAdapterName
from loramux_server.did_you_mean import suggest
from loramux_server.errors import ConfigError, LoramuxError
from loramux_server.plain_text import columns_of, for_reader, printable, shortened

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
PLAIN_COLUMNS = 100  # of help that goes to a pipe
FRAME_COLUMNS = 80  # least, for help in frames: they cut what does not fit
MAX_WORD = 400  # characters of a word in an error, such as a path
MAX_LINE = 2500  # and of a line of one
_WHOLE_HYPHEN = "\u2011"  # at which no line is broken, so that flags stay whole
_LONG_WORD = re.compile(rf"\S{{{MAX_WORD},}}")


def run(app: typer.Typer, name: str, argv: Sequence[str] | None, environ: Mapping[str, str] | None) -> int:
    """Runs a command and returns its exit code. Arguments default to the process's own."""
    try:
        code = call(app, name, sys.argv[1:] if argv is None else argv, os.environ if environ is None else environ)
        sys.stdout.flush()  # here, where a reader that has gone is dealt with
        return code
    except TyperException as error:
        return _fail(_in_words(error), 2)
    except (ConfigError, InvalidAdapterName) as error:
        return _fail(error, 2)
    except (LoramuxError, AdapterError) as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        if sys.stderr.isatty():
            print(file=sys.stderr)  # below the ^C that the terminal shows
        return _fail("interrupted", 130)
    except BrokenPipeError:  # the reader of our output, a pager say, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return _fail(f"{shortened(str(error.filename))}: {error.strerror}", 2)


def call(app: typer.Typer, name: str, argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Runs a command and returns its exit code; what goes wrong is raised. Commands find `environ` as `ctx.obj`."""
    try:
        with get_command(app).make_context(name, list(argv), obj=MappingProxyType(environ)) as context:
            return int(context.command.invoke(context) or 0)
    except typer.Exit as done:
        return done.exit_code


def configure_logging(level: str, handler: logging.Handler | None = None) -> None:
    """Our own messages from this level on, other libraries' from warnings on, all to `handler`, or else to stderr."""
    handler = handler or logging.StreamHandler(sys.stderr)
    handler.setFormatter(_LogLine(LOG_FORMAT))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in ("loramux_server", "loramux_adapters"):
        logging.getLogger(name).setLevel(level.upper())
    logging.getLogger("uvicorn").setLevel("DEBUG" if level == "debug" else "WARNING")
    logging.getLogger("bitsandbytes").setLevel("ERROR")  # it warns that it cannot fetch native code from a hub: good
    logging.captureWarnings(True)


def write(text: str) -> None:
    """A piece of text, which may or may not end a line, at once."""
    print(for_reader(text, sys.stdout), end="", flush=True)


def show(line: str) -> None:
    """A line, at once."""
    write(f"{line}\n")


def show_command(line: str) -> None:
    """A line to be copied: it is not broken, however long it is."""
    print(printable(line), flush=True)


class _LogLine(logging.Formatter):
    """Messages on one line each, with what a terminal would obey as escapes: parts of them come from clients."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), lines=True)


def _in_words(error: TyperException) -> str:
    """What is wrong with a command line; for an unknown flag, which one was meant."""
    context: Any = getattr(error, "ctx", None)
    if hasattr(error, "possibilities"):
        flag = str(getattr(error, "option_name", ""))
        params = context.command.get_params(context) if context is not None else []
        hint = suggest(flag, [each for param in params for each in (*param.opts, *param.secondary_opts)])
        said = f"unknown argument {shortened(flag)}{hint}"
    else:
        message = error.format_message().rstrip(".")
        said = message[:1].lower() + message[1:]
    return f"{said}; see `{context.command_path} --help`" if context is not None and "?" not in said else said


def _fail(message: object, code: int) -> int:
    """Tells why not. However long a word of it is, what is wrong with it can be read."""
    text = _LONG_WORD.sub(lambda word: shortened(word[0], MAX_WORD // 2), f"loramux: {message}")
    text = "\n".join(shortened(line, MAX_LINE) for line in text.split("\n"))
    print(for_reader(text, sys.stderr), file=sys.stderr)
    return code


class _Help(TyperCommand if TYPE_CHECKING else object):  # type: ignore[misc]
    """Help in colours and frames on a terminal that has room for them, else in plain lines; by topic in both."""

    rich_markup_mode: MarkupMode

    _is_shown = False

    def get_params(self, ctx: Any) -> list[Any]:
        params: list[Any] = super().get_params(ctx)
        return [_shown(param) for param in params] if self._is_shown else params

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self.rich_markup_mode = "markdown" if (columns_of(sys.stdout) or 0) >= FRAME_COLUMNS else None
        self._is_shown = True
        try:
            super().format_help(ctx, formatter)
        finally:
            self._is_shown = False
        formatter.buffer[:] = [piece.replace(_WHOLE_HYPHEN, "-") for piece in formatter.buffer]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        topics: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            if param.help:
                param.help = param.help.replace("-", _WHOLE_HYPHEN)
            record = param.get_help_record(ctx)
            if record is not None:
                standard = "Arguments" if param.param_type_name == "argument" else "Options"
                topics.setdefault(getattr(param, "rich_help_panel", None) or standard, []).append(record)
        for topic, records in topics.items():
            with formatter.section(topic):
                formatter.write_dl(records)
        if isinstance(self, TyperGroup):
            self.format_commands(ctx, formatter)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Paragraphs are filled; indented ones, which are examples, stay as they are."""
        for paragraph in (self.epilog or "").split("\n\n"):
            formatter.write_paragraph()
            if paragraph.startswith("    "):
                formatter.write(paragraph + "\n")
            else:
                formatter.write_text(paragraph.replace("-", _WHOLE_HYPHEN))


def _shown(param: Any) -> Any:
    """As help shows it: frames cut what is long, so an option stands there by its own name, and a switch once."""
    param = copy(param)
    if not isinstance(param, TyperOption):
        return param
    own, *others = [flag for flag in param.opts if flag.startswith("--")]
    if param.is_flag:
        param.metavar = ""  # instead of <bool>
        own = f"--[no-]{own[2:]}" if param.secondary_opts else own
    param.opts = [own, *(flag for flag in param.opts if flag not in (own, *others) and not flag.startswith("--"))]
    param.secondary_opts = []
    return param


class Command(_Help, TyperCommand):
    """One command."""


class Commands(_Help, TyperGroup):
    """Commands, some of which are imported only when they are called (see `later`)."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[Any, Any, list[str]]:
        if not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            ctx.fail(f"there is no command {shortened(args[0])}{suggest(args[0], self.list_commands(ctx))}")
        name, command, rest = super().resolve_command(ctx, args)
        if isinstance(command, _Later) and command.callback is not None:
            command = command.callback()
        return name, command, rest


class _Later(Command):
    """Stands for a command that is not imported yet; its callback gives the command itself."""


def new_app(help: str = "", cls: type[Commands] = Commands, **options: Any) -> typer.Typer:
    """A place for commands, with this help of its own if it holds several."""
    context_settings = {"max_content_width": PLAIN_COLUMNS, "help_option_names": ["-h", "--help"]}
    return typer.Typer(cls=cls, help=help or None, add_completion=False, context_settings=context_settings, **options)


def later(app: typer.Typer, name: str, help: str, module: str, holds: str = "app") -> None:
    """Adds a command that is listed with this help; the module that holds it is imported when it is called."""

    def stub() -> Any:
        return get_command(getattr(import_module(module), holds))

    app.command(name, cls=_Later, help=help)(stub)
