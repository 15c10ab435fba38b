from __future__ import annotations

import asyncio
import io
import tarfile
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute

from loramux_adapters.artifact.coverage import LayerCount
from loramux_adapters.errors import AdapterRejected, BaseMismatch, StoreUnavailable
from loramux_adapters.lora.verify import Checked
from loramux_adapters.names import PATH_WORDS
from loramux_adapters.store.records import AdapterRecord
from loramux_server.api.app import create_app
from loramux_server.api.http.dependencies import Dependencies
from loramux_server.errors import ServerBusy
from support.fakes_api import BASE_NAME, VERSION, FakeCheck, FakeProve, Server, make_server, record_of
from support.raw_call import RawCall

FILES = {"config": b"{}", "weights": b"w" * 1000}


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return make_server(tmp_path)


async def put(server: Server, name: str = "new", query: str = "", **files: bytes) -> httpx.Response:
    async with server.client() as client:
        return await client.put(f"/v1/adapters/{name}{query}", files=FILES | files)


@pytest.mark.anyio
async def test_an_upload_is_201_then_200_for_the_same_bytes_and_for_a_new_version(server: Server) -> None:
    replies = [await put(server), await put(server), await put(server, weights=b"other")]
    assert [reply.status_code for reply in replies] == [201, 200, 200]
    assert [reply.json()["outcome"] for reply in replies] == ["created", "unchanged", "updated"]
    assert replies[0].json()["version"] != replies[2].json()["version"] == server.store.known["new"].version


@pytest.mark.anyio
@pytest.mark.parametrize(("name", "status", "outcome"), [("new", 201, "created"), ("pirate", 200, "updated")])
async def test_an_upload_that_is_deleted_before_its_reply_says_both(
    server: Server, name: str, status: int, outcome: str
) -> None:
    record = server.store.record

    def record_after_deletion(name: str) -> AdapterRecord:
        server.store.known.pop(name, None)  # by another call
        return record(name)

    server.store.record = record_after_deletion  # type: ignore[method-assign]
    reply = await put(server, name)
    assert reply.status_code == status
    shown = reply.json()
    assert (shown["name"], shown["outcome"], shown["deleted"]) == (name, outcome, True)
    assert len(shown["version"]) > 8


@pytest.mark.anyio
async def test_an_adapter_is_shown_with_everything_there_is_to_know(server: Server) -> None:
    server.store.known["pirate"] = record_of("pirate", VERSION, layers=LayerCount(14, 28), notes=["a word"])
    async with server.client() as client:
        listed = (await client.get("/v1/adapters")).json()
        shown = (await client.get("/v1/adapters/pirate")).json()
    assert listed == {"object": "list", "data": [shown]}
    assert shown == {
        "id": "pirate",
        "object": "adapter",
        "name": "pirate",
        "version": VERSION,
        "rank": 8,
        "target_modules": ["q_proj"],
        "layers": {"adapted": 14, "of": 28},
        "bytes": 1000,
        "tier": "device",
        "pinned": False,
        "corrupt": False,
        "base": BASE_NAME,
        "base_verified": True,
        "fingerprint": "none",
        "notes": ["a word"],
        "chat_template": "base",
        "context": None,
        "generation_defaults": {},
        "requests": 0,
        "created": 1_700_000_000,
        "updated": 1_700_000_000,
        "versions": [
            {
                "version": VERSION,
                "created": 1_700_000_000,
                "bytes": 1000,
                "rank": 8,
                "layers": {"adapted": 14, "of": 28},
                "verified": True,
                "fingerprint": "none",
                "notes": ["a word"],
                "corrupt": False,
                "current": True,
                "tier": "device",
            }
        ],
    }


@pytest.mark.anyio
async def test_a_mere_check_stores_nothing(server: Server) -> None:
    reply = await put(server, query="?validate_only=true")
    assert reply.status_code == 200
    assert reply.json() == {
        "object": "adapter.validation",
        "name": "new",
        "valid": True,
        "rank": 4,
        "target_modules": ["q_proj", "v_proj"],
        "layers": None,
        "base_verified": False,
        "fingerprint": "none",
        "notes": [],
        "chat_template": "base",
        "context": None,
        "generation_defaults": {},
    }
    assert "new" not in server.store.known
    assert server.check.seen == [["adapter_config.json", "adapter_model.safetensors"]]


