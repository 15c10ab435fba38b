"""Uploads that are tried out by a real server before they are stored."""

from __future__ import annotations

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from support.adapter_files import write_adapter
from support.real_adapters import ADAPTERS, LINEARS
from support.real_server import BASE, RealServer


def put(server: RealServer, name: str, directory: Path, query: str = "") -> httpx.Response:
    parts = {"config": "adapter_config.json", "weights": "adapter_model.safetensors", "fingerprint": "fingerprint.json"}
    files = {part: (directory / file).read_bytes() for part, file in parts.items() if (directory / file).exists()}
    with server.client() as client:
        return client.put(f"/v1/adapters/{name}{query}", files=files)


def test_an_adapter_without_effect_is_refused_unless_that_is_wanted(server: RealServer, tmp_path: Path) -> None:
    directory = write_adapter(tmp_path / "idle", LINEARS, targets=["q_proj", "v_proj"], std_b=0.0)
    refused = put(server, "idle", directory)
    assert refused.status_code == 422 and "no effect" in refused.json()["error"]["message"]
    assert "idle" not in server.adapters()
    assert put(server, "idle", directory, "?validate_only=true").status_code == 422
    assert put(server, "idle", directory, "?allow_no_effect=true").status_code == 201
    assert server.metric("loramux_adapter_proofs_total", effect="none", fingerprint="none") == 3
    with server.client() as client:
        client.delete("/v1/adapters/idle")


def test_a_fingerprint_that_does_not_replay_is_refused_unless_forced_and_the_outcome_is_shown(
    server: RealServer, adapter_dirs: dict[str, Path], tmp_path: Path
) -> None:
    directory = tmp_path / "made-up"
    shutil.copytree(adapter_dirs[ADAPTERS[0]], directory)
    known = server.adapters()[ADAPTERS[0]]
    witness = {"text": "x", "ids": [1, 2, 3], "reply": "y", "tokens": [7, 8], "logprobs": [-0.1, -0.2]}
    with server.client() as client:
        base_id = _base_id(client, directory)
    fingerprint: dict[str, Any] = {"format": 1, "numerics_id": "elsewhere", "base_id": base_id}
    fingerprint |= {"version": known["version"], "prompts": [witness]}
    (directory / "fingerprint.json").write_text(json.dumps(fingerprint))
    refused = put(server, "made-up", directory)
    assert refused.status_code == 422 and "greedy tokens differ" in refused.json()["error"]["message"], refused.text
    forced = put(server, "made-up", directory, "?force=true")
    assert forced.status_code == 201 and forced.json()["fingerprint"] == "mismatch"
    assert server.adapters()["made-up"]["versions"][0]["fingerprint"] == "mismatch"
    assert known["fingerprint"] == "none"
    with server.client() as client:
        client.delete("/v1/adapters/made-up")


def test_an_upload_is_loaded_from_disk_by_nobody_and_stays_in_host_memory_only_if_it_is_published(
    server: RealServer, tmp_path: Path
) -> None:
    directory = write_adapter(tmp_path / "once", LINEARS, targets=["q_proj"], seed=78)

    def held() -> tuple[float, float]:
        loads = server.metric("loramux_adapter_load_seconds_count", tier="host")
        return server.metric("loramux_adapters_host"), loads

    adapters, loads = held()
    assert put(server, "once", directory, "?validate_only=true").status_code == 200
    assert held() == (adapters, loads)
    assert put(server, "once", directory).status_code == 201
    assert held() == (adapters + 1, loads)
    with server.client() as client:
        client.delete("/v1/adapters/once")
    server.wait_for("loramux_adapters_host", adapters)


def _base_id(client: httpx.Client, directory: Path) -> str:
    """The server tells it to whoever names another base."""
    config = json.loads((directory / "adapter_config.json").read_text()) | {"loramux_base_id": "0" * 64}
    files = {"config": json.dumps(config), "weights": (directory / "adapter_model.safetensors").read_bytes()}
    reply = client.put("/v1/adapters/other-base?validate_only=true", files=files)
    assert reply.status_code == 409, reply.text
    return str(reply.json()["error"]["served_base_id"])


def test_uploads_are_proved_while_every_seat_is_taken(server: RealServer, tmp_path: Path) -> None:
    """The server's own work waits a while for a gap, and is then served like a request."""
    directory = write_adapter(tmp_path / "late", LINEARS, targets=["q_proj"], seed=77)
    body = {"model": BASE, "prompt": "Once upon a time", "max_tokens": 100, "ignore_eos": True}
    with ThreadPoolExecutor(40) as pool, server.client() as client:
        crowd = [pool.submit(client.post, "/v1/completions", json=body) for _ in range(80)]
        time.sleep(1.0)
        assert not all(reply.done() for reply in crowd)
        assert put(server, "late", directory).status_code == 201
        assert {reply.result().status_code for reply in crowd} == {200}
        client.delete("/v1/adapters/late")
