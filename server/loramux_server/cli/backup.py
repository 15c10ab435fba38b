"""`loramux adapters backup|restore|quarantine|rebuild-index`: what is done with the store's directory itself."""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from loramux_adapters.store.quarantine import QUARANTINE, Quarantine
from loramux_adapters.store.rebuild import rebuild_index as make_anew
from loramux_adapters.store.store import AdapterStore
from loramux_server.access.actor import acting, at_the_shell
from loramux_server.access.audit_file import AuditFile
from loramux_server.cli import frame
from loramux_server.cli.options import store_directory, store_option
from loramux_server.cli.screen import print_table
from loramux_server.errors import CommandFailed
from loramux_server.plain_text import for_reader
from loramux_server.publishing.backup import BackupOutcome, describe, restore_backup, write_backup

_EPILOG = "It works on the store's directory, not through a server; one may run on it meanwhile."

Directory = Annotated[Path | None, store_option("the store")]

backup, restore, quarantine, rebuild = (frame.new_app() for _ in range(4))


@backup.command(cls=frame.Command, epilog=_EPILOG)
def write(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="a new file")],
    adapter_dir: Directory = None,
) -> int:
    """Write every adapter of a store, with all versions, to one tar.gz."""
    directory = _existing(ctx, adapter_dir)
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
    directory = store_directory(ctx, adapter_dir)
    store = AdapterStore(directory, owner=False)
    store.tell_changed(AuditFile(directory).changed)
    try:
        with acting(at_the_shell()):
            return _say(restore_backup(store, file, replace=replace), "restored")
    finally:
        store.close()


@quarantine.command(cls=frame.Command, epilog=_EPILOG)
def list_quarantine(ctx: typer.Context, adapter_dir: Directory = None) -> None:
    """List what the store has set aside: damaged versions, and files that its index does not know."""
    directory = _existing(ctx, adapter_dir)
    found = Quarantine(directory).all() if (directory / QUARANTINE).is_dir() else []
    if not found:
        print("nothing is set aside")
        return
    print_table(
        ("since", "bytes", "directory", "why"),
        [
            (datetime.fromtimestamp(one.since).isoformat(" "), str(one.nbytes), f"{QUARANTINE}/{one.name}", one.reason)
            for one in found
        ],
    )


@rebuild.command(cls=frame.Command, epilog="No server may run on the store meanwhile. The old index is kept aside.")
def rebuild_index(ctx: typer.Context, adapter_dir: Directory = None) -> int:
    """Make the store's index anew, from what each version's directory says of itself."""
    directory = _existing(ctx, adapter_dir)
    rebuilt = make_anew(directory)
    AdapterStore(directory).close()  # which brings the records up to it, and sets aside what nobody knows
    for line in rebuilt.lines():
        print(line)
    return 0 if rebuilt.is_whole else 1


def _existing(ctx: typer.Context, given: Path | None) -> Path:
    """The store's directory, with its index or without. Raises CommandFailed where none is."""
    directory = store_directory(ctx, given)
    if not (directory / "versions").is_dir():
        raise CommandFailed(f"{directory} holds no adapter store; name one with --adapter-dir")
    return directory


def _say(outcome: BackupOutcome, verb: str) -> int:
    """Prints what became of it; returns the exit code."""
    stream = sys.stderr if outcome.refused else sys.stdout
    for line in describe(outcome, verb):
        print(for_reader(line, stream), file=stream)
    return 1 if outcome.refused else 0
