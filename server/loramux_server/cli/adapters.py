"""`loramux adapters push|pull|list|show|rollback|pin|unpin|rm`: adapters of a running server, through its HTTP API.

What works without a server is in modules of its own: `backup`, `convert`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from loramux_adapters.names import check_name
from loramux_server.cli import frame
from loramux_server.cli.screen import LineBar, TransferBar, print_table
from loramux_server.client.adapter_source import AdapterSource
from loramux_server.client.adapters import AdaptersClient
from loramux_server.client.retry import DEFAULT_SECONDS, Patience
from loramux_server.config.environment import KEY_VARIABLES, key_of
from loramux_server.errors import ConfigError

URL_VARIABLE = "LORAMUX_URL"
DEFAULT_URL = "http://127.0.0.1:8000"
COLUMNS = ("name", "version", "rank", "layers", "size", "tier", "updated", "notes")
SHORT_VERSION = 12  # digits of a digest, enough to tell versions apart
MAX_WAIT = 86400.0
TIERS = {"device": "on the device", "host": "in host memory", "disk": "on disk"}
TEMPLATES = {"base": "the base's", "adapter": "its own"}
FINGERPRINTS = {
    "exact": "replays bit for bit",
    "within_tolerance": "replays, as closely as on other numerics it can",
    "mismatch": "does not replay; it was published by force",
    "skipped": "not replayed: the upload asked for that",
    "none": "none was replayed",
}

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
    loramux adapters push acme/support-lora@v2 --name support
    loramux adapters list

A key is taken from {KEY_VARIABLES[0]}, or else from {KEY_VARIABLES[1]}.""",
)


@app.command(cls=frame.Command)
def push(
    ctx: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            metavar="DIR|REPO",
            help="a directory with adapter_config.json and adapter_model.safetensors; or a repository on the model "
            "hub, as owner/name or owner/name@revision",
            show_default=False,
        ),
    ],
    name: Annotated[
        str | None,
        typer.Option(
            "--name", metavar="TEXT", help="what requests call it (default: the directory's or repository's name)"
        ),
    ] = None,
    validate_only: Annotated[
        bool, typer.Option("--validate-only", help="check it against the server's base, store nothing")
    ] = False,
    skip_replay: Annotated[
        bool,
        typer.Option("--skip-replay", help="try it out, but do not replay its fingerprint; shown with the version"),
    ] = False,
    wait: Annotated[
        float,
        typer.Option(
            "--wait",
            metavar="SECONDS",
            help="longest to go on trying while the server is busy or starts again (default: 300)",
            show_default=False,
        ),
    ] = DEFAULT_SECONDS,
    url: Url = None,
) -> None:
    """Upload a PEFT directory, or a repository of the model hub; requests can name it at once.

    A repository's safetensors weights and the small files beside them are fetched with huggingface_hub: HF_TOKEN opens
    gated ones, HF_ENDPOINT names another hub. The commit is shown with the version.
    """
    if not 0 <= wait <= MAX_WAIT:
        raise ConfigError(f"--wait must be from 0 to {MAX_WAIT:.0f}, not {wait:g}")
    adapter = AdapterSource.of(source)
    name = check_name(name if name is not None else adapter.name)
    fetching, sending = LineBar(sys.stderr), TransferBar(sys.stderr)

    def fetched(line: str) -> None:
        fetching.end()
        frame.show(line)

    try:
        with adapter.files(fetching.show, fetched) as directory:
            reply = _client(ctx, url).push(
                name,
                directory,
                validate_only=validate_only,
                skip_replay=skip_replay,
                progress=sending.show,
                patience=Patience(wait, sending.line),
            )
    finally:
        fetching.end()
        sending.end()
    if validate_only:
        frame.show(f"{name} can be served; nothing was stored")
    else:
        outcome = reply.body.get("outcome", "created" if reply.status == 201 else "updated")
        frame.show(f"{name} {outcome}, version {_short(reply.body.get('version'))}")
    for remark in _remarks(reply.body):
        frame.show(f"  {remark}")


@app.command(cls=frame.Command)
def pull(
    ctx: typer.Context,
    name: Name,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="a new or empty directory")],
    url: Url = None,
) -> None:
    """Download an adapter as a PEFT directory."""
    names = _client(ctx, url).pull(name, directory)
    frame.show(f"{name} -> {directory}: {', '.join(names)}")


@app.command(name="list", cls=frame.Command)
def list_all(ctx: typer.Context, json_: Json = False, url: Url = None) -> None:
    """List every adapter."""
    adapters = _client(ctx, url).all()
    if json_:
        print(json.dumps(adapters, indent=2))
    elif not adapters:
        frame.show("no adapters; `loramux adapters push DIR` uploads one")
    else:
        print_table(COLUMNS, [_listed(adapter) for adapter in adapters], stacks=True)


@app.command(cls=frame.Command)
def show(ctx: typer.Context, name: Name, json_: Json = False, url: Url = None) -> None:
    """Show one adapter."""
    adapter = _client(ctx, url).show(name)
    if json_:
        print(json.dumps(adapter, indent=2))
    else:
        print_table((), list(_rows(adapter)))


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
    frame.show(f"{name} {done} version {_short(reply.get('version'))}")


@app.command(cls=frame.Command)
def pin(ctx: typer.Context, name: Name, url: Url = None) -> None:
    """Keep an adapter in memory, whichever version it points at."""
    _client(ctx, url).pin(name)
    frame.show(f"{name} pinned")


@app.command(cls=frame.Command)
def unpin(ctx: typer.Context, name: Name, url: Url = None) -> None:
    """Let an adapter leave memory when others need the room."""
    _client(ctx, url).unpin(name)
    frame.show(f"{name} unpinned")


