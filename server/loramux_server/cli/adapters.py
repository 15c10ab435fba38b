"""`loramux adapters push|pull|list|show|rollback|pin|unpin|rm`: adapters of a running server, through its HTTP API."""

from __future__ import annotations

import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from loramux_server.cli import frame
from loramux_server.cli.screen import print_table, transfer_bar
from loramux_server.client.adapters import AdaptersClient
from loramux_server.config.environment import KEY_VARIABLES, key_of

URL_VARIABLE = "LORAMUX_URL"
DEFAULT_URL = "http://127.0.0.1:8000"
COLUMNS = ("name", "version", "rank", "bytes", "tier")
UNTOLD = ("id", "object")  # by `show`: the name once more, and that it is an adapter
SHORT_VERSION = 12  # digits of a digest, enough to tell versions apart

Url = Annotated[
    str | None,
    typer.Option("--url", metavar="URL", help=f"the server (default: {URL_VARIABLE}, or else {DEFAULT_URL})"),
]
Name = Annotated[str, typer.Argument(metavar="NAME", help="the adapter's name", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="print the server's own JSON")]

app = frame.new_app(
    "Manage the adapters of a running server through its HTTP API, and back up and restore its store.",
    epilog=f"""\
Examples:

    loramux adapters push adapters-trained/spam/adapter --name spam
    loramux adapters list

A key is taken from {KEY_VARIABLES[0]}, or else from {KEY_VARIABLES[1]}.""",
)


@app.command(cls=frame.Command)
def push(
    ctx: typer.Context,
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="holds adapter_config.json and adapter_model.safetensors")
    ],
    name: Annotated[
        str | None,
        typer.Option("--name", metavar="TEXT", help="what requests call it (default: the directory's name)"),
    ] = None,
    validate_only: Annotated[
        bool, typer.Option("--validate-only", help="check it against the server's base, store nothing")
    ] = False,
    url: Url = None,
) -> None:
    """Upload a PEFT directory; requests can name it at once."""
    name = name or directory.resolve().name
    with transfer_bar(sys.stderr) as show:
        reply = _client(ctx, url).push(name, directory, validate_only=validate_only, progress=show)
    if validate_only:
        print(f"{name} can be served; nothing was stored")
        return
    outcome = reply.body.get("outcome", "created" if reply.status == 201 else "updated")
    print(f"{name} {outcome}, version {_short(reply.body.get('version'))}")


@app.command(cls=frame.Command)
def pull(
    ctx: typer.Context,
    name: Name,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="a new or empty directory")],
    url: Url = None,
) -> None:
    """Download an adapter as a PEFT directory."""
    names = _client(ctx, url).pull(name, directory)
    print(f"{name} -> {directory}: {', '.join(names)}")


@app.command(name="list", cls=frame.Command)
def list_all(ctx: typer.Context, json_: Json = False, url: Url = None) -> None:
    """List every adapter."""
    adapters = _client(ctx, url).all()
    if json_:
        print(json.dumps(adapters, indent=2))
    elif not adapters:
        print("no adapters; `loramux adapters push DIR` uploads one")
    else:
        print_table(COLUMNS, [[_cell(column, adapter.get(column)) for column in COLUMNS] for adapter in adapters])


@app.command(cls=frame.Command)
def show(ctx: typer.Context, name: Name, json_: Json = False, url: Url = None) -> None:
    """Show one adapter."""
    adapter = _client(ctx, url).show(name)
    if json_:
        print(json.dumps(adapter, indent=2))
    else:
        print_table((), [row for field in adapter if field not in UNTOLD for row in _rows(field, adapter[field])])


@app.command(cls=frame.Command)
def rollback(
    ctx: typer.Context,
    name: Name,
    version: Annotated[
        str | None,
        typer.Option("--version", metavar="DIGEST", help="go to this kept version; its first 8 digits are enough"),
    ] = None,
    url: Url = None,
) -> None:
    """Go back to the version before, for requests from now on."""
    reply = _client(ctx, url).rollback(name, version)
    done = "already is" if reply.get("outcome") == "unchanged" else "rolled back to"
    print(f"{name} {done} version {_short(reply.get('version'))}")


@app.command(cls=frame.Command)
def pin(ctx: typer.Context, name: Name, url: Url = None) -> None:
    """Keep an adapter in memory, whichever version it points at."""
    _client(ctx, url).pin(name)
    print(f"{name} pinned")


@app.command(cls=frame.Command)
def unpin(ctx: typer.Context, name: Name, url: Url = None) -> None:
    """Let an adapter leave memory when others need the room."""
    _client(ctx, url).unpin(name)
    print(f"{name} unpinned")


@app.command(cls=frame.Command)
def rm(ctx: typer.Context, name: Name, url: Url = None) -> None:
    """Unregister an adapter; requests that run on it finish."""
    _client(ctx, url).remove(name)
    print(f"{name} removed")


frame.later(
    app,
    "backup",
    "Write every adapter of a store, with all versions, to one tar.gz.",
    "loramux_server.cli.backup",
    "backup",
)
frame.later(app, "restore", "Enter the adapters of a backup into a store.", "loramux_server.cli.backup", "restore")
frame.later(app, "quarantine", "List what a store has set aside.", "loramux_server.cli.backup", "quarantine")
frame.later(app, "rebuild-index", "Make a store's index anew.", "loramux_server.cli.backup", "rebuild")


def _client(ctx: typer.Context, url: str | None) -> AdaptersClient:
    return AdaptersClient(url or ctx.obj.get(URL_VARIABLE) or DEFAULT_URL, key_of(ctx.obj))


def _rows(field: str, value: Any) -> list[tuple[str, str]]:
    """A field of one adapter in words; of several versions, each has a line."""
    if field == "versions":
        return [("" if at else field, _version_in_words(version)) for at, version in enumerate(value)]
    if field in ("created", "updated"):
        return [(field, datetime.fromtimestamp(value).astimezone().isoformat(" "))]
    if field == "bytes":
        return [(field, _size(value))]
    return [(field, value if isinstance(value, str) else json.dumps(value))]


def _version_in_words(version: dict[str, Any]) -> str:
    marks = [mark for mark in ("current", "corrupt") if version.get(mark)]
    digest, rank, size, tier = (_cell(column, version.get(column)) for column in ("version", "rank", "bytes", "tier"))
    return ", ".join([digest, f"rank {rank}", size, tier, *marks])


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
