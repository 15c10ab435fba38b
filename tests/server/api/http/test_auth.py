from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fastapi.routing import APIRoute
from starlette.requests import Request

from loramux_server.api.http.auth import Access, Authorizer, access, access_of
from loramux_server.api.http.dependencies import Keys
from loramux_server.api.http.errors import NotAllowed, NotAuthenticated
from support.fakes_api import make_server
from support.raw_call import RawCall

API, ADMIN = "api-secret", "admin-secret"
PUBLIC_PATHS = ("/", "/health", "/ready")


@access(Access.INFER)
async def endpoint() -> None:
    pass


@access(Access.MANAGE)
async def management() -> None:
    pass


@access(Access.PUBLIC)
async def public() -> None:
    pass


async def outcome(keys: Keys, target: Any, *headers: tuple[bytes, bytes]) -> str:
    request = Request({"type": "http", "endpoint": target, "headers": list(headers), "path": "/health"})
    try:
        await Authorizer(keys).authorize(request)
    except NotAuthenticated:
        return "401"
    except NotAllowed:
        return "403"
    return "ok"


def bearer(key: str) -> tuple[bytes, bytes]:
    return (b"authorization", f"Bearer {key}".encode("latin-1"))


LOCAL = (b"host", b"localhost:8000")


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("keys", "key", "generation", "manage"),
    [
        (Keys(API, ADMIN), None, "401", "401"),
        (Keys(API, ADMIN), API, "ok", "403"),
        (Keys(API, ADMIN), ADMIN, "ok", "ok"),
        (Keys(API, ADMIN), "wrong", "401", "401"),
        (Keys(API), API, "ok", "ok"),
        (Keys(API), "wrong", "401", "401"),
        (Keys(None, ADMIN), None, "ok", "401"),
        (Keys(None, ADMIN), ADMIN, "ok", "ok"),
        (Keys(), None, "ok", "ok"),
    ],
)
async def test_each_key_opens_what_it_should(keys: Keys, key: str | None, generation: str, manage: str) -> None:
    headers = [LOCAL] + ([bearer(key)] if key else [])
    assert await outcome(keys, endpoint, *headers) == generation
    assert await outcome(keys, management, *headers) == manage
    assert await outcome(keys, public, *headers) == "ok"


@pytest.mark.anyio
@pytest.mark.parametrize(
    "headers",
    [
        [(b"authorization", b"")], [(b"authorization", b"Bearer")], [(b"authorization", b"Bearer ")],
        [(b"authorization", b"Basic " + API.encode())], [(b"authorization", API.encode())],
        [(b"authorization", b"Bearer \xff\xfe")], [bearer(API), bearer(API)], [bearer(API + "x")], [bearer(API[:-1])],
        [bearer("é" + API)], [(b"x-api-key", API.encode())], [bearer("x" * 10**6)],
    ],
)  # fmt: skip
async def test_anything_but_one_right_bearer_key_is_refused(headers: list[tuple[bytes, bytes]]) -> None:
    assert await outcome(Keys(API), endpoint, LOCAL, *headers) == "401"


@pytest.mark.anyio
async def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[object, object]] = []

    def compare(given: bytes, right: bytes) -> bool:
        compared.append((given, right))
        return given == right

    monkeypatch.setattr("loramux_server.api.http.auth.hmac.compare_digest", compare)
    assert await outcome(Keys(API, ADMIN), endpoint, bearer("guess")) == "401"
    assert compared == [(b"guess", ADMIN.encode()), (b"guess", API.encode())]


GOOD_HOSTS = [
    b"localhost",
    b"localhost:8000",
    b"127.0.0.1",
    b"127.0.0.1:1",
    b"[::1]",
    b"[::1]:8000",
    b"LOCALHOST",
    b"127.0.0.2",
]
BAD_HOSTS = [
    b"", b"evil.example", b"evil.example:8000", b"localhost.evil.example", b"evil-localhost", b"127.0.0.1.evil.example",
    b"localhost:8000@evil.example", b"evil.example/localhost", b"localhost/health?", b"x/health?", b"localhost\x00",
    b"localhost:", b"localhost:x", b"localhost:999999", b" localhost", b"[::1", b"::1", b"[::1]x", b"0.0.0.0",
    b"127.0.0.1:80:80", b"localhost,evil.example", b"localhost\r\nx: y", b"127.1", b"2130706433",
]  # fmt: skip


@pytest.mark.anyio
@pytest.mark.parametrize("host", GOOD_HOSTS)
async def test_without_a_key_requests_to_this_machine_are_served(host: bytes) -> None:
    assert await outcome(Keys(), endpoint, (b"host", host)) == "ok"


@pytest.mark.anyio
@pytest.mark.parametrize("host", BAD_HOSTS)
async def test_without_a_key_any_other_host_is_refused(host: bytes) -> None:
    assert await outcome(Keys(), endpoint, (b"host", host)) == "403"
    assert await outcome(Keys(check_host=False), endpoint, (b"host", host)) == "ok"


@pytest.mark.anyio
async def test_without_a_key_there_must_be_exactly_one_host() -> None:
    assert await outcome(Keys(), endpoint) == "403"
    assert await outcome(Keys(), endpoint, LOCAL, LOCAL) == "403"


def test_keys_do_not_show_where_they_are_printed() -> None:
    assert API not in repr(Keys(API, ADMIN)) and ADMIN not in repr(Keys(API, ADMIN))


# the app


def routes_of(app: Any) -> list[APIRoute]:
    assert all(isinstance(route, APIRoute) for route in app.routes), "a route that bypasses the app's dependency"
    return list(app.routes)


