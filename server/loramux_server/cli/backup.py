"""`loramux adapters backup|restore`: the whole adapter store of this machine in one file, and back."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from loramux_adapters.store.store import AdapterStore
from loramux_server.cli import frame
from loramux_server.config.serve import ServeConfig
from loramux_server.config.settings import settings_of
from loramux_server.errors import CommandFailed
from loramux_server.plain_text import for_reader
from loramux_server.publishing.backup import BackupOutcome, describe, restore_backup, write_backup

_SETTING = settings_of(ServeConfig)["adapter_dir"]
_EPILOG = "It works on the store's directory, not through a server; one may run on it meanwhile."

Directory = Annotated[
    Path | None,
    typer.Option(
        _SETTING.flag,
        metavar="DIR",
        help=f"the store (default: {_SETTING.variable}, or else {_SETTING.default})",
    ),
]

backup, restore = frame.new_app(), frame.new_app()


@backup.command(cls=frame.Command, epilog=_EPILOG)
def write(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="a new file")],
    adapter_dir: Directory = None,
) -> int:
    """Write every adapter of a store, with all versions, to one tar.gz."""
    directory = _directory(ctx, adapter_dir)
    if not (directory / "index.sqlite").is_file():
        raise CommandFailed(f"{directory} holds no adapter store; name one with --adapter-dir")
    store = AdapterStore(directory, owner=False)
    try:
        return _say(write_backup(store, file), "backed up")
    finally:
        store.close()


@restore.command(cls=frame.Command, epilog=_EPILOG)
def read(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="what `backup` wrote")],
    replace: Annotated[bool, typer.Option("--replace", help="change names that the store has already, too")] = False,
    adapter_dir: Directory = None,
) -> int:
    """Enter the adapters of a backup into a store."""
    store = AdapterStore(_directory(ctx, adapter_dir), owner=False)
    try:
        return _say(restore_backup(store, file, replace=replace), "restored")
    finally:
        store.close()


def _directory(ctx: typer.Context, given: Path | None) -> Path:
    return given or Path(ctx.obj.get(_SETTING.variable) or str(_SETTING.default))


def _say(outcome: BackupOutcome, verb: str) -> int:
    """Prints what became of it; returns the exit code."""
    stream = sys.stderr if outcome.refused else sys.stdout
    for line in describe(outcome, verb):
        print(for_reader(line, stream), file=stream)
    return 1 if outcome.refused else 0
