"""Keys and tenants of a real server: made beside it by the command line, refused from the next request on."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest

from support.real_adapters import ADAPTERS
from support.real_server import BASE, HttpServer, RealServer, clean_environment, running_server

PROMPT = " ".join(f"Line {number} of what every customer asks." for number in range(12))


def command(store: Path, *words: str) -> Any:
    """`loramux WORDS` on the store's directory; what it prints, as JSON."""
    done = subprocess.run(
        [sys.executable, "-m", "loramux_server", *words, "--json", "--adapter-dir", str(store)],
        capture_output=True,
        text=True,
        check=True,
        env=clean_environment(),
    )
    return json.loads(done.stdout)


def made(store: Path, *words: str) -> str:
    key: str = command(store, "keys", "create", *words)["key"]
    return key


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    store = tmp_path_factory.mktemp("tenants") / "store"
    with running_server(store, "--device-memory-mib", "256") as running:
        with running.client() as client:
            assert client.get("/v1/models").status_code == 200, "open until there is a key"
        running.key = made(store, "--scopes", "admin")
        yield running


def seen_by(server: RealServer, tenant: str, scopes: str = "infer,upload") -> HttpServer:
    """The server as a tenant's client knows it, with a key of its own."""
    key = made(server.store, "--scopes", scopes, "--tenant", tenant)
    return HttpServer(server.store, server.url, key)


def ask(server: HttpServer, model: str = BASE, prompt: str = PROMPT, **fields: Any) -> Any:
    body = {"model": model, "prompt": prompt, "max_tokens": 4, "temperature": 0, **fields}
    with server.client() as client:
        return client.post("/v1/completions", json=body)


def test_a_server_that_was_open_closes_with_its_first_key(server: RealServer) -> None:
    with replace(server, key="").client() as client:
        assert client.get("/v1/models").status_code == 401
        assert client.get("/health").status_code == 200
    with pytest.raises(openai.AuthenticationError, match="wrong key"):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="lmx_nonsense").models.list()


def test_revoking_beside_the_server_holds_from_the_next_request_on(server: RealServer) -> None:
    tenant = seen_by(server, "acme")
    assert ask(tenant).status_code == 200
    rotated = command(server.store, "keys", "rotate", tenant.key.split("_")[1])
    assert ask(tenant).status_code == 401
    again = replace(tenant, key=rotated["key"])
    assert ask(again).status_code == 200
    with server.client() as client:
        assert client.delete(f"/v1/keys/{rotated['id']}").json()["state"] == "revoked"
    refused = ask(again)
    assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")


def test_two_tenants_have_adapters_of_one_name_and_see_no_others(
    server: RealServer, adapter_dirs: dict[str, Path]
) -> None:
    first, second = seen_by(server, "first"), seen_by(server, "second")
    uploaded = [one.upload("spam", adapter_dirs[name]) for one, name in zip((first, second), ADAPTERS, strict=False)]
    assert [reply.status_code for reply in uploaded] == [201, 201]
    versions = [reply.json()["version"] for reply in uploaded]
    assert versions[0] != versions[1]
    replies = [ask(one, "spam") for one in (first, second)]
    assert [reply.headers["x-loramux-adapter-version"] for reply in replies] == versions
    assert [[*one.adapters()] for one in (first, second)] == [["spam"], ["spam"]]
    for name, version in zip(("first~spam", "second~spam"), versions, strict=True):
        assert ask(server, name).headers["x-loramux-adapter-version"] == version
        assert ask(first, name).status_code == 404
    assert server.upload("spam", adapter_dirs[ADAPTERS[2]]).status_code == 201
    third = seen_by(server, "third")
    assert [*third.adapters()] == ["spam"], "the shared one"
    with third.client() as client:
        assert client.delete("/v1/adapters/spam").status_code == 403
    with first.client() as client:
        assert client.delete("/v1/adapters/spam").status_code == 200
    assert set(server.adapters()) >= {"spam", "second~spam"}


def test_what_was_read_for_a_tenant_is_found_again_by_it_alone(server: RealServer) -> None:
    first, second = seen_by(server, "reader"), seen_by(server, "curious")

    def found(client: HttpServer, **fields: Any) -> tuple[int, str]:
        reply = ask(client, prompt=f"Tenants: {PROMPT}", **fields).json()
        return reply["usage"]["prompt_tokens_details"]["cached_tokens"], reply["choices"][0]["text"]

    cold, text = found(first)
    warm, again = found(first)
    other, theirs = found(second)
    operators, ours = found(server)
    assert cold == other == operators == 0 < warm
    assert text == again == theirs == ours, "the same reply, found or read"


def test_limits_hold_and_tell_when_to_come_back(server: RealServer) -> None:
    tenant = seen_by(server, "busy")
    command(server.store, "tenants", "limit", "busy", "requests_per_minute=2", "tokens_per_minute=2000")
    first = ask(tenant)
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    usage = first.json()["usage"]["total_tokens"]
    second = ask(tenant, stream=True)
    assert second.headers["x-ratelimit-remaining-requests"] == "0"
    refused = ask(tenant)
    assert refused.status_code == 429 and 1 <= int(refused.headers["retry-after"]) <= 60
    command(server.store, "tenants", "limit", "busy", "requests_per_minute=none")
    left = int(ask(tenant, max_tokens=0, echo=True).headers["x-ratelimit-remaining-tokens"])
    assert 0 < 2000 - left <= 3 * usage


def test_every_change_is_in_the_audit_log(server: RealServer, adapter_dirs: dict[str, Path]) -> None:
    tenant = seen_by(server, "logged")
    version = tenant.upload("spam", adapter_dirs[ADAPTERS[0]]).json()["version"]
    with server.client() as client:
        assert client.post("/v1/adapters/logged~spam/pin").status_code == 200
        assert client.delete("/v1/adapters/logged~spam/pin").status_code == 200
    with tenant.client() as client:
        assert client.delete("/v1/adapters/spam").status_code == 200
    entries = command(server.store, "audit", "--adapter", "logged~spam")
    assert [(one["action"], one["tenant"], one["detail"]) for one in reversed(entries)] == [
        ("published", "logged", "created"),
        ("pinned", None, ""),
        ("unpinned", None, ""),
        ("deleted", "logged", ""),
    ]
    assert {one["version"] for one in entries} == {version, None}
    assert {one["address"] for one in entries} == {"127.0.0.1"}
    assert {one["who"] for one in entries} == {f"key {one.key.split('_')[1]}" for one in (server, tenant)}
    created = command(server.store, "audit", "--adapter", tenant.key.split("_")[1])
    assert created[0]["action"] == "key created" and created[0]["who"].endswith("at the shell")


def test_without_any_key_another_address_is_refused_and_with_one_it_is_not(tmp_path: Path) -> None:
    from loramux_server.config.serve import ServeConfig
    from loramux_server.errors import ConfigError

    with pytest.raises(ConfigError, match="loramux keys create"):
        ServeConfig(host="0.0.0.0", adapter_dir=tmp_path)
    made(tmp_path, "--scopes", "admin")
    assert ServeConfig(host="0.0.0.0", adapter_dir=tmp_path).api_key is None