@pytest.mark.anyio
async def test_force_reaches_the_check(server: Server) -> None:
    await put(server, query="?force=true&validate_only=0")
    await put(server, query="?force=false")
    assert server.check.forced == [True, False]


@pytest.mark.anyio
@pytest.mark.parametrize("query", ["?force=yes", "?force=", "?validate_only=True", "?dry_run=true", "?force=true&x=1"])
async def test_a_wrong_query_is_400(server: Server, query: str) -> None:
    assert (await put(server, query=query)).status_code == 400
    assert "new" not in server.store.known


@pytest.mark.anyio
async def test_a_refused_adapter_is_422_with_every_reason(server: Server) -> None:
    server.check.failure = AdapterRejected(["use_dora is not served", "lora_A of q_proj is not finite"])
    reply = await put(server)
    assert reply.status_code == 422
    error = reply.json()["error"]
    assert error["reasons"] == ["use_dora is not served", "lora_A of q_proj is not finite"]
    assert error["code"] == "adapter_rejected"
    assert list(server.store.root.iterdir()) == []


@pytest.mark.anyio
async def test_an_adapter_of_another_base_is_409_with_both_ids(server: Server) -> None:
    server.check.failure = BaseMismatch("a" * 64, "b" * 64)
    reply = await put(server)
    assert reply.status_code == 409
    assert (reply.json()["error"]["adapter_base_id"], reply.json()["error"]["served_base_id"]) == ("a" * 64, "b" * 64)


@pytest.mark.anyio
async def test_a_store_that_cannot_write_is_503(server: Server) -> None:
    server.store.failure = StoreUnavailable("/srv/adapters: disk full")
    reply = await put(server)
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "10")
    assert "/srv" not in reply.text


ILLEGAL = [
    ".hidden", "-x", "a b", "x" * 256, "a:b", "a@b", "caf%C3%A9", "%00", "a%00", "a%0d%0aX-Evil:1", "%2e%2e",
    "a%5cb", "%EF%BC%8E%EF%BC%8E", "a%3f", "%F0%9F%98%80", BASE_NAME,
    "..%2fx", "%2fetc%2fpasswd", "a%2f", "a//b", "a/.b", "a/%2e%2e/b", "a/b:c", "a%0a/b",
    "org%2farchive", "org%2fpin", "org%2frollback",
]  # fmt: skip

# Where what looks like a name is a route of the adapter `org`, which nobody has.
MEANT_OTHERWISE = {("org%2farchive", "GET"), ("org%2fpin", "DELETE")}


@pytest.mark.anyio
@pytest.mark.parametrize("name", ILLEGAL)
@pytest.mark.parametrize("method", ["PUT", "GET", "DELETE"])
async def test_an_illegal_name_is_400(server: Server, name: str, method: str) -> None:
    async with server.client() as client:
        reply = await client.request(method, f"http://localhost/v1/adapters/{name}")
    if (name, method) in MEANT_OTHERWISE:
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, "model_not_found")
    elif name.startswith("org%2f"):
        assert (reply.status_code, reply.json()["error"]["code"]) == (405, "method_not_allowed")
    else:
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_adapter_name")
    assert "x-evil" not in reply.headers


