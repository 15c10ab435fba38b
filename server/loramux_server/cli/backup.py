"""`loramux adapters backup|restore`: the whole adapter store of this machine in one file, and back."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from loramux_adapters.store.store import AdapterStore
from loramux_server.config.serve import ServeConfig
from loramux_server.config.settings import fields_of
from loramux_server.errors import CommandFailed
from loramux_server.publishing.backup import BackupOutcome, describe, restore_backup, write_backup


def add_actions(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    backup = _action(actions, "backup", _backup, "write every adapter of a store, with all versions, to one tar.gz")
    backup.add_argument("file", metavar="FILE", type=Path, help="a new file")
    restore = _action(actions, "restore", _restore, "enter the adapters of a backup into a store")
    restore.add_argument("file", metavar="FILE", type=Path, help="what `backup` wrote")
    restore.add_argument("--replace", action="store_true", help="change names that the store has already, too")


def _action(
    actions: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    act: Callable[[argparse.Namespace, Path], tuple[BackupOutcome, str]],
    help: str,
) -> argparse.ArgumentParser:
    setting = fields_of(ServeConfig)["adapter_dir"]
    epilog = "It works on the store's directory, not through a server; one may run on it meanwhile."
    parser = actions.add_parser(
        name, help=help, description=help[0].upper() + help[1:] + ".", epilog=epilog, allow_abbrev=False
    )
    default = f"{setting.variable}, or else {setting.default}"
    parser.add_argument(setting.flag, type=Path, metavar="DIR", help=f"the store (default: {default})")

    def run(args: argparse.Namespace, environ: Mapping[str, str]) -> int:
        outcome, verb = act(args, args.adapter_dir or Path(environ.get(setting.variable) or str(setting.default)))
        for line in describe(outcome, verb):
            print(line, file=sys.stderr if outcome.refused else sys.stdout)
        return 1 if outcome.refused else 0

    parser.set_defaults(run=run, parser=parser, flags=[setting.flag, "--replace"])
    return parser


def _backup(args: argparse.Namespace, directory: Path) -> tuple[BackupOutcome, str]:
    if not (directory / "index.sqlite").is_file():
        raise CommandFailed(f"{directory} holds no adapter store; name one with --adapter-dir")
    store = AdapterStore(directory, owner=False)
    try:
        return write_backup(store, args.file), "backed up"
    finally:
        store.close()


def _restore(args: argparse.Namespace, directory: Path) -> tuple[BackupOutcome, str]:
    store = AdapterStore(directory, owner=False)
    try:
        return restore_backup(store, args.file, replace=args.replace), "restored"
    finally:
        store.close()