@app.command(cls=frame.Command)
def rm(ctx: typer.Context, name: Name, url: Url = None) -> None:
    """Unregister an adapter; requests that run on it finish."""
    _client(ctx, url).remove(name)
    frame.show(f"{name} removed")


frame.later(
    app,
    "convert",
    "Bring an adapter that another tool wrote into PEFT's form.",
    "loramux_server.cli.convert",
)
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


def _remarks(adapter: dict[str, Any]) -> list[str]:
    """What whoever uploads an adapter should know of it."""
    notes = adapter.get("notes")
    remarks = ["its fingerprint was not replayed"] if adapter.get("fingerprint") == "skipped" else []
    return remarks + [str(note) for note in (notes if isinstance(notes, list) else ())]


def _listed(adapter: dict[str, Any]) -> list[str]:
    """A line of the list, in the order of COLUMNS."""
    return [
        _told(adapter.get("name")),
        _short(adapter.get("version")),
        _told(adapter.get("rank")),
        _layers(adapter.get("layers")),
        _size(adapter.get("bytes")),
        _told(adapter.get("tier")),
        _time(adapter.get("updated")),
        ", ".join(_marks(adapter)),
    ]


def _rows(adapter: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What is known of one adapter, in words; each version has a line, and what we have no words for too."""
    known = {
        "name": _told(adapter.get("name")),
        "version": _told(adapter.get("version")),
        "rank": _told(adapter.get("rank")),
        "layers": _layers(adapter.get("layers")),
        "target_modules": ", ".join(map(str, adapter.get("target_modules") or ())),
        "bytes": _size(adapter.get("bytes")),
        "tier": _in_words(TIERS, adapter.get("tier")),
        "pinned": _pinned(adapter),
        "base": f"{_told(adapter.get('base'))}{_verified(adapter.get('base_verified'))}",
        "chat_template": _in_words(TEMPLATES, adapter.get("chat_template")),
        "context": "the base's" if adapter.get("context") is None else f"{_told(adapter.get('context'))} tokens",
        "generation_defaults": _defaults(adapter.get("generation_defaults")),
        "fingerprint": _in_words(FINGERPRINTS, adapter.get("fingerprint")),
        "requests": f"{_told(adapter.get('requests'))} running",
        "created": _time(adapter.get("created")),
        "updated": _time(adapter.get("updated")),
    }
    labels = {"target_modules": "modules", "bytes": "size", "tier": "where", "chat_template": "template"}
    labels["generation_defaults"] = "defaults"
    if adapter.get("corrupt"):
        yield "DAMAGED", "its stored files cannot be read; upload it again"
    yield from ((labels.get(field, field), text) for field, text in known.items() if field in adapter)
    told = {*known, "id", "object", "corrupt", "base_verified", "notes", "versions"}
    yield from ((field, _told(value)) for field, value in adapter.items() if field not in told)
    for field, lines in (
        ("notes", map(str, adapter.get("notes") or ())),
        ("versions", map(_version_in_words, adapter.get("versions") or ())),
    ):
        yield from (("" if at else field, line) for at, line in enumerate(lines))


def _defaults(defaults: object) -> str:
    """What requests get that say nothing of it."""
    if not isinstance(defaults, dict) or not defaults:
        return "the server's"
    return ", ".join(f"{name} {_told(value)}" for name, value in defaults.items())


def _pinned(adapter: dict[str, Any]) -> str:
    if not adapter.get("pinned"):
        return "no"
    return "yes, it stays in memory" if not adapter.get("corrupt") else "yes, once it is uploaded again"


def _version_in_words(version: dict[str, Any]) -> str:
    parts = [_short(version.get("version")), _time(version.get("created")), f"rank {_told(version.get('rank'))}"]
    parts += [f"{_layers(version['layers'])} layers"] if version.get("layers") else []
    parts += [_size(version.get("bytes")), _in_words(TIERS, version.get("tier"))]
    return ", ".join([*parts, *(["current"] if version.get("current") else []), *_marks(version)])


def _marks(adapter: dict[str, Any]) -> list[str]:
    """What is out of the ordinary about an adapter or a version."""
    said = {"skipped": "fingerprint not replayed", "mismatch": "fingerprint does not replay"}
    marks = ["pinned"] if adapter.get("pinned") else []
    marks += ["DAMAGED"] if adapter.get("corrupt") else []
    fingerprint = said.get(str(adapter.get("fingerprint")))
    return [*marks, fingerprint] if fingerprint else marks


def _verified(verified: object) -> str:
    return ", which the adapter names as its base" if verified else "; the adapter does not name it as its base"


def _layers(layers: object) -> str:
    """`14 of 28`, or `-` where the server does not say."""
    if not isinstance(layers, dict) or not {"adapted", "of"} <= layers.keys():
        return "-"
    return f"{layers['adapted']} of {layers['of']}"


def _in_words(words: Mapping[str, str], value: object) -> str:
    return words.get(str(value), _told(value))


def _told(value: object) -> str:
    return "-" if value is None else value if isinstance(value, str) else json.dumps(value)


def _time(value: object) -> str:
    """Unix seconds as this machine's date and time."""
    try:
        return datetime.fromtimestamp(float(str(value))).astimezone().strftime("%Y-%m-%d %H:%M")
    except (ValueError, OverflowError, OSError):
        return "-"


def _short(version: object) -> str:
    return "-" if version is None else str(version).removeprefix("sha256:")[:SHORT_VERSION]


def _size(count: object) -> str:
    if not isinstance(count, int | float):
        return "-"
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
