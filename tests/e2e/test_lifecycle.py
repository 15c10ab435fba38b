"""An adapter's life in a real server: versions, pins, damage, and every way in, each shown by what it answers."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from loramux_adapters.store.store import AdapterStore
from loramux_server.cli import main as cli
from support.adapter_files import write_adapter
from support.real_adapters import ADAPTERS, LINEARS, make_adapter
from support.real_server import BASE, RealServer, eventually, running_server
from support.replies import streamed, whole

NAME = ADAPTERS[0]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("lifecycle")
    (place / "watched").mkdir()
    return place


@pytest.fixture(scope="module")
def server(place: Path) -> Iterator[RealServer]:
    flags = ["--adapter-memory-mib", "64", "--host-cache-mib", "32", "--device-memory-mib", "160"]
    flags += ["--keep-versions", "3"]
    flags += ["--watch-dir", str(place / "watched"), "--watch-seconds", "0.2", "--lora-path-root", str(place)]
    with running_server(place / "store", *flags) as server:
        yield server


def call(server: RealServer, method: str, path: str, **options: Any) -> httpx.Response:
    with server.client() as client:
        return client.request(method, path, **options)


def answer(server: RealServer, model: str) -> tuple[str, str]:
    reply = whole(
        server, {"model": model, "prompt": "The keeper saw", "max_tokens": 8, "temperature": 0, "logprobs": 0}
    )
    return reply.version, reply.reply.text


def put(server: RealServer, place: Path, seed: int, name: str = NAME) -> str:
    response = server.upload(name, make_adapter(place / f"files-{seed}", 0, seed))
    assert response.status_code in (200, 201), response.text
    version: str = response.json()["version"]
    return version


def test_a_rollback_is_one_call_and_running_streams_end_on_their_version(server: RealServer, place: Path) -> None:
    old = put(server, place, 0)
    before = answer(server, NAME)
    new = put(server, place, 1)
    after = answer(server, NAME)
    assert (before[0], after[0]) == (old, new) and before[1] != after[1]
    body = {"model": NAME, "prompt": "The keeper saw", "max_tokens": 40, "temperature": 0, "logprobs": 0}
    body["ignore_eos"] = True
    alone = whole(server, body)

    def roll_back(response: httpx.Response) -> None:
        assert call(server, "POST", f"/v1/adapters/{NAME}/rollback").json()["version"] == old

    running = streamed(server, body, roll_back)
    assert (running.version, running.reply.tokens) == (new, alone.reply.tokens)
    assert answer(server, NAME) == before
    assert answer(server, f"{NAME}@{new[:8]}") == after
    shown = call(server, "GET", f"/v1/adapters/{NAME}").json()
    assert [(one["version"], one["current"]) for one in shown["versions"]] == [(new, False), (old, True)]


def test_what_is_deleted_or_replaced_leaves_device_and_host_at_once(server: RealServer, place: Path) -> None:
    def tiers() -> dict[str, str]:
        return {one["version"]: one["tier"] for one in call(server, "GET", "/v1/adapters/gone").json()["versions"]}

    version = put(server, place, 7, "gone")
    answer(server, "gone")
    assert tiers() == {version: "device"}
    newer = put(server, place, 8, "gone")
    eventually(lambda: tiers()[version], "disk")
    answer(server, "gone")
    assert tiers()[newer] == "device"
    device, host = server.metric("loramux_adapters_device"), server.metric("loramux_adapters_host")
    call(server, "DELETE", "/v1/adapters/gone")
    eventually(lambda: server.metric("loramux_adapters_device"), device - 1)
    assert server.metric("loramux_adapters_host") == host - 1
    assert not (server.store / "versions" / newer).exists()


def test_a_pinned_adapter_is_in_memory_before_it_is_asked_for_and_stays(server: RealServer, place: Path) -> None:
    put(server, place, 9, "pinned")
    assert call(server, "POST", "/v1/adapters/pinned/pin").json()["pinned"] is True
    eventually(lambda: server.adapters()["pinned"]["tier"] in ("host", "device"), True)
    answer(server, "pinned")
    for index in (1, 5, 7, 8, 12):  # more than the device holds
        assert server.upload(f"other-{index}", make_adapter(place / f"o-{index}", index)).status_code == 201
        answer(server, f"other-{index}")
    assert server.adapters()["pinned"]["tier"] == "device"
    big = write_adapter(place / "big", LINEARS, rank=16, seed=1)  # fp32, over half of the host cache
    assert server.upload("big", big).status_code == 201
    refused = call(server, "POST", "/v1/adapters/big/pin")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "pin_refused")
    assert server.metric("loramux_adapters_pinned") == 1
    call(server, "DELETE", "/v1/adapters/pinned/pin")
    for name in ["pinned", "big", *(f"other-{index}" for index in (1, 5, 7, 8, 12))]:
        assert call(server, "DELETE", f"/v1/adapters/{name}").status_code == 200
    assert server.metric("loramux_adapter_lookups_total", tier="device", result="miss") > 5


def test_another_process_changes_what_is_served(server: RealServer, place: Path) -> None:
    """A tool that works on the store's directory, as `loramux adapters restore` does."""
    version = put(server, place, 11, "mine")
    answer(server, "mine")
    device = server.metric("loramux_adapters_device")
    backup = place / "backup.tar.gz"
    assert cli.main(["adapters", "backup", str(backup), "--adapter-dir", str(server.store)], {}) == 0
    tool = AdapterStore(server.store, owner=False)
    tool.delete("mine")
    tool.close()
    reply = call(server, "POST", "/v1/completions", json={"model": "mine", "prompt": "x", "max_tokens": 1})
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "model_not_found")
    eventually(lambda: server.metric("loramux_adapters_device"), device - 1, 5)
    eventually(lambda: (server.store / "versions" / version).exists(), False, 5)
    assert cli.main(["adapters", "restore", str(backup), "--adapter-dir", str(server.store)], {}) == 0
    assert answer(server, "mine")[0] == version
    call(server, "DELETE", "/v1/adapters/mine")


