"""`loramux adapters push|pull|list|show|rollback|pin|unpin|rm`: adapters of a running server, through its HTTP API."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from loramux_server.cli import backup as cli_backup
from loramux_server.client.adapters import AdaptersClient

URL_VARIABLE = "LORAMUX_URL"
KEY_VARIABLES = ("LORAMUX_ADMIN_KEY", "LORAMUX_API_KEY")
DEFAULT_URL = "http://127.0.0.1:8000"
BAR_WIDTH = 30
COLUMNS = ("name", "version", "rank", "bytes", "tier")
SHORT_VERSION = 12  # digits of a digest, enough to tell versions apart


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "adapters",
        help="manage the adapters of a running server, back up its store",
        description="Manage the adapters of a running server through its HTTP API, and back up and restore its store.",
        epilog=f"A key is taken from {KEY_VARIABLES[0]}, or else from {KEY_VARIABLES[1]}.",
        allow_abbrev=False,
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)

    push = _action(actions, "push", _push, "upload a PEFT directory; requests can name it as soon as this returns")
    push.add_argument(
        "directory", metavar="DIR", type=Path, help="holds adapter_config.json, adapter_model.safetensors"
    )
    push.add_argument("--name", help="name under which requests ask for it (default: the directory's name)")
    push.add_argument("--validate-only", action="store_true", help="check it against the server's base, store nothing")

    pull = _action(actions, "pull", _pull, "download an adapter as a PEFT directory")
    pull.add_argument("name", metavar="NAME")
    pull.add_argument("directory", metavar="DIR", type=Path, help="a new or empty directory")

    listing = _action(actions, "list", _list, "list every adapter")
    listing.add_argument("--json", action="store_true", help="print the server's own JSON")

    show = _action(actions, "show", _show, "show one adapter")
    show.add_argument("name", metavar="NAME")
    show.add_argument("--json", action="store_true", help="print the server's own JSON")

    rollback = _action(actions, "rollback", _rollback, "go back to the version before, for requests from now on")
    rollback.add_argument("name", metavar="NAME")
    rollback.add_argument("--version", metavar="DIGEST", help="go to this kept version; its first 8 digits are enough")

    pin = _action(actions, "pin", _pin, "keep an adapter in memory, whichever version it points at")
    pin.add_argument("name", metavar="NAME")

    unpin = _action(actions, "unpin", _unpin, "let an adapter leave memory when others need the room")
    unpin.add_argument("name", metavar="NAME")

    remove = _action(actions, "rm", _remove, "unregister an adapter; requests that run on it finish")
    remove.add_argument("name", metavar="NAME")

    cli_backup.add_actions(actions)


def _action(
    actions: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    act: Callable[[argparse.Namespace, AdaptersClient], None],
    help: str,
) -> argparse.ArgumentParser:
    parser = actions.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".", allow_abbrev=False)
    parser.add_argument("--url", help=f"the server (default: {URL_VARIABLE}, or else {DEFAULT_URL})")

    def run(args: argparse.Namespace, environ: Mapping[str, str]) -> int:
        key = next((environ[variable] for variable in KEY_VARIABLES if environ.get(variable)), None)
        act(args, AdaptersClient(args.url or environ.get(URL_VARIABLE) or DEFAULT_URL, key))
        return 0

    parser.set_defaults(run=run, parser=parser, flags=["--url", "--name", "--validate-only", "--version", "--json"])
    return parser


def _push(args: argparse.Namespace, client: AdaptersClient) -> None:
    name = args.name or args.directory.resolve().name
    bar = ProgressBar(sys.stderr)
    try:
        reply = client.push(name, args.directory, validate_only=args.validate_only, progress=bar.show)
    finally:
        bar.end()
    if args.validate_only:
        print(f"{name} can be served; nothing was stored")
        return
    outcome = reply.body.get("outcome", "created" if reply.status == 201 else "updated")
    print(f"{name} {outcome}, version {_short(reply.body.get('version'))}")


def _pull(args: argparse.Namespace, client: AdaptersClient) -> None:
    names = client.pull(args.name, args.directory)
    print(f"{args.name} -> {args.directory}: {', '.join(names)}")


def _list(args: argparse.Namespace, client: AdaptersClient) -> None:
    adapters = client.all()
    if args.json:
        print(json.dumps(adapters, indent=2))
    elif not adapters:
        print("no adapters; `loramux adapters push DIR` uploads one")
    else:
        _print_table([[_cell(column, adapter.get(column)) for column in COLUMNS] for adapter in adapters])


def _show(args: argparse.Namespace, client: AdaptersClient) -> None:
    adapter = client.show(args.name)
    if args.json:
        print(json.dumps(adapter, indent=2))
        return
    width = max(map(len, adapter), default=0)
    for field, value in adapter.items():
        text = value if isinstance(value, str) else json.dumps(value)
        print(f"{field:<{width}}  {text}")


def _rollback(args: argparse.Namespace, client: AdaptersClient) -> None:
    reply = client.rollback(args.name, args.version)
    done = "already is" if reply.get("outcome") == "unchanged" else "rolled back to"
    print(f"{args.name} {done} version {_short(reply.get('version'))}")


def _pin(args: argparse.Namespace, client: AdaptersClient) -> None:
    client.pin(args.name)
    print(f"{args.name} pinned")


def _unpin(args: argparse.Namespace, client: AdaptersClient) -> None:
    client.unpin(args.name)
    print(f"{args.name} unpinned")


def _remove(args: argparse.Namespace, client: AdaptersClient) -> None:
    client.remove(args.name)
    print(f"{args.name} removed")


def _print_table(rows: list[list[str]]) -> None:
    rows = [list(COLUMNS), *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    for row in rows:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def _cell(column: str, value: Any) -> str:
    if value is None:
        return "-"
    if column == "version":
        return _short(value)
    return _size(value) if column == "bytes" else str(value)


def _short(version: object) -> str:
    return str(version).removeprefix("sha256:")[:SHORT_VERSION]


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


class ProgressBar:
    """Draws an upload's progress on a terminal, at most ten times a second; elsewhere it draws nothing."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._began = clock()
        self._drawn: float | None = None

    def show(self, done: int, total: int) -> None:
        """Bytes sent so far and in all."""
        now = self._clock()
        if not self._stream.isatty() or (self._drawn is not None and now - self._drawn < 0.1 and done < total):
            return
        self._drawn = now
        share = done / total
        bar = "#" * round(share * BAR_WIDTH)
        speed = _size(done / max(now - self._began, 1e-3))
        self._stream.write(f"\r[{bar:<{BAR_WIDTH}}] {share:4.0%}  {_size(done)} of {_size(total)}  {speed}/s \x1b[K")
        self._stream.flush()

    def end(self) -> None:
        """Leaves the last state on a line of its own."""
        if self._drawn is not None:
            self._stream.write("\n")
            self._stream.flush()
