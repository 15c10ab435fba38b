"""Every change over HTTP is in the audit log, under the one who made it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from loramux_adapters.store.store import AdapterStore
from loramux_server.access.caller import Scope
from support.fakes_api import Server, make_server


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return make_server(tmp_path)


async def call(server: Server, key: object, method: str, path: str, **options: Any) -> httpx.Response:
    async with server.client(headers={"authorization": f"Bearer {key}"}) as client:
        return await client.request(method, path, **options)


def key_of(server: Server, tenant: str | None) -> str:
    assert server.deps.keys.file is not None
    return str(server.deps.keys.file.create(tenant=tenant, scopes=frozenset({Scope.ADMIN}))[0])


@pytest.mark.anyio
async def test_changes_of_keys_and_limits_are_logged_without_any_secret(server: Server) -> None:
    operator = key_of(server, None)
    made = (await call(server, operator, "POST", "/v1/keys", json={"scopes": ["infer"], "tenant": "acme"})).json()
    rotated = (await call(server, operator, "POST", f"/v1/keys/{made['id']}/rotate", json={})).json()
    await call(server, operator, "DELETE", f"/v1/keys/{rotated['id']}")
    await call(server, operator, "PUT", "/v1/tenants/acme", json={"weight": 2})
    reply = await call(server, operator, "GET", "/v1/audit")
    entries = reply.json()["data"]
    assert [(one["action"], one["subject"], one["detail"]) for one in reversed(entries)] == [
        ("key created", made["id"], "of the tenant acme, with infer"),
        ("key rotated", rotated["id"], f"in place of {made['id']}; of the tenant acme, with infer"),
        ("key revoked", rotated["id"], "of the tenant acme, with infer"),
        ("limited", "acme", '{"weight": 2}'),
    ]
    assert all(one["who"] == f"key {operator.split('_')[1]}" and one["address"] == "127.0.0.1" for one in entries)
    assert all(one["request"].startswith("req-") for one in entries)
    for secret in (operator, made["key"], rotated["key"]):
        assert secret.rpartition("_")[2] not in reply.text


@pytest.mark.anyio
async def test_a_tenants_admin_sees_what_that_tenant_changed(server: Server) -> None:
    operator, acme, other = (key_of(server, tenant) for tenant in (None, "acme", "other"))
    for key in (operator, acme, other):
        await call(server, key, "POST", "/v1/keys", json={"scopes": ["infer"]})
    seen = (await call(server, acme, "GET", "/v1/audit")).json()["data"]
    assert [one["tenant"] for one in seen] == ["acme"]
    assert (await call(server, acme, "GET", "/v1/audit?tenant=other")).status_code == 400
    everything = (await call(server, operator, "GET", "/v1/audit")).json()["data"]
    assert [one["tenant"] for one in everything] == ["other", "acme", None]
    assert len((await call(server, operator, "GET", "/v1/audit?limit=1&tenant=acme")).json()["data"]) == 1
    for wrong in ("limit=0", "limit=100000", "since=x", "who=me"):
        assert (await call(server, operator, "GET", f"/v1/audit?{wrong}")).status_code == 400
    listed = await call(server, operator, "GET", "/v1/audit?since=99999999999")
    assert listed.json()["data"] == []


def test_every_change_of_the_store_is_told_once_it_is_made(tmp_path: Path) -> None:
    """`AdapterStore` tells of changes at one place for each, whoever makes them."""
    told = []
    store = AdapterStore(tmp_path)
    store.tell_changed(told.append)
    for act in (lambda: store.delete("none"), lambda: store.pin("none"), lambda: store.rollback("none")):
        with pytest.raises(Exception, match="no adapter"):
            act()
    assert told == []
    store.close()