def test_damage_is_named_the_rest_serves_and_an_upload_heals(server: RealServer, place: Path) -> None:
    version = put(server, place, 21, "rotten")
    before = answer(server, "rotten")
    put(server, place, 22, "rotten")
    old = f"rotten@{version[:8]}"
    eventually(lambda: call(server, "GET", "/v1/adapters/rotten").json()["versions"][1]["tier"], "disk")
    weights = server.store / "versions" / version / "adapter_model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    body = {"model": old, "prompt": "x", "max_tokens": 1}
    first = call(server, "POST", "/v1/completions", json=body)
    assert (first.status_code, first.json()["error"]["code"]) == (500, "adapter_corrupt")
    shown = call(server, "GET", "/v1/adapters/rotten").json()
    assert [one["corrupt"] for one in shown["versions"]] == [False, True] and not shown["corrupt"]
    reply = call(server, "POST", "/v1/completions", json=body)
    assert (reply.status_code, reply.json()["error"]["code"]) == (500, "adapter_corrupt")
    assert call(server, "POST", "/v1/adapters/rotten/rollback").json()["error"]["code"] == "adapter_corrupt"
    assert server.metric("loramux_adapter_versions_corrupt") == 1
    assert any(version[:12] in line and "damaged" in line for line in server.lines)
    answer(server, "rotten")
    answer(server, BASE)
    assert server.upload("rotten", place / "files-21").json()["outcome"] == "updated"
    assert answer(server, "rotten") == before
    assert server.metric("loramux_adapter_versions_corrupt") == 0
    call(server, "DELETE", "/v1/adapters/rotten")


def test_a_watched_directory_and_vllms_calls_are_ways_in(server: RealServer, place: Path) -> None:
    make_adapter(place / "watched" / ".new", 0, 31)
    (place / "watched" / ".new").rename(place / "watched" / "seen")
    eventually(lambda: "seen" in server.adapters(), True, 20)
    first = answer(server, "seen")
    loaded = call(server, "POST", "/v1/load_lora_adapter", json={"lora_name": "vllm", "lora_path": "watched/seen"})
    assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'vllm' added successfully.")
    assert answer(server, "vllm") == first
    make_adapter(place / "watched" / "seen", 0, 32)
    eventually(lambda: server.adapters()["seen"]["version"] != first[0], True, 20)
    assert answer(server, "seen")[1] != first[1]
    (place / "watched" / "bad").mkdir()
    for path in (place / "watched" / "seen").iterdir():
        shutil.copy(path, place / "watched" / "bad")
    (place / "watched" / "bad" / "adapter_config.json").write_text("{}")
    eventually(lambda: server.metric("loramux_watch_failures_total"), 1, 20)
    shutil.rmtree(place / "watched")
    (place / "watched").mkdir()
    for name in ("vllm", "seen"):
        gone = call(server, "POST", "/v1/unload_lora_adapter", json={"lora_name": name})
        assert gone.text == f"Success: LoRA adapter '{name}' removed successfully."
    for url in ("http://127.0.0.1:1/x", "file:///etc/passwd", "../secret"):
        reply = call(server, "POST", "/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": url})
        assert (reply.status_code, reply.json()["error"]["type"]) == (400, "InvalidUserInput")


def test_replaced_under_load_no_answer_is_from_a_wrong_version(server: RealServer, place: Path) -> None:
    versions = {put(server, place, seed, "churn") for seed in (41, 42)}
    expected = {answer(server, f"churn@{version[:8]}") for version in versions}
    stop = threading.Event()
    seen: list[tuple[str, str]] = []

    def ask() -> None:
        while not stop.is_set():
            seen.append(answer(server, "churn"))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(30):
        status = call(server, "POST", "/v1/adapters/churn/rollback").status_code
        assert status in (200, 409)
        if status == 409:
            put(server, place, 42, "churn")
    stop.set()
    for thread in threads:
        thread.join()
    assert seen and set(seen) <= expected