@pytest.mark.anyio
@pytest.mark.parametrize("slash", ["/", "%2F", "%2f"])
async def test_a_name_as_hubs_write_it_takes_every_route(server: Server, slash: str) -> None:
    path = f"/v1/adapters/org{slash}my_adapter-v1.0"
    async with server.client() as client:
        assert (await client.put(path, files=FILES)).json()["name"] == "org/my_adapter-v1.0"
        assert (await client.get(path)).json()["name"] == "org/my_adapter-v1.0"
        assert (await client.post(f"{path}/pin")).json()["pinned"]
        assert not (await client.delete(f"{path}/pin")).json()["pinned"]
        assert (await client.post(f"{path}/rollback")).json()["error"]["code"] == "rollback_impossible"
        server.store.directory(server.store.known["org/my_adapter-v1.0"].version).mkdir()
        archive = await client.get(f"{path}/archive")
        assert archive.headers["content-disposition"] == 'attachment; filename="org--my_adapter-v1.0.tar.gz"'
        assert (await client.get(f"/v1/models/org{slash}my_adapter-v1.0")).json()["id"] == "org/my_adapter-v1.0"
        assert (await client.delete(path)).json()["id"] == "org/my_adapter-v1.0"


@pytest.mark.anyio
async def test_an_archive_of_an_adapter_with_the_longest_name_can_be_unpacked(server: Server) -> None:
    name = "o" * 127 + "/" + "n" * 127
    async with server.client() as client:
        version = (await client.put(f"/v1/adapters/{name}", files=FILES)).json()["version"]
        directory = server.store.directory(version)
        directory.mkdir()
        (directory / "adapter_config.json").write_bytes(b"{}")
        reply = await client.get(f"/v1/adapters/{name}/archive")
    with tarfile.open(fileobj=io.BytesIO(reply.content), mode="r:gz") as archive:
        (member,) = archive.getnames()
    folder, file = member.split("/")
    assert file == "adapter_config.json" and len(folder) <= 80 and folder.startswith("ooo")


@pytest.mark.anyio
async def test_one_word_names_may_be_words_of_the_api(server: Server) -> None:
    async with server.client() as client:
        for name in sorted(PATH_WORDS):
            assert (await client.put(f"/v1/adapters/{name}", files=FILES)).status_code == 201
            assert (await client.post(f"/v1/adapters/{name}/pin")).json()["name"] == name
            assert (await client.delete(f"/v1/adapters/{name}")).json()["deleted"]


def test_no_name_can_be_meant_by_a_route_of_another(server: Server) -> None:
    paths = [route.path for route in server.app.routes if isinstance(route, APIRoute)]
    ends = {path.partition("{name:anything}/")[2] for path in paths if "{name:anything}/" in path}
    assert ends == PATH_WORDS


