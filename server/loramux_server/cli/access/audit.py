"""`loramux audit`: who changed what, in a store's directory or through a running server."""

from __future__ import annotations

import json
import time
from datetime import datetime
from typing import Annotated, Any

import typer

from loramux_server.access.audit_file import MOST_ENTRIES, EntryFilter
from loramux_server.access.caller import check_tenant
from loramux_server.access.spans import seconds_of
from loramux_server.cli import frame
from loramux_server.cli.access.keys import Directory, Json, Url, keys_at
from loramux_server.cli.screen import print_table
from loramux_server.errors import ConfigError

COLUMNS = ("when", "who", "tenant", "from", "what", "of", "version", "more")
_SHORT = 12

app = frame.new_app()


@app.command(
    cls=frame.Command,
    epilog="""\
Entries are added, and never changed or removed. They name adapters, versions and keys' ids; no prompt and no key is in
them.

Examples:

    loramux audit
    loramux audit --adapter spam --since 7d
    loramux audit --tenant acme --json""",
)
def show(
    ctx: typer.Context,
    tenant: Annotated[str | None, typer.Option("--tenant", metavar="TEXT", help="changes by this tenant alone")] = None,
    adapter: Annotated[
        str | None, typer.Option("--adapter", metavar="NAME", help="changes of this adapter, key or tenant alone")
    ] = None,
    since: Annotated[
        str | None, typer.Option("--since", metavar="SPAN", help="not older than this, such as 7d")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", metavar="N", help="at most so many, the newest")] = 50,
    json_: Json = False,
    adapter_dir: Directory = None,
    url: Url = None,
) -> None:
    """Say who changed what, newest first."""
    if not 1 <= limit <= MOST_ENTRIES:
        raise ConfigError(f"--limit must be from 1 to {MOST_ENTRIES}, not {limit}")
    wanted = EntryFilter(
        tenant=None if tenant is None else check_tenant(tenant),
        subject=adapter,
        since=None if since is None else time.time() - seconds_of(since, "--since"),
        limit=limit,
    )
    found = keys_at(ctx, adapter_dir, url).audit(wanted)
    if json_:
        frame.show(json.dumps(found, indent=2))
    elif not found:
        frame.show("nothing is logged")
    else:
        print_table(COLUMNS, [_row(entry) for entry in found])


def _row(entry: dict[str, Any]) -> list[str]:
    when = datetime.fromtimestamp(float(entry.get("at") or 0)).isoformat(" ", "seconds")
    version = str(entry.get("version") or "-")[:_SHORT]
    told = [str(entry.get(name) or "-") for name in ("who", "tenant", "address", "action", "subject")]
    return [when, *told, version, str(entry.get("detail") or "")]
