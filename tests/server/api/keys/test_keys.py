"""Keys over HTTP: who may make which, and what a server with keys lets in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from loramux_server.access.access_file import AccessFile
from loramux_server.access.caller import Scope
from loramux_server.api.http.dependencies import Keys
from support.fakes_api import Server, make_server
from support.raw_call import RawCall


def file_of(server: Server) -> AccessFile:
    assert server.deps.keys.file is not None
    return server.deps.keys.file


def bearer(key: object) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return make_server(tmp_path)


def key_for(server: Server, *scopes: Scope, tenant: str | None = None) -> dict[str, str]:
    return bearer(file_of(server).create(tenant=tenant, scopes=frozenset(scopes))[0])


async def call(server: Server, method: str, path: str, headers: dict[str, str], body: Any = None) -> httpx.Response:
    async with server.client(headers=headers) as client:
        return await client.request(method, path, json=body)


@pytest.mark.anyio
async def test_with_the_first_key_the_server_closes(server: Server) -> None:
    assert (await call(server, "GET", "/v1/models", {})).status_code == 200
    admin = key_for(server, Scope.ADMIN)
    assert (await call(server, "GET", "/v1/models", {})).status_code == 401
    assert (await call(server, "GET", "/v1/models", admin)).status_code == 200
    assert (await call(server, "GET", "/health", {})).status_code == 200


@pytest.mark.anyio
async def test_a_key_is_made_listed_rotated_and_revoked(server: Server) -> None:
    admin = key_for(server, Scope.ADMIN)
    made = await call(server, "POST", "/v1/keys", admin, {"tenant": "acme", "scopes": ["infer"], "expires_in": 60})
    assert made.status_code == 201 and made.headers["cache-control"] == "no-store"
    key = made.json()
    assert (key["tenant"], key["scopes"], key["state"]) == ("acme", ["infer"], "active")
    assert key["expires"] - key["created"] == 60
    assert (await call(server, "GET", "/v1/models", bearer(key["key"]))).status_code == 200
    listed = (await call(server, "GET", "/v1/keys", admin)).json()["data"]
    assert [one["id"] for one in listed if one["tenant"]] == [key["id"]] and "key" not in listed[0]
    assert [one["id"] for one in (await call(server, "GET", "/v1/tenants", admin)).json()["data"]] == ["acme"]
    rotated = await call(server, "POST", f"/v1/keys/{key['id']}/rotate", admin, {})
    new = rotated.json()["key"]
    assert rotated.status_code == 201 and new != key["key"]
    assert (await call(server, "GET", "/v1/models", bearer(key["key"]))).status_code == 401
    assert (await call(server, "GET", "/v1/models", bearer(new))).status_code == 200
    revoked = await call(server, "DELETE", f"/v1/keys/{rotated.json()['id']}", admin)
    assert (revoked.status_code, revoked.json()["state"]) == (200, "revoked")
    assert (await call(server, "GET", "/v1/models", bearer(new))).status_code == 401


@pytest.mark.anyio
async def test_revoked_expired_and_unknown_keys_get_the_same_answer(server: Server) -> None:
    file = file_of(server)
    revoked, _ = file.create(tenant=None, scopes=frozenset({Scope.INFER}))
    file.revoke(revoked.id)
    expired, _ = file.create(tenant=None, scopes=frozenset({Scope.INFER}), expires=1)
    unknown = f"lmx_{'0' * 10}_{'A' * 43}"
    answers = {
        (reply.status_code, reply.content, reply.headers["www-authenticate"])
        for given in (revoked, expired, unknown, "nonsense")
        for reply in [await call(server, "GET", "/v1/models", bearer(given))]
    }
    assert len(answers) == 1 and next(iter(answers))[0] == 401


EXPECTED = {
    Scope.INFER: {"look", "infer"},
    Scope.UPLOAD: {"look", "publish", "manage"},
    Scope.TRAIN: {"look", "publish"},
    Scope.METRICS: {"metrics"},
    Scope.ADMIN: {"look", "infer", "publish", "manage", "metrics", "admin", "operator"},
}
CALLS = {
    "look": ("GET", "/v1/models"),
    "infer": ("POST", "/v1/completions"),
    "publish": ("PUT", "/v1/adapters/new"),
    "manage": ("DELETE", "/v1/adapters/none"),
    "metrics": ("GET", "/metrics"),
    "admin": ("GET", "/v1/keys"),
    "operator": ("POST", "/v1/adapters/pirate/pin"),
}


@pytest.mark.anyio
@pytest.mark.parametrize("tenant", [None, "acme"])
@pytest.mark.parametrize("scope", list(Scope))
async def test_each_scope_opens_what_it_should(server: Server, scope: Scope, tenant: str | None) -> None:
    key = key_for(server, scope, tenant=tenant)
    opened = set()
    for name, (method, path) in CALLS.items():
        if (await call(server, method, path, key)).status_code not in (401, 403):
            opened.add(name)
    assert opened == EXPECTED[scope] - (set() if tenant is None else {"metrics", "operator"})


@pytest.mark.anyio
async def test_a_tenants_admin_makes_and_sees_keys_of_that_tenant_alone(server: Server) -> None:
    other, _ = file_of(server).create(tenant="other", scopes=frozenset({Scope.INFER}))
    admin = key_for(server, Scope.ADMIN, tenant="acme")
    made = (await call(server, "POST", "/v1/keys", admin, {"scopes": ["upload"]})).json()
    assert made["tenant"] == "acme"
    listed = (await call(server, "GET", "/v1/keys", admin)).json()["data"]
    assert {one["tenant"] for one in listed} == {"acme"}
    refused = await call(server, "POST", "/v1/keys", admin, {"scopes": ["infer"], "tenant": "other"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tenant")
    for method, path in (("DELETE", f"/v1/keys/{other.id}"), ("POST", f"/v1/keys/{other.id}/rotate")):
        assert (await call(server, method, path, admin, {})).status_code == 404
    assert (await call(server, "GET", "/v1/tenants", admin)).status_code == 403


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "scopes"),
        ({"scopes": []}, "scopes"),
        ({"scopes": ["everything"]}, "scopes.0"),
        ({"scopes": "infer"}, "scopes"),
        ({"scopes": ["infer"], "tenant": "Acme"}, "tenant"),
        ({"scopes": ["metrics"], "tenant": "acme"}, "scopes"),
        ({"scopes": ["infer"], "expires_in": 0}, "expires_in"),
        ({"scopes": ["infer"], "expires_in": 10**12}, "expires_in"),
        ({"scopes": ["infer"], "note": "a\nb"}, "note"),
        ({"scopes": ["infer"], "hash": "x"}, "hash"),
    ],
)
async def test_what_makes_no_key(server: Server, body: dict[str, Any], param: str) -> None:
    admin = key_for(server, Scope.ADMIN)
    reply = await call(server, "POST", "/v1/keys", admin, body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
    assert len(file_of(server).records()) == 1


@pytest.mark.anyio
async def test_keys_of_the_operators_environment_go_on_beside(tmp_path: Path) -> None:
    server = make_server(tmp_path, keys=Keys("api", "admin"))
    tenant = key_for(server, Scope.INFER, tenant="acme")
    for key, expected in ((bearer("api"), 403), (bearer("admin"), 200), (tenant, 403)):
        assert (await call(server, "GET", "/v1/keys", key)).status_code == expected
        assert (await call(server, "GET", "/v1/models", key)).status_code == 200


@pytest.mark.anyio
async def test_keys_that_cannot_be_checked_let_nobody_in(server: Server, tmp_path: Path) -> None:
    key = key_for(server, Scope.ADMIN)
    file_of(server).close()
    (tmp_path / "keys" / "access.secret").unlink()
    reply = await call(server, "GET", "/v1/models", key)
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "keys_unavailable")
    assert "retry-after" in reply.headers and "access" not in reply.json()["error"]["message"]


@pytest.mark.anyio
async def test_limits_of_a_tenant_hold_from_its_next_request_on(server: Server) -> None:
    admin, key = key_for(server, Scope.ADMIN), key_for(server, Scope.INFER, tenant="acme")
    body = {"model": "pirate", "prompt": "abc", "max_tokens": 4}
    reply = await call(server, "POST", "/v1/completions", key, body)
    assert reply.status_code == 200 and not any("ratelimit" in name for name in reply.headers)
    limited = await call(server, "PUT", "/v1/tenants/acme", admin, {"requests_per_minute": 1, "weight": 3})
    assert (limited.json()["requests_per_minute"], limited.json()["weight"]) == (1, 3)
    reply = await call(server, "POST", "/v1/completions", key, body)
    assert reply.headers["x-ratelimit-remaining-requests"] == "0"
    assert server.engine.sequences[-1].weight == 3
    reply = await call(server, "POST", "/v1/completions", key, body)
    error = reply.json()["error"]
    assert (reply.status_code, error["type"], error["code"]) == (429, "requests", "rate_limit_exceeded")
    assert 1 <= int(reply.headers["retry-after"]) <= 60
    assert (await call(server, "GET", "/v1/models", key)).status_code == 200
    await call(server, "PUT", "/v1/tenants/acme", admin, {"requests_per_minute": None})
    assert (await call(server, "POST", "/v1/completions", key, body)).status_code == 200
    for wrong in ({"weight": 0}, {"speed": 1}, {"adapters": "3"}):
        assert (await call(server, "PUT", "/v1/tenants/acme", admin, wrong)).status_code == 400
    assert (await call(server, "PUT", "/v1/tenants/Acme", admin, {})).status_code == 400
    assert (await call(server, "PUT", "/v1/tenants/acme", key, {"weight": 9})).status_code == 403


@pytest.mark.anyio
@pytest.mark.parametrize("stream", [False, True])
async def test_tokens_of_prompts_and_replies_count_also_without_usage(server: Server, stream: bool) -> None:
    file_of(server).limit("acme", {"tokens_per_minute": 100})
    key = key_for(server, Scope.INFER, tenant="acme")
    body = {"model": "pirate", "prompt": "abc", "max_tokens": 50, "stream": stream}
    for path, asked, tokens in (
        ("/v1/completions", body, 3 + 10),
        ("/v1/embeddings", {"model": "pirate", "input": ["abcd", "efgh"]}, 8),
        ("/v1/completions", body | {"n": 2}, 3 + 20),
    ):
        before = await left(server)
        assert (await call(server, "POST", path, key, asked)).status_code == 200
        assert before - await left(server) == tokens, path
    refused = await call(server, "POST", "/v1/completions", key, body | {"prompt": "x" * 60})
    assert (refused.status_code, refused.json()["error"]["type"]) == (429, "tokens")
    assert await left(server) == 100 - 13 - 8 - 23 and server.engine.running == set()


async def left(server: Server) -> int:
    """Tokens that the tenant has in this minute."""
    limits = file_of(server).limit("acme", {}).limits
    return (await server.deps.rates.remaining("acme", limits))["tokens"].left


@pytest.mark.anyio
async def test_a_stream_holds_its_place_until_it_ends_or_its_client_leaves(server: Server) -> None:
    file_of(server).limit("acme", {"requests_at_once": 1, "tokens_per_minute": 100})
    key = key_for(server, Scope.INFER, tenant="acme")
    server.engine.hold_after = 5
    body = {"model": "pirate", "prompt": "abc", "max_tokens": 50}
    raw = RawCall(
        server.app,
        "POST",
        "/v1/completions",
        body=json.dumps(body | {"stream": True}).encode(),
        headers=[(b"authorization", key["authorization"].encode()), (b"content-type", b"application/json")],
    )
    await server.engine.holding.wait()
    refused = await call(server, "POST", "/v1/completions", key, body)
    assert refused.status_code == 429 and "retry-after" not in refused.headers
    await raw.disconnect()
    assert await left(server) == 100 - 3 - 5, "what the client never read counts"
    server.engine.hold_after = None
    assert (await call(server, "POST", "/v1/completions", key, body)).status_code == 200