@pytest.mark.anyio
async def test_an_unknown_adapter_is_404(server: Server) -> None:
    async with server.client() as client:
        for method, path in (("GET", "nobody"), ("DELETE", "nobody"), ("GET", "nobody/archive")):
            reply = await client.request(method, f"/v1/adapters/{path}")
            assert (reply.status_code, reply.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.anyio
async def test_a_deleted_adapter_is_gone_and_its_metrics_label_is_free(tmp_path: Path) -> None:
    server = make_server(tmp_path)
    async with server.client() as client:
        reply = await client.delete("/v1/adapters/pirate")
        assert (reply.status_code, reply.json()) == (200, {"id": "pirate", "object": "adapter", "deleted": True})
        assert (await client.get("/v1/adapters/pirate")).status_code == 404
    assert (await server.post("/v1/completions", {"model": "pirate", "prompt": "x"})).status_code == 404


@pytest.mark.anyio
async def test_an_adapter_can_be_fetched_as_an_archive_and_uploaded_again(server: Server) -> None:
    stored = server.store.directory(VERSION)
    stored.mkdir()
    files = {"adapter_config.json": b'{"r": 8}', "adapter_model.safetensors": bytes(range(256)) * 3000}
    for name, content in {**files, "record.json": b"what the store says of it"}.items():
        (stored / name).write_bytes(content)
    async with server.client() as client:
        reply = await client.get("/v1/adapters/pirate/archive")
        assert (reply.status_code, reply.headers["content-type"]) == (200, "application/gzip")
        with tarfile.open(fileobj=io.BytesIO(reply.content), mode="r:gz") as archive:
            assert {m.name: archive.extractfile(m).read() for m in archive} == {  # type: ignore[union-attr]
                f"pirate/{name}": content for name, content in files.items()
            }
        assert (await client.put("/v1/adapters/copy", files={"archive": reply.content})).status_code == 201
    assert server.store.files["copy"] == files
    assert server.store.leased == 0


class SlowCheck(FakeCheck):
    """Waits until the test lets it go on."""

    def __init__(self) -> None:
        super().__init__()
        self.entered = threading.Event()
        self.proceed = threading.Event()

    def __call__(self, directory: Path, *, force: bool) -> Checked:
        self.entered.set()
        assert self.proceed.wait(5)
        return super().__call__(directory, force=force)


def with_check(server: Server, check: FakeCheck, **limits: Any) -> Server:
    deps: Dependencies = replace(server.deps, check=check, limits=replace(server.deps.limits, **limits))
    server.deps, server.check, server.app = deps, check, create_app(deps)
    return server


@pytest.mark.anyio
async def test_uploads_at_the_same_time_are_bounded(server: Server) -> None:
    check = SlowCheck()
    with_check(server, check, uploads=1, upload_wait_seconds=0.05)
    first = asyncio.create_task(put(server, "one"))
    await asyncio.to_thread(check.entered.wait, 5)
    refused = await put(server, "two")
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    check.proceed.set()
    assert (await first).status_code == 201
    assert (await put(server, "two")).status_code == 201


@pytest.mark.anyio
async def test_generation_goes_on_while_an_upload_is_checked(server: Server) -> None:
    check = SlowCheck()
    with_check(server, check)
    upload = asyncio.create_task(put(server))
    await asyncio.to_thread(check.entered.wait, 5)
    assert (await server.post("/v1/completions", {"model": "pirate", "prompt": "x"})).status_code == 200
    check.proceed.set()
    assert (await upload).status_code == 201


@pytest.mark.anyio
async def test_a_client_that_leaves_during_the_check_publishes_nothing(server: Server) -> None:
    check = SlowCheck()
    with_check(server, check)
    request = httpx.Request("PUT", "http://localhost", files=FILES)
    headers = [(b"content-type", request.headers["content-type"].encode())]
    call = RawCall(server.app, "PUT", "/v1/adapters/new", request.read(), headers=headers)
    await asyncio.to_thread(check.entered.wait, 5)
    leaving = asyncio.create_task(call.disconnect())
    await asyncio.sleep(0.01)
    check.proceed.set()
    await leaving
    assert "new" not in server.store.known
    assert list(server.store.root.iterdir()) == []


@pytest.mark.anyio
async def test_an_upload_is_tried_out_and_the_outcome_is_stored_and_shown(server: Server) -> None:
    prove = server.deps.prove
    assert isinstance(prove, FakeProve)
    prove.outcome = "within_tolerance"
    async with server.client() as client:
        reply = await client.put("/v1/adapters/new?validate_only=true", files=FILES)
        assert reply.json()["fingerprint"] == "within_tolerance" and "new" not in server.store.known
        reply = await client.put("/v1/adapters/new?allow_no_effect=true", files=FILES)
        assert reply.status_code == 201
        shown = (await client.get("/v1/adapters/new")).json()
    assert shown["fingerprint"] == shown["versions"][0]["fingerprint"] == "within_tolerance"
    assert prove.seen == [set(), {"allow_no_effect", "keep"}]


@pytest.mark.anyio
async def test_the_replay_can_be_skipped(server: Server) -> None:
    prove = server.deps.prove
    assert isinstance(prove, FakeProve)
    prove.outcome = "skipped"
    assert (await put(server, query="?skip_replay=true")).json()["fingerprint"] == "skipped"
    assert prove.seen == [{"skip_replay", "keep"}]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [(AdapterRejected(["it has no effect"]), 422, "adapter_rejected"), (ServerBusy("no time"), 503, "server_busy")],
)
async def test_an_upload_that_fails_its_proof_is_not_stored(
    server: Server, failure: Exception, status: int, code: str
) -> None:
    prove = server.deps.prove
    assert isinstance(prove, FakeProve)
    prove.failure = failure
    async with server.client() as client:
        reply = await client.put("/v1/adapters/new", files=FILES)
    assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)
    assert "new" not in server.store.known
