"""`loramux keys create|list|revoke|rotate`: who may call, in a store's directory or through a running server."""

from __future__ import annotations

import json
import time
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer

from loramux_server.access.access_file import AccessFile
from loramux_server.access.actor import acting, at_the_shell
from loramux_server.access.audit_file import AuditFile, EntryFilter, of_key
from loramux_server.access.caller import Scope, check_tenant, scopes_of
from loramux_server.access.spans import seconds_of
from loramux_server.cli import frame
from loramux_server.cli.adapters import URL_VARIABLE
from loramux_server.cli.options import store_directory, store_option
from loramux_server.cli.screen import print_table
from loramux_server.config.environment import key_of
from loramux_server.errors import CommandFailed, ConfigError

COLUMNS = ("id", "tenant", "scopes", "state", "created", "until", "note")
Directory = Annotated[Path | None, store_option("the store whose keys these are")]
Url = Annotated[
    str | None,
    typer.Option("--url", metavar="URL", help="a running server instead; its keys are managed with an admin's key"),
]
KeyId = Annotated[str, typer.Argument(metavar="ID", help="the key's id, as `list` shows it", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]

app = frame.new_app(
    "Make, list, revoke and rotate the keys that requests carry.",
    epilog=f"""\
Scopes: infer (generate, embed), upload (publish, roll back, delete and download adapters), train (publish and
download), metrics (scrape; no tenant's key has it), admin (all of these, and keys).

Once a key was made, a server on that store answers nobody without one. The keys LORAMUX_API_KEY and LORAMUX_ADMIN_KEY
of the server go on working.

Examples:

    loramux keys create --scopes admin
    loramux keys create --tenant acme --scopes infer,upload --expires 90d --note "the web shop"
    loramux keys revoke 3f9c0a2b51

It works on the store's directory; with --url, or where {URL_VARIABLE} is set, through a server.""",
)


class AccessManager(Protocol):
    """Where keys are managed: records are as the API tells them."""

    def create(self, body: dict[str, Any]) -> dict[str, Any]: ...
    def keys(self) -> list[dict[str, Any]]: ...
    def revoke(self, key_id: str) -> dict[str, Any]: ...
    def rotate(self, key_id: str, overlap: int) -> dict[str, Any]: ...
    def tenants(self) -> list[dict[str, Any]]: ...
    def limit(self, tenant: str, values: dict[str, Any]) -> dict[str, Any]: ...
    def audit(self, wanted: EntryFilter) -> list[dict[str, Any]]: ...


@app.command(cls=frame.Command)
def create(
    ctx: typer.Context,
    scopes: Annotated[
        str, typer.Option("--scopes", metavar="LIST", help="what it may do, with commas between", show_default=False)
    ],
    tenant: Annotated[
        str | None,
        typer.Option(
            "--tenant", metavar="TEXT", help="whose it is; new names are new tenants (default: the operator's)"
        ),
    ] = None,
    expires: Annotated[
        str | None, typer.Option("--expires", metavar="SPAN", help="when it ends, such as 12h or 90d (default: never)")
    ] = None,
    note: Annotated[str, typer.Option("--note", metavar="TEXT", help="what it is for, shown in lists")] = "",
    json_: Json = False,
    adapter_dir: Directory = None,
    url: Url = None,
) -> None:
    """Make a key and print it, this one time."""
    asked = sorted(scopes_of(word.strip() for word in scopes.split(",") if word.strip()))
    if tenant is not None and Scope.METRICS in asked:
        raise ConfigError("no tenant's key can have the scope metrics: measurements are of all tenants")
    body: dict[str, Any] = {"scopes": asked, "note": note}
    if tenant is not None:
        body["tenant"] = check_tenant(tenant)
    if expires is not None:
        body["expires_in"] = seconds_of(expires, "--expires")
    _show_new(keys_at(ctx, adapter_dir, url).create(body), json_)


@app.command(name="list", cls=frame.Command)
def list_all(ctx: typer.Context, json_: Json = False, adapter_dir: Directory = None, url: Url = None) -> None:
    """List every key, without what opens anything."""
    found = keys_at(ctx, adapter_dir, url).keys()
    if json_:
        frame.show(json.dumps(found, indent=2))
    elif not found:
        frame.show("there are no keys; `loramux keys create --help` says how one is made")
    else:
        print_table(COLUMNS, [_row(key) for key in found])


@app.command(cls=frame.Command)
def revoke(ctx: typer.Context, key_id: KeyId, adapter_dir: Directory = None, url: Url = None) -> None:
    """Refuse a key from the next request on."""
    keys_at(ctx, adapter_dir, url).revoke(key_id)
    frame.show(f"{key_id} revoked")


@app.command(cls=frame.Command)
def rotate(
    ctx: typer.Context,
    key_id: KeyId,
    overlap: Annotated[
        str, typer.Option("--overlap", metavar="SPAN", help="how long the old one is still taken, such as 1h")
    ] = "0s",
    json_: Json = False,
    adapter_dir: Directory = None,
    url: Url = None,
) -> None:
    """Make a new key with the rights of another, which ends."""
    _show_new(keys_at(ctx, adapter_dir, url).rotate(key_id, seconds_of(overlap, "--overlap")), json_)


class _Local:
    """Keys of a store's directory."""

    def __init__(self, directory: Path) -> None:
        self._file, self._audit = AccessFile(directory), AuditFile(directory)

    def create(self, body: dict[str, Any]) -> dict[str, Any]:
        seconds = body.get("expires_in")
        key, record = self._file.create(
            tenant=body.get("tenant"),
            scopes=frozenset(body["scopes"]),
            note=body["note"],
            expires=None if seconds is None else int(time.time()) + seconds,
        )
        self._wrote("key created", record.id, of_key(record))
        return record.told(time.time()) | {"key": str(key)}

    def keys(self) -> list[dict[str, Any]]:
        return [record.told(time.time()) for record in self._file.records()]

    def revoke(self, key_id: str) -> dict[str, Any]:
        record = self._file.revoke(key_id)
        self._wrote("key revoked", key_id, of_key(record))
        return record.told(time.time())

    def rotate(self, key_id: str, overlap: int) -> dict[str, Any]:
        key, record = self._file.rotate(key_id, overlap=overlap)
        self._wrote("key rotated", record.id, f"in place of {key_id}; {of_key(record)}")
        return record.told(time.time()) | {"key": str(key)}

    def tenants(self) -> list[dict[str, Any]]:
        return [tenant.told() for tenant in self._file.tenants()]

    def limit(self, tenant: str, values: dict[str, Any]) -> dict[str, Any]:
        limited = self._file.limit(tenant, values)
        self._wrote("limited", tenant, json.dumps(values))
        return limited.told()

    def audit(self, wanted: EntryFilter) -> list[dict[str, Any]]:
        return [entry.told() for entry in self._audit.entries(wanted)]

    def _wrote(self, action: str, subject: str, detail: str = "") -> None:
        with acting(at_the_shell()):
            self._audit.append(action, subject, detail=detail)


class _Remote:
    """Keys of a running server."""

    def __init__(self, url: str, key: str | None) -> None:
        from loramux_server.client.connection import ServerConnection  # and with it httpx, which takes 0.1 s

        self._connection = ServerConnection(url, key)

    def create(self, body: dict[str, Any]) -> dict[str, Any]:
        return self._connection.call("POST", ("v1", "keys"), body=body).body

    def keys(self) -> list[dict[str, Any]]:
        return self._listed("keys")

    def revoke(self, key_id: str) -> dict[str, Any]:
        return self._connection.call("DELETE", ("v1", "keys", key_id)).body

    def rotate(self, key_id: str, overlap: int) -> dict[str, Any]:
        return self._connection.call("POST", ("v1", "keys", key_id, "rotate"), body={"overlap": overlap}).body

    def tenants(self) -> list[dict[str, Any]]:
        return self._listed("tenants")

    def limit(self, tenant: str, values: dict[str, Any]) -> dict[str, Any]:
        return self._connection.call("PUT", ("v1", "tenants", tenant), body=values).body

    def audit(self, wanted: EntryFilter) -> list[dict[str, Any]]:
        return self._listed("audit", wanted.as_query())

    def _listed(self, what: str, params: dict[str, str] | None = None) -> list[dict[str, Any]]:
        found = self._connection.call("GET", ("v1", what), params=params).body.get("data")
        if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
            raise CommandFailed(f"the server did not answer with a list of {what}; is it a loramux server?")
        return found


def keys_at(ctx: typer.Context, directory: Path | None, url: str | None) -> AccessManager:
    """Where a command's options, or the environment, say that keys are."""
    if directory is not None and url is not None:
        raise ConfigError("give --adapter-dir or --url, not both")
    url = url or (None if directory is not None else ctx.obj.get(URL_VARIABLE))
    if url:
        return _Remote(url, key_of(ctx.obj))
    return _Local(store_directory(ctx, directory))


def _show_new(key: dict[str, Any], as_json: bool) -> None:
    if as_json:
        frame.show(json.dumps(key, indent=2))
        return
    of = "the operator" if key.get("tenant") is None else f"the tenant {key['tenant']}"
    frame.show(f"key {key.get('id')} of {of}, with {', '.join(key.get('scopes', ()))}; it is not shown again:")
    frame.show_command(str(key.get("key")))


def _row(key: dict[str, Any]) -> list[str]:
    ends = [each for each in (key.get("expires"), key.get("revoked")) if each is not None]
    return [
        str(key.get("id")),
        str(key.get("tenant") or "-"),
        ",".join(key.get("scopes", ())),
        str(key.get("state")),
        _day(key.get("created")),
        _day(min(ends)) if ends else "-",
        str(key.get("note") or ""),
    ]


def _day(seconds: object) -> str:
    return datetime.fromtimestamp(float(str(seconds))).strftime("%Y-%m-%d %H:%M")
