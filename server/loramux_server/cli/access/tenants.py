"""`loramux tenants list|limit`: what tenants may take, in a store's directory or through a running server."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from loramux_server.access.caller import check_tenant
from loramux_server.access.tenant import BOUNDS
from loramux_server.cli import frame
from loramux_server.cli.access.keys import Directory, Json, Url, keys_at
from loramux_server.cli.screen import print_table
from loramux_server.errors import ConfigError

COLUMNS = ("tenant", "requests/min", "tokens/min", "at once", "adapters", "MiB", "weight", "priority")

app = frame.new_app(
    "Say what tenants may take of the server.",
    epilog="""\
A tenant is made with its first key, or its first limit. What a tenant takes beyond a limit is answered with 429 and the
time to come back.

Examples:

    loramux tenants limit acme requests_per_minute=600 tokens_per_minute=200000 requests_at_once=16
    loramux tenants limit acme weight=2 adapters=50 adapter_mib=none""",
)


@app.command(name="list", cls=frame.Command)
def list_all(ctx: typer.Context, json_: Json = False, adapter_dir: Directory = None, url: Url = None) -> None:
    """List every tenant and its limits."""
    found = keys_at(ctx, adapter_dir, url).tenants()
    if json_:
        frame.show(json.dumps(found, indent=2))
    elif not found:
        frame.show("there are no tenants; `loramux keys create --tenant NAME` makes one with its first key")
    else:
        print_table(COLUMNS, [_row(tenant) for tenant in found])


@app.command(cls=frame.Command)
def limit(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="the tenant", show_default=False)],
    limits: Annotated[
        list[str],
        typer.Argument(metavar="LIMIT=N...", help=f"of {', '.join(BOUNDS)}; `none` takes one away", show_default=False),
    ],
    json_: Json = False,
    adapter_dir: Directory = None,
    url: Url = None,
) -> None:
    """Change limits of a tenant; they hold from its next request on."""
    tenant = keys_at(ctx, adapter_dir, url).limit(check_tenant(name), dict(map(_parsed, limits)))
    if json_:
        frame.show(json.dumps(tenant, indent=2))
    else:
        print_table(COLUMNS, [_row(tenant)])


def _parsed(text: str) -> tuple[str, int | None]:
    name, equals, value = text.partition("=")
    number = value.replace("_", "").replace(",", "")
    if not equals or not (value == "none" or number.removeprefix("-").isdecimal()):
        raise ConfigError(f"a limit is written as requests_per_minute=600, or =none; not {text[:80]!r}")
    return name.replace("-", "_"), None if value == "none" else int(number)


def _row(tenant: dict[str, Any]) -> list[str]:
    return [str(tenant.get("id")), *("-" if tenant.get(name) is None else f"{tenant[name]:,}" for name in BOUNDS)]
