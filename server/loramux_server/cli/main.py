"""The command `loramux`: which commands there are. Each is imported when it is called, and nothing heavy before."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Annotated

import typer

from loramux_server.cli import frame

DISTRIBUTION = "loramux"
COMMANDS = {
    "serve": "Run the server.",
    "adapters": "Manage the adapters of a running server, back up its store.",
    "keys": "Say who may call: keys, their scopes and tenants.",
    "tenants": "Say what tenants may take.",
    "audit": "Say who changed what.",
    "train": "Train an adapter on a file of examples.",
    "eval": "Say what an adapter is worth on held-out examples.",
    "plan": "Say what a training takes, or a server on a card, before it is started.",
    "merge": "Write base and adapter as one ordinary checkpoint.",
}
MODULES = {
    "eval": "evaluate",
    "plan": "plan.commands",
    "keys": "access.keys",
    "tenants": "access.tenants",
    "audit": "access.audit",
}  # of commands that are not called like theirs
REPORTED = ("torch", "triton", "transformers", "bitsandbytes", "peft", "fastapi", "uvicorn")

app = frame.new_app(
    "Serve many LoRA adapters over one resident NF4 base model, and train them on it.",
    epilog="`loramux COMMAND --help` explains a command, with examples.",
)


def main(argv: Sequence[str] | None = None, environ: Mapping[str, str] | None = None) -> int:
    """Runs one command and returns its exit code. Arguments default to the process's own."""
    return frame.run(app, DISTRIBUTION, argv, environ)


def version() -> str:
    """The version of the installed distribution."""
    return metadata.version(DISTRIBUTION)


for _name, _help in COMMANDS.items():
    frame.later(app, _name, _help, f"loramux_server.cli.{MODULES.get(_name, _name)}")


@app.command(name="version", cls=frame.Command)
def print_versions() -> None:
    """Print the versions of loramux and of what it runs on."""
    print(f"{DISTRIBUTION} {version()}")
    print(f"python {sys.version.split()[0]}")
    for name in REPORTED:
        try:
            print(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            print(f"{name} not installed")


def _print_version(asked: bool) -> None:
    if asked:
        print(f"{DISTRIBUTION} {version()}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """What stands before the command."""


if __name__ == "__main__":
    sys.exit(main())
