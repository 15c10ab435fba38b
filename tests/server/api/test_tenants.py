"""What a tenant sees of adapters: its own and the shared ones; another's are as those that nobody has."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import httpx
import pytest

from loramux_server.access.caller import Scope
from support.fakes_api import BASE_NAME, Server, make_server, record_of

OWN, THEIRS, SHARED = (hashlib.sha256(name).hexdigest() for name in (b"own", b"theirs", b"shared"))


@pytest.fixture
def server(tmp_path: Path) -> Server:
    server = make_server(tmp_path)
    names = ("acme~spam", "other~spam", "spam", "acme~spam+pirate")
    server.engine.replies |= {name: b"hello" for name in names}
    server.store.known |= {
        "acme~spam": record_of("acme~spam", OWN),
        "other~spam": record_of("other~spam", THEIRS),
        "other~secret": record_of("other~secret", THEIRS),
        "spam": record_of("spam", SHARED),
    }
    return server


async def call(server: Server, tenant: str | None, method: str, path: str, **options: Any) -> httpx.Response:
    file = server.deps.keys.file
    assert file is not None
    key, _ = file.create(tenant=tenant, scopes=frozenset({Scope.ADMIN}))
    async with server.client(headers={"authorization": f"Bearer {key}"}) as client:
        return await client.request(method, path, **options)


async def version_of(server: Server, tenant: str | None, model: str) -> str:
    reply = await call(server, tenant, "POST", "/v1/completions", json={"model": model, "prompt": "x"})
    assert reply.status_code == 200, reply.text
    return reply.headers["x-loramux-adapter-version"]


@pytest.mark.anyio
async def test_a_name_means_the_tenants_own_adapter_before_a_shared_one(server: Server) -> None:
    for model in ("spam", f"{BASE_NAME}:spam", f"spam@{OWN[:12]}"):
        assert await version_of(server, "acme", model) == OWN
    assert await version_of(server, "other", "spam") == THEIRS
    assert await version_of(server, "third", "spam") == SHARED
    assert await version_of(server, None, "spam") == SHARED
    assert await version_of(server, None, "acme~spam") == OWN
    assert await version_of(server, "acme", "pirate") == server.store.known["pirate"].version


@pytest.mark.anyio
async def test_lists_show_own_and_shared_names_as_the_tenant_writes_them(server: Server) -> None:
    models = (await call(server, "acme", "GET", "/v1/models")).json()["data"]
    assert {model["id"]: model["root"] for model in models[1:]} == {
        "pirate": server.store.known["pirate"].version,
        "spam": OWN,
    }
    adapters = (await call(server, "acme", "GET", "/v1/adapters")).json()["data"]
    assert [(one["name"], one["version"]) for one in adapters][1] == ("spam", OWN)
    everything = (await call(server, None, "GET", "/v1/adapters")).json()["data"]
    assert {one["name"] for one in everything} == set(server.store.known)


ASKED = [
    ("GET", "/v1/models/{}", None),
    ("GET", "/v1/models/" + BASE_NAME + ":{}", None),
    ("GET", "/v1/models/{}@" + THEIRS[:12], None),
    ("GET", "/v1/adapters/{}", None),
    ("GET", "/v1/adapters/{}/archive", None),
    ("DELETE", "/v1/adapters/{}", None),
    ("POST", "/v1/adapters/{}/rollback", {}),
    ("POST", "/v1/completions", {"model": "{}", "prompt": "x"}),
    ("POST", "/v1/completions", {"model": BASE_NAME + ":{}", "prompt": "x"}),
    ("POST", "/v1/completions", {"model": "{}@" + THEIRS[:12], "prompt": "x"}),
    ("POST", "/v1/completions", {"model": BASE_NAME, "adapters": [{"name": "{}"}], "prompt": "x"}),
    (
        "POST",
        "/v1/completions",
        {"model": BASE_NAME, "adapters": [{"name": "pirate"}, {"name": "{}"}], "prompt": "x"},
    ),
    ("POST", "/v1/chat/completions", {"model": "{}", "messages": [{"role": "user", "content": "x"}]}),
    ("POST", "/v1/responses", {"model": "{}", "input": "x"}),
    ("POST", "/v1/embeddings", {"model": "{}", "input": "x"}),
    ("POST", "/tokenize", {"model": "{}", "prompt": "x"}),
    ("POST", "/detokenize", {"model": "{}", "tokens": [1]}),
]


def filled(value: Any, name: str) -> Any:
    """The value with every {} in it replaced."""
    if isinstance(value, str):
        return value.replace("{}", name)
    if isinstance(value, list):
        return [filled(one, name) for one in value]
    return {key: filled(one, name) for key, one in value.items()} if isinstance(value, dict) else value


@pytest.mark.anyio
@pytest.mark.parametrize(("method", "path", "body"), ASKED)
@pytest.mark.parametrize(("theirs", "nobodys"), [("secret", "absent"), ("other~secret", "other~absent")])
async def test_anothers_adapter_is_answered_like_one_that_nobody_has(
    server: Server, method: str, path: str, body: Any, theirs: str, nobodys: str
) -> None:
    replies = [
        await call(server, "acme", method, filled(path, name), json=filled(body, name)) for name in (theirs, nobodys)
    ]
    assert {reply.status_code for reply in replies} == {404}
    first, second = (reply.text.replace(name, "NAME") for reply, name in zip(replies, (theirs, nobodys), strict=True))
    assert first == second
    assert set(replies[0].headers) == set(replies[1].headers)
    assert "other~secret" in server.store.known and server.store.leased == 0


@pytest.mark.anyio
async def test_what_a_tenant_uploads_is_its_own(server: Server) -> None:
    files = {"config": b"{}", "weights": b"w"}
    reply = await call(server, "acme", "PUT", "/v1/adapters/spam", files=files)
    assert (reply.status_code, reply.json()["name"]) == (200, "spam")
    reply = await call(server, "acme", "PUT", "/v1/adapters/secret", files=files)
    assert (reply.status_code, reply.json()["name"]) == (201, "secret")
    known = server.store.known
    assert known["acme~secret"].version != THEIRS and known["other~secret"].version == THEIRS
    assert known["spam"].version == SHARED and known["other~spam"].version == THEIRS
    for name in ("other~spam", "acme~spam"):
        refused = await call(server, "acme", "PUT", f"/v1/adapters/{name}", files=files)
        assert refused.status_code == 404


@pytest.mark.anyio
async def test_a_shared_adapter_is_changed_by_the_operator_alone(server: Server) -> None:
    for method, path in (("DELETE", "/v1/adapters/pirate"), ("POST", "/v1/adapters/pirate/rollback")):
        reply = await call(server, "acme", method, path)
        assert (reply.status_code, reply.json()["error"]["code"]) == (403, "not_allowed")
    assert (await call(server, "acme", "DELETE", "/v1/adapters/spam")).status_code == 200
    assert "spam" in server.store.known and "acme~spam" not in server.store.known
    assert (await call(server, None, "DELETE", "/v1/adapters/other~spam")).status_code == 200


@pytest.mark.anyio
async def test_keys_and_values_are_shared_within_a_tenant_and_salt_alone(server: Server) -> None:
    groups = {}
    for tenant in (None, "acme", "other"):
        for salt in (None, "s"):
            body = {"model": "pirate", "prompt": "x"} | ({} if salt is None else {"cache_salt": salt})
            await call(server, tenant, "POST", "/v1/completions", json=body)
            sequence = server.engine.sequences[-1]
            groups[tenant, salt] = sequence.cache_group
            assert sequence.tenant == tenant and sequence.flow[0] == (tenant or "")
    assert len(set(groups.values())) == 6
    await call(server, "acme", "POST", "/v1/completions", json={"model": BASE_NAME, "prompt": "x"})
    assert server.engine.sequences[-1].cache_group == groups["acme", None], "the bare base too"
    await call(server, "acme", "POST", "/v1/embeddings", json={"model": BASE_NAME, "input": "x"})
    assert server.engine.sequences[-1].cache_group == groups["acme", None]


@pytest.mark.anyio
async def test_versions_of_several_adapters_are_told_under_the_tenants_names(server: Server) -> None:
    body = {"model": BASE_NAME, "adapters": [{"name": "spam"}, {"name": "pirate"}], "prompt": "x"}
    reply = await call(server, "acme", "POST", "/v1/completions", json=body)
    assert reply.headers["x-loramux-adapter-version"].startswith(f"spam@{OWN},pirate@")


@pytest.mark.anyio
async def test_a_tenant_keeps_no_more_adapters_than_it_may(server: Server) -> None:
    file = server.deps.keys.file
    assert file is not None
    files = {"config": b"{}", "weights": b"w"}
    file.limit("acme", {"adapters": 2})
    assert (await call(server, "acme", "PUT", "/v1/adapters/second", files=files)).status_code == 201
    refused = await call(server, "acme", "PUT", "/v1/adapters/third", files=files)
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "quota_exceeded")
    assert "may have 2 adapters and has 2 besides this one; delete one first" in refused.json()["error"]["message"]
    assert (await call(server, "acme", "PUT", "/v1/adapters/second", files=files)).status_code == 200
    assert (await call(server, "other", "PUT", "/v1/adapters/third", files=files)).status_code == 201
    assert (await call(server, "acme", "DELETE", "/v1/adapters/spam")).status_code == 200
    assert (await call(server, "acme", "PUT", "/v1/adapters/third", files=files)).status_code == 201
    file.limit("acme", {"adapters": None, "adapter_mib": 0})
    refused = await call(server, "acme", "PUT", "/v1/adapters/third", files=files)
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "quota_exceeded")
