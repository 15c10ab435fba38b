"""Adapters are loaded, evicted, replaced and deleted while streams decode; every stream stays what it is alone.

Ten adapters share device memory that holds 64 rank rows and host memory that holds a third of their bytes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from support.real_adapters import ADAPTERS, make_adapter
from support.real_server import BASE, RealServer, eventually, running_server
from support.replies import Answer, Reply, streamed, whole

STEADY = [ADAPTERS[index] for index in (0, 1, 4, 5, 6, 7, 8)]  # 168 rows of slots, 33 MB
REPLACED = [ADAPTERS[3], ADAPTERS[9]]
DELETED = ADAPTERS[2]
SEEDS = 3  # versions of each replaced adapter, one more than the store keeps
ROUNDS = 8  # streams of each thread that only streams
SHORT = "The lighthouse keeper opened the door and saw"
LONG = " ".join(f"{number} times seven is {number * 7}." for number in range(2, 12)) + " And so"  # prefilled in chunks


@pytest.fixture(scope="module")
def small_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    flags = ["--adapter-memory-mib", "48", "--host-cache-mib", "12", "--device-memory-mib", "144"]
    flags += ["--max-num-seqs", "8", "--max-batch-tokens", "48"]
    with running_server(tmp_path_factory.mktemp("small-store"), *flags) as server:
        yield server


def body(model: str) -> dict[str, Any]:
    """One request for each model: short and greedy, or in chunks and sampled."""
    during_a_change = model in (*REPLACED, DELETED)  # long enough for an upload to be over before it
    asked = {"model": model, "max_tokens": 64 if during_a_change else 10, "logprobs": 1, "ignore_eos": True}
    if model != BASE and ADAPTERS.index(model) % 2:
        return asked | {"prompt": LONG, "temperature": 0.9, "seed": 7}
    return asked | {"prompt": SHORT, "temperature": 0}


class Churn:
    """The server under test, what each version answers alone, and what was seen while everything changed."""

    def __init__(self, server: RealServer, directory: Path) -> None:
        self.server = server
        self.directory = directory
        self.alone: dict[str, Reply] = {}  # by version
        self.streams = 0
        self.overlapped = 0  # changes that were complete before the stream they might have disturbed
        self._lock = threading.Lock()

    def files(self, name: str, seed: int) -> Path:
        path = self.directory / f"{name}-{seed}"
        return path if path.exists() else make_adapter(path, ADAPTERS.index(name), seed)

    def put(self, name: str, seed: int, status: int) -> str:
        response = self.server.upload(name, self.files(name, seed))
        assert response.status_code == status, response.text
        version: str = response.json()["version"]
        return version

    def learn(self, model: str) -> None:
        """What its current version answers alone."""
        answer = whole(self.server, body(model))
        self.alone[answer.version] = answer.reply

    def check(self, answer: Answer) -> Answer:
        assert answer.reply == self.alone[answer.version]
        with self._lock:
            self.streams += 1
        return answer

    def stream(self, worker: int) -> None:
        """One after the other, adapter after adapter: with this little memory nearly each is a load and an eviction."""
        models = [*STEADY, *REPLACED, BASE]
        for count in range(ROUNDS):
            self.check(streamed(self.server, body(models[(4 * worker + count) % len(models)])))

    def during(self, model: str, change: Callable[[], object]) -> Answer:
        """The answer of a stream during which `change` happens."""
        changes: list[Future[object]] = []
        with ThreadPoolExecutor(1) as pool:
            answer = streamed(self.server, body(model), lambda response: changes.append(pool.submit(change)))
            with self._lock:
                self.overlapped += changes[0].done()
        changes[0].result()
        return self.check(answer)

    def replace(self, name: str) -> None:
        for seed in range(SEEDS):
            before = self.server.adapters()[name]["version"]
            old = self.during(name, partial(self.put, name, seed, 200))
            new = self.check(streamed(self.server, body(name)))
            assert old.version == before != new.version

    def delete(self) -> None:
        for _ in range(3):
            version = self.during(DELETED, self._delete).version
            with self.server.client() as client:
                gone = client.post("/v1/completions", json=body(DELETED))
            assert (gone.status_code, gone.json()["error"]["code"]) == (404, "model_not_found")
            assert self.put(DELETED, 0, 201) == version, "the same bytes are the same version"
            assert self.check(streamed(self.server, body(DELETED))).version == version

    def _delete(self) -> None:
        with self.server.client() as client:
            assert client.delete(f"/v1/adapters/{DELETED}").status_code == 200


def test_streams_do_not_notice_that_adapters_come_and_go(small_server: RealServer, tmp_path: Path) -> None:
    churn = Churn(small_server, tmp_path)
    churn.learn(BASE)
    for name in [*STEADY, DELETED]:
        churn.put(name, 0, 201)
        churn.learn(name)
    for name in REPLACED:
        for seed in range(SEEDS):
            churn.put(name, seed, 200 if seed else 201)
            churn.learn(name)
    assert len(set(churn.alone.values())) == len(churn.alone), "versions without effect prove nothing"
    before = small_server.scrape()

    with ThreadPoolExecutor(6) as pool:
        work = [pool.submit(churn.stream, worker) for worker in range(3)]
        work += [*(pool.submit(churn.replace, name) for name in REPLACED), pool.submit(churn.delete)]
        for done in work:
            done.result()

    assert churn.streams == 3 * ROUNDS + 2 * 2 * SEEDS + 2 * 3
    assert churn.overlapped >= 3, "changes should come while streams decode"

    def grown(name: str, **labels: str) -> float:
        return small_server.metric(name, **labels) - sum(
            value for key, value in before[name].items() if labels.items() <= dict(key).items()
        )

    eventually(lambda: grown("loramux_requests_total", outcome="length"), churn.streams)
    for name in ("loramux_requests_running", "loramux_requests_waiting", "loramux_kv_blocks_used"):
        small_server.wait_for(name, 0)
    assert grown("loramux_requests_total", outcome="error") == 0
    assert grown("loramux_slot_loads_total") > 15
    assert grown("loramux_adapter_evictions_total", tier="device") > 15
    assert grown("loramux_adapter_evictions_total", tier="host") > 8
    assert grown("loramux_adapter_load_seconds_count", tier="host") > 8
    assert small_server.metric("loramux_pool_bytes", pool="adapter_host") <= 12 * 2**20

    kept = {kept["version"] for adapter in small_server.adapters().values() for kept in adapter["versions"]}
    assert len(kept) == len(STEADY) + 2 * len(REPLACED) + 1
    files = small_server.store
    eventually(lambda: {path.name for path in (files / "versions").iterdir()}, kept)
    eventually(lambda: list((files / "staging").iterdir()), [])
    assert not any("Traceback" in line or "ERROR" in line for line in small_server.lines), small_server.lines
