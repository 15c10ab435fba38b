"""Targets as clients spell them, HEAD, pages of other origins, and a server whose connections are all taken."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loramux_server.api.app import create_app
from loramux_server.api.http.dependencies import Keys
from loramux_server.wire.connections import RESERVE, Connections, Cut
from support.fakes_api import Server, make_server
from support.raw_call import RawCall

PAGE = "https://chat.example"
CHAT: dict[str, Any] = {"model": "pirate", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return make_server(tmp_path)


def rebuilt(server: Server, **changes: Any) -> Server:
    server.deps = replace(server.deps, **changes)
    server.app = create_app(server.deps)
    return server


# HEAD


@pytest.mark.anyio
@pytest.mark.parametrize(
    "path", ["/health", "/ready", "/v1/models", "/v1/models/pirate", "/v1/adapters", "/v1/adapters/pirate", "/metrics"]
)
async def test_head_is_a_get_without_a_body(server: Server, path: str) -> None:
    async with server.client() as client:
        got, head = await client.get(path), await client.head(path)
    assert (head.status_code, head.content) == (got.status_code, b"") == (200, b"")
    assert head.headers["content-type"] == got.headers["content-type"]
    if path != "/metrics":  # which says how many bytes it has sent
        assert head.headers["content-length"] == got.headers["content-length"]


@pytest.mark.anyio
async def test_head_of_an_archive_packs_nothing_and_gives_the_lease_back(server: Server, tmp_path: Path) -> None:
    directory = server.store.directory(server.store.known["pirate"].version)
    directory.mkdir()
    (directory / "adapter_model.safetensors").write_bytes(bytes(2**20))
    async with server.client() as client:
        head = await client.head("/v1/adapters/pirate/archive")
    assert (head.status_code, head.headers["content-type"], head.content) == (200, "application/gzip", b"")
    assert server.store.leased == 0


@pytest.mark.anyio
async def test_head_of_what_is_not_there_is_404(server: Server) -> None:
    async with server.client() as client:
        assert (await client.head("/v1/adapters/nobody")).status_code == 404


# targets


@pytest.mark.anyio
async def test_a_slash_at_the_end_means_nothing_and_no_body_is_lost(server: Server) -> None:
    async with server.client() as client:
        assert (await client.get("/v1/models/")).json() == (await client.get("/v1/models")).json()
        assert (await client.get("/health/")).status_code == 200
        reply = await client.post("/v1/chat/completions/", json=CHAT)
    assert (reply.status_code, reply.json()["usage"]["completion_tokens"]) == (200, 4)


async def status_of(server: Server, target: bytes, host: bytes = b"localhost") -> int:
    call = RawCall(server.app, "GET", target.decode(), host=host)
    await call.task
    status: int = call.sent[0]["status"]
    return status


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("target", "host", "status"),
    [
        (b"http://localhost/v1/models", b"localhost", 200),
        (b"HTTP://localhost:8000/v1/models/", b"localhost", 200),
        (b"http://localhost/v1/models", b"elsewhere", 200),
        (b"http://elsewhere/v1/models", b"localhost", 403),
        (b"http://localhost@elsewhere/v1/models", b"localhost", 404),
        (b"http://localhost", b"localhost", 200),
        (b"http://localhost/health", b"localhost", 200),
        (b"ftp://localhost/health", b"localhost", 404),
        (b"*", b"localhost", 404),
    ],
)
async def test_a_target_in_absolute_form_is_served_and_says_which_host_is_meant(
    server: Server, target: bytes, host: bytes, status: int
) -> None:
    assert await status_of(server, target, host) == status


# CORS


def cors_headers(headers: Any) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.startswith("access-control-")}


@pytest.mark.anyio
async def test_pages_of_other_origins_are_told_nothing_by_default(server: Server) -> None:
    ask = {"origin": PAGE, "access-control-request-method": "POST"}
    async with server.client() as client:
        assert cors_headers((await client.get("/v1/models", headers={"origin": PAGE})).headers) == {}
        preflight = await client.options("/v1/chat/completions", headers=ask)
    assert (preflight.status_code, cors_headers(preflight.headers)) == (405, {})


@pytest.mark.anyio
async def test_a_preflight_of_a_listed_page_needs_no_key(tmp_path: Path) -> None:
    server = rebuilt(make_server(tmp_path, keys=Keys("secret")), cors_origins=[PAGE])
    ask = {
        "origin": PAGE,
        "access-control-request-method": "PUT",
        "access-control-request-headers": "authorization, content-type, x-stainless-os",
        "access-control-request-private-network": "true",
    }
    async with server.client() as client:
        preflight = await client.options("/v1/adapters/pirate", headers=ask)
    told = cors_headers(preflight.headers)
    assert preflight.status_code == 200
    assert told["access-control-allow-origin"] == PAGE
    assert "PUT" in told["access-control-allow-methods"]
    assert "x-stainless-os" in told["access-control-allow-headers"]
    assert told["access-control-allow-private-network"] == "true"
    assert "access-control-allow-credentials" not in told
    assert preflight.headers["x-request-id"]


@pytest.mark.anyio
async def test_replies_streams_errors_and_crashes_can_be_read_by_a_listed_page(tmp_path: Path) -> None:
    server = rebuilt(make_server(tmp_path), cors_origins=[PAGE])
    headers = {"origin": PAGE}
    async with server.client() as client:
        whole = await client.post("/v1/chat/completions", json=CHAT, headers=headers)
        stream = await client.post("/v1/chat/completions", json=CHAT | {"stream": True}, headers=headers)
        error = await client.post("/v1/chat/completions", json={}, headers=headers)
        large = await client.get("/v1/models", headers=headers | {"x-large": "x" * 40_000})
        server.engine.crash_after = 0
        crash = await client.post("/v1/chat/completions", json=CHAT, headers=headers)
    replies = [whole, stream, error, large, crash]
    assert [reply.status_code for reply in replies] == [200, 200, 400, 431, 500]
    for reply in replies:
        assert reply.headers["access-control-allow-origin"] == PAGE
        assert "x-loramux-adapter-version" in reply.headers["access-control-expose-headers"]
        assert "Origin" in reply.headers["vary"]
        assert reply.headers["x-request-id"]


@pytest.mark.anyio
async def test_a_page_that_is_not_listed_is_refused_with_the_setting(tmp_path: Path) -> None:
    server = rebuilt(make_server(tmp_path), cors_origins=[PAGE])
    ask = {"origin": "https://other.example", "access-control-request-method": "POST"}
    async with server.client() as client:
        preflight = await client.options("/v1/chat/completions", headers=ask)
        reply = await client.get("/v1/models", headers={"origin": "https://other.example"})
    assert preflight.status_code == 400
    assert "--cors-origins" in preflight.json()["error"]["message"]
    assert "access-control-allow-origin" not in preflight.headers
    assert "access-control-allow-origin" not in reply.headers


@pytest.mark.anyio
async def test_a_star_is_every_page(tmp_path: Path) -> None:
    server = rebuilt(make_server(tmp_path), cors_origins=["*"])
    async with server.client() as client:
        reply = await client.get("/v1/models", headers={"origin": "https://any.example"})
    assert reply.headers["access-control-allow-origin"] == "*"


# a server whose connections are taken


class Taken:
    """A connection that has a request."""

    def make_room(self) -> None:
        pass

    def check(self, now: float) -> None:
        pass


@pytest.mark.anyio
async def test_a_full_server_refuses_requests_and_answers_health_and_management(server: Server) -> None:
    connections = Connections(cap=1)
    for _ in range(3):
        connections.is_busy(Taken())
    rebuilt(server, connections=connections)
    async with server.client() as client:
        refused = await client.post("/v1/chat/completions", json=CHAT)
        served = [await client.get(path) for path in ("/health", "/ready", "/metrics", "/v1/adapters")]
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_busy")
    assert (refused.headers["connection"], refused.headers["retry-after"]) == ("close", "2")
    assert [reply.status_code for reply in served] == [200] * 4
    assert connections.readings().cuts[Cut.FULL] == 1

    for _ in range(RESERVE):
        connections.is_busy(Taken())
    async with server.client() as client:
        assert [(await client.get(path)).status_code for path in ("/health", "/v1/adapters")] == [200, 503]


@pytest.mark.anyio
async def test_connections_and_their_ends_are_measured(server: Server) -> None:
    connections = Connections(cap=7)
    connections.entered(Taken())
    connections.is_busy(Taken())
    connections.count(Cut.READER_TOO_SLOW)
    server.metrics.read_connections_from(connections.readings)
    assert server.metric("loramux_connections_open") == 1
    assert server.metric("loramux_connections_busy") == 1
    assert server.metric("loramux_connections_cap") == 7
    assert server.metric('loramux_connections_cut_total{reason="reader_too_slow"}') == 1
    assert 'loramux_connections_cut_total{reason="header_too_slow"} 0.0' in server.metrics.render().decode()
