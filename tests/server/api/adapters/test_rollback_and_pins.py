"""Rollback and pins over HTTP; what they do is the store's affair."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from loramux_server.api.http.dependencies import Keys
from support.fakes_api import VERSION, Server, make_server, record_of

OLD = hashlib.sha256(b"old").hexdigest()


@pytest.fixture
def server(tmp_path: Path) -> Server:
    server = make_server(tmp_path)
    server.store.known["pirate"] = record_of("pirate", VERSION, older=record_of("pirate", OLD).versions)
    return server


@pytest.mark.anyio
async def test_one_call_without_a_body_goes_back_to_the_version_before(server: Server) -> None:
    async with server.client() as client:
        reply = await client.post("/v1/adapters/pirate/rollback")
        shown = (await client.get("/v1/adapters/pirate")).json()
    assert reply.status_code == 200
    assert (reply.json()["version"], reply.json()["outcome"]) == (OLD, "rolled_back")
    assert shown["version"] == OLD


@pytest.mark.anyio
@pytest.mark.parametrize("where", ["query", "body"])
async def test_a_kept_version_is_gone_to_by_its_digest(server: Server, where: str) -> None:
    async with server.client() as client:
        if where == "query":
            reply = await client.post(f"/v1/adapters/pirate/rollback?version={OLD[:8]}")
        else:
            reply = await client.post("/v1/adapters/pirate/rollback", json={"version": OLD[:8]})
        assert (reply.status_code, reply.json()["version"]) == (200, OLD)
        same = await client.post(f"/v1/adapters/pirate/rollback?version={OLD[:8]}")
    assert same.json()["outcome"] == "unchanged"


@pytest.mark.anyio
async def test_what_cannot_be_gone_back_to_is_named(server: Server) -> None:
    async with server.client() as client:
        unknown = await client.post("/v1/adapters/haiku/rollback")
        no_such = await client.post(f"/v1/adapters/pirate/rollback?version={'0' * 64}")
        await client.post("/v1/adapters/pirate/rollback")
        none_left = await client.post("/v1/adapters/pirate/rollback")
    assert (unknown.status_code, no_such.status_code, none_left.status_code) == (404, 404, 409)
    assert none_left.json()["error"]["code"] == "rollback_impossible"


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"json": {"version": 1}}, None),
        ({"json": {"force": True}}, "unknown_parameter"),
        ({"json": ["x"]}, "invalid_json"),
        ({"content": b"{", "headers": {"content-type": "application/json"}}, "invalid_json"),
        ({"content": b"version=x"}, "invalid_content_type"),
        ({"headers": {"origin": "http://evil.example"}}, "invalid_content_type"),
        ({"headers": {"sec-fetch-site": "cross-site"}}, "invalid_content_type"),
    ],
)
async def test_a_malformed_call_or_one_that_a_web_page_can_make_is_400(
    server: Server, options: dict[str, object], code: str | None
) -> None:
    async with server.client() as client:
        for call in ("rollback", "pin"):
            reply = await client.post(f"/v1/adapters/pirate/{call}", **options)  # type: ignore[arg-type]
            assert reply.status_code == 400, reply.text
            assert reply.json()["error"]["code"] == code or call == "pin"
    assert server.store.known["pirate"].version == VERSION and not server.store.known["pirate"].pinned


@pytest.mark.anyio
async def test_a_pin_is_shown_until_it_is_taken_back(server: Server) -> None:
    async with server.client() as client:
        assert (await client.post("/v1/adapters/pirate/pin")).json()["pinned"] is True
        assert (await client.get("/v1/adapters")).json()["data"][0]["pinned"] is True
        assert (await client.delete("/v1/adapters/pirate/pin")).json()["pinned"] is False
        assert (await client.post("/v1/adapters/haiku/pin")).status_code == 404
        assert (await client.delete("/v1/adapters/haiku/pin")).status_code == 404


@pytest.mark.anyio
async def test_a_pin_for_which_there_is_no_memory_is_409_and_says_what_to_do(server: Server) -> None:
    server.store.pin_bytes = 999
    async with server.client() as client:
        reply = await client.post("/v1/adapters/pirate/pin")
    assert (reply.status_code, reply.json()["error"]["code"]) == (409, "pin_refused")
    assert "--host-cache-mib" in reply.json()["error"]["message"]
    assert not server.store.known["pirate"].pinned


@pytest.mark.anyio
@pytest.mark.parametrize("call", [("POST", "rollback"), ("POST", "pin"), ("DELETE", "pin")])
@pytest.mark.parametrize("name", [".x", "a%00", "a@b", "%2e%2e", "x" * 256, "tiny-base", "a%2F%2Fb", "org%2Fpin"])
async def test_an_illegal_name_is_400(server: Server, call: tuple[str, str], name: str) -> None:
    async with server.client() as client:
        reply = await client.request(call[0], f"/v1/adapters/{name}/{call[1]}")
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_adapter_name")


@pytest.mark.anyio
async def test_they_need_the_admin_key(tmp_path: Path) -> None:
    server = make_server(tmp_path, keys=Keys("api", "admin"))
    async with server.client(headers={"authorization": "Bearer api"}) as client:
        for method, call in (("POST", "rollback"), ("POST", "pin"), ("DELETE", "pin")):
            assert (await client.request(method, f"/v1/adapters/pirate/{call}")).status_code == 403
