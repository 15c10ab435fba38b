"""vLLM's two adapter calls: its texts and statuses, and nothing but a directory below the root."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from loramux_adapters.base_info import BaseInfo
from loramux_adapters.lora.verify import Checked, check_adapter
from loramux_adapters.store.store import AdapterStore
from loramux_server.api.app import create_app
from loramux_server.api.http.dependencies import Keys
from loramux_server.errors import ConfigError
from loramux_server.publishing.lora_path import LoraPathRoot
from support.adapter_files import TINY_LINEARS, as_hub_snapshot, write_adapter
from support.fakes_api import Server, make_server
from support.publishing import unproved

BASE = BaseInfo("aa" * 32, TINY_LINEARS)


def check(directory: Path) -> Checked:
    return check_adapter(directory, BASE, 256)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[AdapterStore]:
    store = AdapterStore(tmp_path / "store", reserved_names=["tiny-base"], served_base_id=BASE.base_id)
    yield store
    store.close()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The directory that may be loaded from; beside it another one with an adapter in it."""
    write_adapter(tmp_path / "secret", TINY_LINEARS, targets=["q_proj"], rank=4, seed=1)
    write_adapter(tmp_path / "root" / "team" / "pirate", TINY_LINEARS, targets=["q_proj"], rank=4)
    return tmp_path / "root"


@pytest.fixture
def server(tmp_path: Path, root: Path, store: AdapterStore) -> Server:
    (tmp_path / "fake").mkdir()
    fake = make_server(tmp_path / "fake")
    deps = replace(fake.deps, store=store, lora_path_root=LoraPathRoot(unproved(store, check), root, limit=2**20))
    fake.app = create_app(deps)
    return fake


async def load(server: Server, **body: object) -> httpx.Response:
    return await server.post("/v1/load_lora_adapter", body)


def error_of(reply: httpx.Response) -> tuple[int, str, int]:
    error = reply.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"} and error["param"] is None
    return reply.status_code, error["type"], error["code"]


@pytest.mark.anyio
async def test_an_adapter_is_loaded_and_unloaded_with_vllms_words(server: Server, store: AdapterStore) -> None:
    reply = await load(server, lora_name="a", lora_path="team/pirate")
    assert (reply.status_code, reply.text) == (200, "Success: LoRA adapter 'a' added successfully.")
    assert reply.headers["content-type"].startswith("text/plain")
    store.acquire("a").release()
    reply = await server.post("/v1/unload_lora_adapter", {"lora_name": "a", "lora_int_id": None})
    assert (reply.status_code, reply.text) == (200, "Success: LoRA adapter 'a' removed successfully.")
    assert store.records() == []


@pytest.mark.anyio
async def test_an_absolute_path_below_the_root_is_as_good(server: Server, root: Path) -> None:
    assert (await load(server, lora_name="a", lora_path=str(root / "team" / "pirate"))).status_code == 200


@pytest.mark.anyio
async def test_a_name_is_replaced_only_in_place(server: Server, store: AdapterStore, root: Path) -> None:
    await load(server, lora_name="a", lora_path="team/pirate")
    write_adapter(root / "team" / "pirate", TINY_LINEARS, targets=["q_proj"], rank=4, seed=2)
    before = store.record("a").version
    reply = await load(server, lora_name="a", lora_path="team/pirate")
    assert error_of(reply) == (400, "InvalidUserInput", 400) and "load_inplace" in reply.text
    assert store.record("a").version == before
    assert (await load(server, lora_name="a", lora_path="team/pirate", load_inplace=True)).status_code == 200
    assert store.record("a").version != before


@pytest.mark.anyio
@pytest.mark.parametrize("body", [{}, {"lora_name": "a"}, {"lora_path": "x"}, {"lora_name": "", "lora_path": "x"}, []])
async def test_a_call_without_name_or_path_is_400(server: Server, body: object) -> None:
    assert error_of(await server.post("/v1/load_lora_adapter", body)) == (400, "InvalidUserInput", 400)
    reply = await server.post("/v1/unload_lora_adapter", {})
    assert error_of(reply) == (400, "InvalidUserInput", 400)


@pytest.mark.anyio
async def test_where_there_is_no_adapter_it_is_404(server: Server, root: Path) -> None:
    for path in ("nowhere", "team", ".", "user/repo"):
        assert error_of(await load(server, lora_name="a", lora_path=path)) == (404, "NotFoundError", 404)
    reply = await server.post("/v1/unload_lora_adapter", {"lora_name": "nobody"})
    assert error_of(reply) == (404, "NotFoundError", 404)


@pytest.mark.anyio
async def test_an_adapter_that_cannot_be_served_is_500_with_the_reason(server: Server, root: Path) -> None:
    (root / "team" / "pirate" / "adapter_config.json").write_text("{")
    reply = await load(server, lora_name="a", lora_path="team/pirate")
    assert error_of(reply) == (500, "InternalServerError", 500)
    assert "adapter_config.json" in reply.text and str(root) not in reply.text


