"""The command `loramux`: parses the command line, runs one subcommand, turns errors into one line and an exit code.

Exit codes: 0 done, 1 it could not be done (the reason is on stderr), 2 the command line or the configuration is wrong,
130 interrupted. Subcommands live in `cli_<name>.py`; nothing heavy is imported before one of them runs.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata

from loramux_adapters.errors import AdapterError
from loramux_server.cli import adapters as cli_adapters
from loramux_server.cli import evaluate as cli_eval
from loramux_server.cli import merge as cli_merge
from loramux_server.cli import plan as cli_plan
from loramux_server.cli import serve as cli_serve
from loramux_server.cli import train as cli_train
from loramux_server.config.settings import suggest
from loramux_server.errors import ConfigError, LoramuxError

DISTRIBUTION = "loramux"
REPORTED = ("torch", "transformers", "bitsandbytes", "peft", "fastapi", "uvicorn")


def main(argv: Sequence[str] | None = None, environ: Mapping[str, str] | None = None) -> int:
    """Runs one command and returns its exit code. Arguments default to the process's own."""
    environ = os.environ if environ is None else environ
    args, unknown = build_parser().parse_known_args(argv)
    if unknown:
        args.parser.error(f"unknown argument {unknown[0]}{suggest(unknown[0], args.flags)}")
    try:
        code = int(args.run(args, environ))
        sys.stdout.flush()  # here, where a reader that has gone is dealt with
        return code
    except ConfigError as error:
        return _fail(error, 2)
    except (LoramuxError, AdapterError) as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:  # the reader of our output, a pager say, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="loramux",
        description="Serve many LoRA adapters over one resident NF4 base model, and train them on it.",
        epilog="`loramux COMMAND --help` explains a command.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"{DISTRIBUTION} {version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (cli_serve, cli_adapters, cli_train, cli_eval, cli_plan, cli_merge):
        command.add_parser(commands)
    about_help = "print the versions of loramux and of what it runs on"
    about = commands.add_parser("version", help=about_help, description=about_help.capitalize() + ".")
    about.set_defaults(run=_print_versions, parser=about, flags=[])
    return parser


def version() -> str:
    """The version of the installed distribution."""
    return metadata.version(DISTRIBUTION)


def _print_versions(args: argparse.Namespace, environ: Mapping[str, str]) -> int:
    print(f"{DISTRIBUTION} {version()}")
    print(f"python {sys.version.split()[0]}")
    for name in REPORTED:
        try:
            print(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            print(f"{name} not installed")
    return 0


def _fail(message: object, code: int) -> int:
    print(f"loramux: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
