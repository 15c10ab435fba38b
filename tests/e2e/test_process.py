"""The life of the process: keys from its environment, an orderly end, a restart on the same store."""

from __future__ import annotations

import gzip
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.adapter_files import write_adapter
from support.real_adapters import ADAPTERS, make_adapter
from support.real_server import BASE, RealServer, running_server
from support.replies import Answer, streamed, whole

API_KEY, ADMIN_KEY = "key-of-the-callers", "key-of-the-operator"
SMALL = [ADAPTERS[0], ADAPTERS[6]]  # under 2 MiB
FLAGS = ["--adapter-memory-mib", "32", "--device-memory-mib", "96", "--host-cache-mib", "32"]
PAGE = "https://page.example"
STREAMS = 8
TOKENS = 32


def body(index: int, max_tokens: int = TOKENS) -> dict[str, Any]:
    model = [*SMALL, BASE][index % 3]
    asked = {"model": model, "prompt": f"Chapter {index}:", "max_tokens": max_tokens, "ignore_eos": True}
    return asked | {"temperature": 0.8, "seed": index, "logprobs": 0}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept-store")


@pytest.fixture(scope="module")
def first_life(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    """With keys, two adapters and low limits. Tests run in order; the first that needs `ending` ends it."""
    limits = ["--max-upload-mib", "2", "--max-num-seqs", "8", "--max-waiting", "8"]
    keys = {"LORAMUX_API_KEY": API_KEY, "LORAMUX_ADMIN_KEY": ADMIN_KEY}
    files = tmp_path_factory.mktemp("small")
    with running_server(store, *limits, *FLAGS, environ=keys) as server:
        server.key = ADMIN_KEY
        for name in SMALL:
            response = server.upload(name, make_adapter(files / name, ADAPTERS.index(name)))
            assert response.status_code == 201, response.text
        server.key = API_KEY
        yield server


@dataclass
class Ending:
    """What clients saw of an orderly end that began in the middle of eight streams."""

    adapters: dict[str, Any]  # before it
    alone: Answer  # body(0), before it
    answers: list[Answer]
    refused: list[httpx.Response]  # on a connection that was open before, on a new one, and streamed
    ready: httpx.Response
    health: httpx.Response
    exit_code: int
    lines: list[str]


@pytest.fixture(scope="module")
def ending(first_life: RealServer) -> Ending:
    server = first_life
    adapters, alone = server.adapters(), whole(server, body(0))
    begun = threading.Barrier(STREAMS + 1)
    with server.client() as open_before, ThreadPoolExecutor(STREAMS + 1) as pool:
        assert open_before.get("/ready").status_code == 200
        streams = [
            pool.submit(streamed, server, body(index), lambda response: _wait(begun)) for index in range(STREAMS)
        ]
        _wait(begun)
        exit_code = pool.submit(server.terminate)
        until_not_ready(open_before)
        refused = [open_before.post("/v1/completions", json=body(0))]
        with server.client() as fresh:
            refused += [fresh.post("/v1/completions", json=body(0) | {"stream": stream}) for stream in (False, True)]
        ready, health = open_before.get("/ready"), open_before.get("/health")
        assert not any(stream.done() for stream in streams), "the streams were too short to tell"
        answers = [stream.result() for stream in streams]
        return Ending(adapters, alone, answers, refused, ready, health, exit_code.result(), server.lines)


@pytest.fixture(scope="module")
def second_life(ending: Ending, store: Path) -> Iterator[RealServer]:
    reached = ["--cors-origins", PAGE, "--allowed-hosts", "box.local"]
    with running_server(store, "--shutdown-timeout", "1", *reached, *FLAGS) as server:
        yield server


def _wait(barrier: threading.Barrier) -> None:
    barrier.wait(60)


def until_not_ready(client: httpx.Client) -> None:
    deadline = time.monotonic() + 5
    while client.get("/ready").status_code == 200:
        assert time.monotonic() < deadline, "SIGTERM was not noticed"
        time.sleep(0.01)


def test_the_key_decides_who_may_call(first_life: RealServer) -> None:
    def status(method: str, path: str, key: str, **more: Any) -> int:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return httpx.request(method, first_life.url + path, headers=headers, timeout=60, **more).status_code

    calls: list[tuple[str, str, dict[str, Any]]] = [
        ("POST", "/v1/completions", {"json": body(2, 1)}),
        ("GET", "/v1/models", {}),
        ("GET", "/v1/adapters", {}),
        ("GET", "/metrics", {}),
    ]
    for method, path, more in calls:
        assert [status(method, path, key, **more) for key in ("", "wrong", API_KEY, ADMIN_KEY)] == [401, 401, 200, 200]
    for method, path in (("DELETE", "/v1/adapters/nobody"), ("PUT", "/v1/adapters/nobody")):
        allowed = 404 if method == "DELETE" else 400
        found = [status(method, path, key) for key in ("", "wrong", API_KEY, ADMIN_KEY)]
        assert found == [401, 401, 403, allowed]
    for path in ("/health", "/ready"):
        assert status("GET", path, "") == 200
    assert status("GET", "/docs", "") in (401, 404)
    refused = httpx.get(first_life.url + "/v1/models", headers={"host": "x/health?"})
    assert refused.status_code in (400, 401)
    assert httpx.get(first_life.url + "/v1/models").headers["www-authenticate"] == "Bearer"


def test_keys_are_not_shown(first_life: RealServer) -> None:
    printed = "\n".join(first_life.lines)
    assert API_KEY not in printed and ADMIN_KEY not in printed
    arguments = Path(f"/proc/{first_life.process.pid}/cmdline").read_text()
    assert API_KEY not in arguments


def test_an_upload_over_the_limit_is_cut_off(first_life: RealServer, tmp_path: Path) -> None:
    headers = {"authorization": f"Bearer {ADMIN_KEY}"}
    directory = write_adapter(tmp_path / "large", {"lm_head": (576, 49152)}, rank=16)
    weights = (directory / "adapter_model.safetensors").read_bytes()
    assert len(weights) > 3_000_000
    files = {"config": (directory / "adapter_config.json").read_bytes(), "weights": weights}
    response = httpx.put(first_life.url + "/v1/adapters/large", files=files, headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "adapter_too_large")
    assert "2097152" in response.json()["error"]["message"]
    assert first_life.adapters().keys() == set(SMALL)
    assert not list((first_life.store / "staging").iterdir())


def test_a_full_server_sends_the_next_one_away(first_life: RealServer) -> None:
    """Eight run and seven wait for one base, a place is left to others; some of sixty are told when to try again."""

    def ask(index: int) -> httpx.Response:
        with first_life.client() as client:
            return client.post("/v1/completions", json=body(index, 8))

    with ThreadPoolExecutor(60) as pool:
        responses = list(pool.map(ask, range(60)))
    refused = [response for response in responses if response.status_code != 200]
    assert 0 < len(refused) <= 60 - 8
    for response in refused:
        assert (response.status_code, response.json()["error"]["code"]) == (503, "server_busy"), response.text
        assert int(response.headers["retry-after"]) >= 1


def test_sigterm_lets_running_streams_finish(ending: Ending) -> None:
    assert len(ending.answers) == STREAMS
    for answer in ending.answers:
        assert (answer.reply.finish_reason, len(answer.reply.tokens), answer.reply.is_done) == ("length", TOKENS, True)
    assert ending.answers[0] == ending.alone
    assert ending.exit_code == 0
    assert ending.lines[-1] == "stopped"
    assert not any("Traceback" in line for line in ending.lines)


def test_further_hosts_and_pages_are_let_in_where_settings_name_them(second_life: RealServer) -> None:
    def get(host: str) -> httpx.Response:
        return httpx.get(second_life.url + "/v1/models/", headers={"host": host, "origin": PAGE})

    assert [get(host).status_code for host in ("box.local", "box.local:8000", "other.local")] == [200, 200, 403]
    assert get("box.local").headers["access-control-allow-origin"] == PAGE
    assert "--allowed-hosts" in get("other.local").json()["error"]["message"]


def test_a_body_may_be_packed_and_connections_are_measured(second_life: RealServer) -> None:
    packed = gzip.compress(json.dumps(body(2, 1)).encode())
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    assert httpx.post(second_life.url + "/v1/completions", content=packed, headers=headers).status_code == 200
    assert second_life.metric("loramux_connections_cap") > 0
    assert second_life.metric("loramux_connections_busy") >= 1
    assert second_life.metric("loramux_connections_cut_total") == 0


def test_sigterm_refuses_new_requests(ending: Ending) -> None:
    for response in ending.refused:
        assert (response.status_code, response.json()["error"]["code"]) == (503, "server_draining")
        assert int(response.headers["retry-after"]) >= 1
    assert ending.ready.status_code == 503
    assert ending.health.status_code == 200, "a server that drains must not be restarted"


def test_adapters_and_their_answers_survive_a_restart(ending: Ending, second_life: RealServer) -> None:
    kept = ("version", "rank", "target_modules", "bytes", "created", "updated")
    adapters = second_life.adapters()
    assert adapters.keys() == ending.adapters.keys()
    for name, adapter in adapters.items():
        assert {field: adapter[field] for field in kept} == {field: ending.adapters[name][field] for field in kept}
    assert whole(second_life, body(0)) == ending.alone


def test_what_outlasts_the_shutdown_timeout_is_told_so(second_life: RealServer) -> None:
    """Last: it ends the second life."""
    with second_life.client() as client, ThreadPoolExecutor(1) as pool:
        with client.stream("POST", "/v1/completions", json=body(1, 1500) | {"stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            began = time.monotonic()
            exit_code = pool.submit(second_life.terminate)
            rest = [line for line in lines if line]
        assert exit_code.result() == 0
        assert time.monotonic() - began < 15
    assert '"code": "engine_error"' in rest[-1] and "[DONE]" not in rest[-1]
    assert '"finish_reason": "length"' not in "".join(rest)
    assert second_life.lines[-1] == "stopped"
    assert not any("Traceback" in line for line in second_life.lines)