OPENED: set[str] = set()
sys.addaudithook(lambda event, args: OPENED.add(event) if event.startswith("socket.") else None)

URLS = ["http://169.254.169.254/x", "https://host/x", "file:///etc/passwd", "hf://user/repo", "s3://b/k", "HF:user/x"]
OUTSIDE = [
    "/etc",
    "/",
    "../secret",
    "team/../../secret",
    "..",
    "team/..",
    "~",
    "a\0b",
    "a\nb",
    "\\\\host\\x",
    "x" * 2000,
    "x" * 256,
]


@pytest.mark.anyio
@pytest.mark.parametrize("path", URLS + OUTSIDE)
async def test_a_url_or_a_way_out_of_the_root_is_400_and_nothing_is_opened(
    server: Server, store: AdapterStore, path: str
) -> None:
    OPENED.clear()
    reply = await load(server, lora_name="a", lora_path=path)
    expected = (404, "NotFoundError", 404) if path == "~" else (400, "InvalidUserInput", 400)  # a name like any other
    assert error_of(reply) == expected
    assert not OPENED and store.records() == []


def test_the_spy_sees_a_socket() -> None:
    OPENED.clear()
    socket.socket().close()
    assert OPENED


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["the directory", "one above it", "a file in it", "a file within the root"])
async def test_a_symbolic_link_is_400_wherever_it_stands(
    server: Server, store: AdapterStore, root: Path, kind: str
) -> None:
    secret = root.parent / "secret"
    path = "linked"
    if kind == "the directory":
        (root / "linked").symlink_to(secret)
    elif kind == "one above it":
        (root / "up").symlink_to(root.parent)
        path = "up/secret"
    else:
        write_adapter(root / "linked", TINY_LINEARS, targets=["q_proj"], rank=4)
        source = secret if kind == "a file in it" else root / "team" / "pirate"
        (root / "linked" / "adapter_config.json").unlink()
        (root / "linked" / "adapter_config.json").symlink_to(source / "adapter_config.json")
    reply = await load(server, lora_name="a", lora_path=path)
    assert error_of(reply) == (400, "InvalidUserInput", 400)
    assert "is a symbolic link to " in reply.text and "leads out of" in reply.text
    assert store.records() == []


@pytest.mark.anyio
async def test_a_pickle_instead_of_the_weights_is_called_one(server: Server, root: Path) -> None:
    weights = root / "team" / "pirate" / "adapter_model.safetensors"
    weights.rename(weights.with_name("adapter_model.bin"))
    reply = await load(server, lora_name="a", lora_path="team/pirate")
    assert reply.status_code == 500 and "adapter_model.bin is a pickle" in reply.text


@pytest.mark.anyio
async def test_a_snapshot_of_the_hubs_cache_is_loaded(server: Server, store: AdapterStore, root: Path) -> None:
    snapshot = as_hub_snapshot(root / "team" / "pirate", root / "models--org--pirate")
    reply = await load(server, lora_name="a", lora_path=str(snapshot.relative_to(root)))
    assert reply.status_code == 200 and [record.name for record in store.records()] == ["a"]


@pytest.mark.anyio
async def test_an_illegal_name_is_400_and_one_too_large_500(server: Server, root: Path) -> None:
    for name in ("../x", "tiny-base", "a b", "a@b", "a//b", "a/pin"):
        reply = await load(server, lora_name=name, lora_path="team/pirate")
        assert error_of(reply) == (400, "InvalidUserInput", 400)
    with (root / "team" / "pirate" / "adapter_model.safetensors").open("ab") as file:
        file.truncate(2**21)
    assert error_of(await load(server, lora_name="team/pirate", lora_path="team/pirate")) == (
        500,
        "InternalServerError",
        500,
    )


@pytest.mark.anyio
async def test_without_a_root_there_is_no_such_route(tmp_path: Path) -> None:
    server = make_server(tmp_path)
    for call in ("load", "unload"):
        reply = await server.post(f"/v1/{call}_lora_adapter", {"lora_name": "a", "lora_path": "x"})
        assert reply.status_code == 404 and reply.json()["error"]["code"] == "not_found"


@pytest.mark.anyio
async def test_the_calls_need_the_admin_key(tmp_path: Path, root: Path, store: AdapterStore) -> None:
    lora_path_root = LoraPathRoot(unproved(store, check), root, limit=2**20)
    server = make_server(tmp_path, keys=Keys("api", "admin"), lora_path_root=lora_path_root)
    async with server.client() as client:
        for key, status in ((None, 401), ("api", 403)):
            headers = {"authorization": f"Bearer {key}"} if key else {}
            for call in ("load", "unload"):
                body = {"lora_name": "pirate", "lora_path": "x"}
                reply = await client.post(f"/v1/{call}_lora_adapter", json=body, headers=headers)
                assert reply.status_code == status


def test_a_root_that_is_no_directory_is_a_wrong_setting(tmp_path: Path, store: AdapterStore) -> None:
    with pytest.raises(ConfigError, match="--lora-path-root"):
        LoraPathRoot(unproved(store, check), tmp_path / "missing", limit=1)