@pytest.mark.anyio
async def test_every_route_but_three_asks_for_a_key(tmp_path: Path) -> None:
    server = make_server(tmp_path, keys=Keys(API, ADMIN))
    checked = 0
    async with server.client() as client:
        for route in routes_of(server.app):
            for method in route.methods or ():
                path = route.path.replace("{name}", "pirate").replace("{model:path}", "pirate")
                reply = await client.request(method, path)
                expected = 200 if path in PUBLIC_PATHS else 401
                assert reply.status_code == expected, (method, path)
                checked += 1
    assert checked == 31


@pytest.mark.anyio
async def test_a_route_that_says_nothing_asks_for_a_key(tmp_path: Path) -> None:
    server = make_server(tmp_path, keys=Keys(API))

    async def forgotten() -> None:
        pass

    server.app.add_api_route("/forgotten", forgotten, methods=["GET"])
    async with server.client() as client:
        assert (await client.get("/forgotten")).status_code == 401
    assert access_of(forgotten) is Access.OPERATOR


@pytest.mark.anyio
async def test_management_routes_are_those_that_change_or_give_out_adapters_or_keys(tmp_path: Path) -> None:
    server = make_server(tmp_path, keys=Keys(API, ADMIN))
    async with server.client(headers={"authorization": f"Bearer {API}"}) as client:
        statuses = {
            (method, route.path): (
                await client.request(method, route.path.replace("{name:anything}", "pirate"))
            ).status_code
            for route in routes_of(server.app)
            for method in route.methods or ()
        }
    assert {key for key, status in statuses.items() if status == 403} == {
        ("PUT", "/v1/adapters/{name:anything}"),
        ("DELETE", "/v1/adapters/{name:anything}"),
        ("GET", "/v1/adapters/{name:anything}/archive"),
        ("POST", "/v1/adapters/{name:anything}/rollback"),
        ("POST", "/v1/adapters/{name:anything}/pin"),
        ("DELETE", "/v1/adapters/{name:anything}/pin"),
        ("GET", "/v1/keys"),
        ("POST", "/v1/keys"),
        ("DELETE", "/v1/keys/{key}"),
        ("POST", "/v1/keys/{key}/rotate"),
        ("GET", "/v1/tenants"),
        ("PUT", "/v1/tenants/{tenant}"),
        ("GET", "/v1/audit"),
    }


@pytest.mark.anyio
@pytest.mark.parametrize("host", BAD_HOSTS + [b"localhost:8000/health", b"localhost/ready", b"health"])
@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/metrics/vllm", "/v1/adapters", "/v1/adapters/pirate"])
async def test_no_host_header_opens_a_protected_route(tmp_path: Path, host: bytes, path: str) -> None:
    server = make_server(tmp_path, keys=Keys(API))
    call = RawCall(server.app, "GET", path, host=host)
    await call.task
    assert call.sent[0]["status"] == 401


@pytest.mark.anyio
@pytest.mark.parametrize(
    "path",
    ["//v1/models", "/health/../v1/models", "/v1/models/", "/%2e/v1/models", "/health/v1/models", "/v1/models;/health",
     "http://localhost/v1/models", "/V1/models", "/v1/models%00/health"],
)  # fmt: skip
async def test_no_spelling_of_a_path_opens_a_protected_route(tmp_path: Path, path: str) -> None:
    server = make_server(tmp_path, keys=Keys(API))
    call = RawCall(server.app, "GET", path)
    await call.task
    assert call.sent[0]["status"] in (401, 404)


@pytest.mark.anyio
async def test_a_refusal_is_in_openai_shape_and_says_what_to_send(tmp_path: Path) -> None:
    server = make_server(tmp_path, keys=Keys(API, ADMIN))
    async with server.client() as client:
        reply = await client.get("/v1/models")
        assert reply.headers["www-authenticate"] == "Bearer"
        error = reply.json()["error"]
        assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
        reply = await client.delete("/v1/adapters/pirate", headers={"authorization": f"Bearer {API}"})
        assert (reply.status_code, reply.json()["error"]["code"]) == (403, "not_allowed")
    assert "pirate" in server.store.known


@pytest.mark.anyio
async def test_an_upload_without_a_key_is_refused_before_its_body_is_read(tmp_path: Path) -> None:
    server = make_server(tmp_path, keys=Keys(API))
    read = 0

    async def body() -> Any:
        nonlocal read
        read += 1
        yield b"x"

    async with server.client() as client:
        reply = await client.put("/v1/adapters/new", content=body())
    assert (reply.status_code, read) == (401, 0)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("host", "outcome_of_it"),
    [
        (b"host.docker.internal", "ok"), (b"Host.Docker.Internal:8000", "ok"), (b"localhost", "ok"),
        (b"[::1]:80", "ok"),
        (b"host.docker.internal.evil.example", "403"), (b"evil.example", "403"), (b"host.docker.internal:x", "403"),
    ],
)  # fmt: skip
async def test_further_names_of_this_machine_can_be_allowed(host: bytes, outcome_of_it: str) -> None:
    keys = Keys(allowed_hosts=["host.docker.internal"])
    assert await outcome(keys, endpoint, (b"host", host)) == outcome_of_it


@pytest.mark.anyio
async def test_a_refused_host_is_named_with_the_setting_that_allows_it() -> None:
    scope = {"type": "http", "endpoint": endpoint, "headers": [(b"host", b"host.docker.internal:8000")], "path": "/"}
    with pytest.raises(NotAllowed, match=r"'host\.docker\.internal:8000'.*--allowed-hosts \(LORAMUX_ALLOWED_HOSTS\)"):
        await Authorizer(Keys()).authorize(Request(scope))
