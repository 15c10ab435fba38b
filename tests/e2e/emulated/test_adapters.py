"""Adapters of a server on a late device: replaced while they answer, deleted, evicted and loaded again beside steps."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from e2e.emulated.conftest import Place
from support.emulated_server import EmulatedServer
from support.real_server import eventually
from support.replies import Answer, streamed, whole

BODY: dict[str, Any] = {"prompt": "The keeper", "max_tokens": 4, "temperature": 0, "logprobs": 0, "ignore_eos": True}
LARGE = {f"large-{index}": index for index in range(4)}  # of rank 128: half of the adapters' memory each


def asked(server: EmulatedServer, name: str) -> Answer:
    return whole(server, BODY | {"model": name})


def test_a_reply_ends_on_its_version_while_a_new_one_takes_its_name(server: EmulatedServer, place: Place) -> None:
    old = server.upload("changing", place.adapter("changing", rank=16, seed=1)).json()["version"]
    body = BODY | {"model": "changing", "max_tokens": 24}
    alone, new = whole(server, body), ""

    def replace(response: httpx.Response) -> None:
        nonlocal new
        uploaded = server.upload("changing", place.adapter("changing", rank=16, seed=2))
        assert uploaded.status_code in (200, 201), uploaded.text
        new = uploaded.json()["version"]

    during = streamed(server, body, replace)
    assert (during.version, during.reply) == (old, alone.reply)
    after = asked(server, "changing")
    assert after.version == new != old and after.reply.logprobs != alone.reply.logprobs[:4]


def test_what_is_deleted_leaves_the_device(server: EmulatedServer, place: Place) -> None:
    server.upload("gone", place.adapter("gone", rank=8, seed=9))
    asked(server, "gone")
    assert server.adapters()["gone"]["tier"] == "device"
    resident = server.metric("loramux_adapters_device")
    with server.client() as client:
        assert client.delete("/v1/adapters/gone").status_code == 200
        eventually(lambda: server.metric("loramux_adapters_device"), resident - 1, 20)
        response = client.post("/v1/completions", json=BODY | {"model": "gone"})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


def test_more_adapters_than_fit_take_turns_and_answer_as_alone(server: EmulatedServer, place: Place) -> None:
    for name, seed in LARGE.items():
        response = server.upload(name, place.adapter(name, rank=128, seed=seed))
        assert response.status_code == 201, response.text
    alone = {name: asked(server, name) for name in LARGE}
    assert len({answer.reply.logprobs for answer in alone.values()}) == len(LARGE)
    misses = server.metric("loramux_adapter_lookups_total", tier="device", result="miss")
    with ThreadPoolExecutor(len(LARGE)) as pool:
        together = dict(zip(LARGE, pool.map(lambda name: asked(server, name), LARGE), strict=True))
    assert together == alone
    assert server.metric("loramux_adapter_lookups_total", tier="device", result="miss") > misses, "nobody was evicted"


def test_steps_and_loads_take_no_more_memory_of_the_device(server: EmulatedServer, place: Place) -> None:
    server.upload("frugal", place.adapter("frugal", rank=32, seed=4))
    asked(server, "frugal")
    before, held = server.device.allocations, server.device.memory().held
    server.upload("frugal-2", place.adapter("frugal", rank=32, seed=5))
    asked(server, "frugal-2")
    asked(server, "tiny")
    assert (server.device.allocations, server.device.memory().held) == (before, held)
