"""Adapters that come from a hub when a request first names them: a real store and check, and a real hub in the end."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from loramux_adapters.base_info import BaseInfo
from loramux_adapters.errors import AdapterTooLarge
from loramux_adapters.lora.verify import Checked, check_adapter
from loramux_adapters.store.store import AdapterStore
from loramux_server.api.app import create_app
from loramux_server.errors import HubUnreachable, NotOnHub, RequestError, ServerBusy
from loramux_server.hub import repository
from loramux_server.hub.hub_name import HubName
from loramux_server.hub.repository import Fetched
from loramux_server.publishing.hub_adapters import FAILED_SECONDS, MAX_PENDING, HubAdapters
from support.adapter_files import TINY_LINEARS, as_hub_snapshot, write_adapter
from support.fake_hub import FakeHub, point_to, running_hub
from support.fakes_api import Server, make_server
from support.publishing import unproved

pytestmark = pytest.mark.anyio
BASE = BaseInfo("aa" * 32, TINY_LINEARS)
NAME = HubName("acme/spam")


def check(directory: Path, *, force: bool = False) -> Checked:
    return check_adapter(directory, BASE, 256, force=force)


@dataclass
class FakeFetch:
    """Gives a directory for each repository, or raises what stands in its place. `gate` is waited for."""

    answers: dict[str, Path | Exception]
    gate: threading.Event = field(default_factory=threading.Event)
    calls: list[str] = field(default_factory=list)
    began: threading.Event = field(default_factory=threading.Event)

    def __call__(self, name: HubName, *, limit: int, seconds: float, stop: threading.Event) -> Fetched:
        self.calls.append(str(name))
        self.began.set()
        while not self.gate.wait(0.01):
            if stop.is_set():
                raise HubUnreachable("the server stops")
        answer = self.answers[name.repository]
        if isinstance(answer, Exception):
            raise answer
        return Fetched(name, answer, "c0ffee" + "0" * 34)


class Scene:
    def __init__(self, root: Path, patterns: list[str], fetch: Any) -> None:
        self.now = 1000.0
        self.store = AdapterStore(root / "store", served_base_id=BASE.base_id)
        self.fetch = fetch
        self.hub = HubAdapters(
            self.store,
            unproved(self.store, check),
            patterns,
            fetch,
            limit=2**24,
            seconds=30.0,
            clock=lambda: self.now,
        )
        (root / "fake").mkdir()
        self.server: Server = make_server(root / "fake")
        self.server.app = create_app(replace(self.server.deps, store=self.store, hub=self.hub))

    async def ask(self, model: str, **body: Any) -> tuple[int, dict[str, Any]]:
        reply = await self.server.post("/v1/completions", {"model": model, "prompt": "hi", **body})
        return reply.status_code, reply.json()


def snapshot(root: Path, name: str = "spam", **options: Any) -> Path:
    adapter = write_adapter(root / "made" / name, TINY_LINEARS, targets=["q_proj"], rank=4, **options)
    return as_hub_snapshot(adapter, root / f"models--acme--{name}")


@pytest.fixture
def scenes(tmp_path: Path) -> Iterator[Callable[..., Scene]]:
    made: list[Scene] = []

    def make(answers: dict[str, Path | Exception], patterns: list[str] | None = None, *, held: bool = False) -> Scene:
        fetch = FakeFetch(answers)
        if not held:
            fetch.gate.set()
        scene = Scene(tmp_path, patterns or ["acme/*"], fetch)
        made.append(scene)
        return scene

    yield make
    for scene in made:
        scene.hub.stop()
        scene.store.close()


async def test_the_first_request_fetches_and_the_next_ones_find_it(
    scenes: Callable[..., Scene], tmp_path: Path
) -> None:
    scene = scenes({"acme/spam": snapshot(tmp_path)})
    scene.server.engine.replies["hub/acme/spam"] = b"ham"
    for _ in range(2):
        status, reply = await scene.ask("hub:acme/spam")
        assert status == 200, reply
        assert reply["model"] == "hub:acme/spam" and reply["choices"][0]["text"] == "ham"
    assert scene.fetch.calls == ["acme/spam"]
    (record,) = scene.store.records()
    assert record.name == "hub/acme/spam"
    assert record.notes == [f"fetched from acme/spam at commit c0ffee{'0' * 34}"]
    assert (await scene.ask("hub/acme/spam"))[0] == 200
    assert (await scene.ask(f"hub/acme/spam@{record.version[:12]}"))[0] == 200


async def test_revisions_are_adapters_of_their_own_and_sums_take_them(
    scenes: Callable[..., Scene], tmp_path: Path
) -> None:
    scene = scenes({"acme/spam": snapshot(tmp_path)})
    names = "hub/acme/spam+hub/acme/spam/v2"
    scene.server.engine.replies[names] = b"both"
    status, reply = await scene.ask(
        "tiny-base", adapters=[{"name": "hub:acme/spam"}, {"name": "hub:acme/spam@v2", "scale": 0.5}]
    )
    assert status == 200, reply
    assert scene.fetch.calls == ["acme/spam", "acme/spam@v2"]
    assert [record.name for record in scene.store.records()] == names.split("+")


async def test_requests_at_the_same_time_wait_for_one_fetch(scenes: Callable[..., Scene], tmp_path: Path) -> None:
    scene = scenes({"acme/spam": snapshot(tmp_path)}, held=True)
    scene.server.engine.replies["hub/acme/spam"] = b"ham"
    asked = [asyncio.create_task(scene.ask("hub:acme/spam")) for _ in range(8)]
    await asyncio.to_thread(scene.fetch.began.wait, 5)
    asked[0].cancel()  # one that leaves ends nobody else's
    scene.fetch.gate.set()
    replies = await asyncio.gather(*asked[1:])
    assert [status for status, _ in replies] == [200] * 7
    assert scene.fetch.calls == ["acme/spam"]


async def test_what_is_not_allowed_is_not_fetched(scenes: Callable[..., Scene], tmp_path: Path) -> None:
    scene = scenes({"acme/spam": snapshot(tmp_path)}, ["acme/ham", "other/*"])
    status, reply = await scene.ask("hub:acme/spam")
    assert status == 404 and reply["error"]["code"] == "model_not_found" and reply["error"]["param"] == "model"
    assert "is none of the repositories that this server may fetch (--hub-adapters)" in reply["error"]["message"]
    assert scene.fetch.calls == []


@pytest.mark.parametrize("model", ["hub:", "hub:spam", "hub:a/b/c", "hub:../b", "hub:acme/spam@", "hub:acme/archive"])
async def test_what_is_no_name_is_a_404(scenes: Callable[..., Scene], model: str) -> None:
    status, reply = await scenes({}).ask(model)
    assert status == 404 and "owner/name@revision" in reply["error"]["message"]


async def test_without_the_setting_nothing_is_fetched_and_what_is_there_is_served(
    scenes: Callable[..., Scene], tmp_path: Path
) -> None:
    scene = scenes({"acme/spam": snapshot(tmp_path)})
    await scene.hub.ready(NAME, None)
    scene.server.app = create_app(replace(scene.server.deps, store=scene.store))
    scene.server.engine.replies["hub/acme/spam"] = b"ham"
    assert (await scene.ask("hub:acme/spam"))[0] == 200
    assert (await scene.ask("hub:acme/eggs"))[0] == 404
    assert scene.fetch.calls == ["acme/spam"]


@pytest.mark.parametrize(
    ("failure", "status", "code", "says"),
    [
        (NotOnHub("acme/spam cannot be had from the hub: it is gated"), 404, "model_not_found", "it is gated"),
        (AdapterTooLarge(4096), 400, "adapter_rejected", "larger than the limit of 4096 bytes"),
        (HubUnreachable("acme/spam could not be fetched"), 503, "server_busy", "could not be fetched"),
    ],
)
async def test_a_failure_is_named_and_remembered_for_a_while(
    scenes: Callable[..., Scene], tmp_path: Path, failure: Exception, status: int, code: str, says: str
) -> None:
    scene = scenes({"acme/spam": failure})
    for _ in range(3):
        got, reply = await scene.ask("hub:acme/spam")
        assert got == status and reply["error"]["code"] == code and says in reply["error"]["message"]
    assert scene.fetch.calls == ["acme/spam"]
    scene.now += FAILED_SECONDS + 1
    scene.fetch.answers["acme/spam"] = snapshot(tmp_path)
    await scene.hub.ready(NAME, None)
    assert scene.fetch.calls == ["acme/spam"] * 2


async def test_what_cannot_be_served_here_says_why(scenes: Callable[..., Scene], tmp_path: Path) -> None:
    bad = snapshot(tmp_path, extra_config={"r": 5})
    scene = scenes({"acme/spam": bad})
    status, reply = await scene.ask("hub:acme/spam")
    assert status == 400 and reply["error"]["code"] == "adapter_rejected"
    assert "has rank 4 in the weights and 5 in the config" in reply["error"]["message"]
    assert "looked for again in 300 s" in reply["error"]["message"]
    assert scene.store.records() == []


async def test_an_adapter_of_another_base_is_refused(scenes: Callable[..., Scene], tmp_path: Path) -> None:
    scene = scenes({"acme/spam": snapshot(tmp_path, extra_config={"loramux_base_id": "bb" * 32})})
    with pytest.raises(RequestError, match="was made for base"):
        await scene.hub.ready(NAME, None)


async def test_a_link_out_of_the_model_in_the_cache_is_not_followed(
    scenes: Callable[..., Scene], tmp_path: Path
) -> None:
    directory = snapshot(tmp_path)
    (tmp_path / "secret").write_text("{}")
    (directory / "card.json").symlink_to(tmp_path / "secret")
    with pytest.raises(RequestError, match="leads out of"):
        await scenes({"acme/spam": directory}).hub.ready(NAME, None)


async def test_who_waits_too_long_is_told_to_come_again(scenes: Callable[..., Scene], tmp_path: Path) -> None:
    scene = scenes({"acme/spam": snapshot(tmp_path)}, held=True)
    with pytest.raises(ServerBusy, match="still being fetched"):
        await scene.hub.ready(NAME, 0.05)
    scene.fetch.gate.set()
    await scene.hub.ready(NAME, 10.0)
    assert scene.fetch.calls == ["acme/spam"]


async def test_only_so_many_wait_at_a_time(scenes: Callable[..., Scene]) -> None:
    scene = scenes({}, held=True)
    names = [HubName(f"acme/a{index}") for index in range(MAX_PENDING + 1)]
    for name in names[:-1]:
        with pytest.raises(ServerBusy, match="still being fetched"):
            await scene.hub.ready(name, 0.0)
    with pytest.raises(ServerBusy, match="too many adapters are being fetched"):
        await scene.hub.ready(names[-1], 0.0)


async def test_a_stop_ends_fetches_and_who_waits_is_told(scenes: Callable[..., Scene]) -> None:
    scene = scenes({}, held=True)
    waiting = [asyncio.create_task(scene.hub.ready(HubName(f"acme/a{index}"), None)) for index in range(4)]
    await asyncio.to_thread(scene.fetch.began.wait, 5)
    await asyncio.sleep(0.1)
    await asyncio.to_thread(scene.hub.stop)
    ends = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(end, ServerBusy) and "server stops" in str(end) for end in ends)


async def test_a_deleted_one_is_fetched_again(scenes: Callable[..., Scene], tmp_path: Path) -> None:
    scene = scenes({"acme/spam": snapshot(tmp_path)})
    await scene.hub.ready(NAME, None)
    scene.store.delete("hub/acme/spam")
    await scene.hub.ready(NAME, None)
    assert scene.fetch.calls == ["acme/spam"] * 2


async def test_tokens_are_counted_for_an_adapter_of_a_hub_too(scenes: Callable[..., Scene], tmp_path: Path) -> None:
    scene = scenes({"acme/spam": snapshot(tmp_path)})
    reply = await scene.server.post("/tokenize", {"model": "hub:acme/spam", "prompt": "hi"})
    assert reply.status_code == 200 and scene.fetch.calls == ["acme/spam"]


@pytest.fixture
def real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Scene, FakeHub]]:
    with running_hub() as hub:
        point_to(hub, monkeypatch.setenv, tmp_path / "home")
        scene = Scene(tmp_path, ["acme/*"], repository.fetch)
        yield scene, hub
        scene.hub.stop()
        scene.store.close()


async def test_from_a_hub_over_http_to_a_reply(real: tuple[Scene, FakeHub], tmp_path: Path) -> None:
    scene, hub = real
    adapter = write_adapter(tmp_path / "adapter", TINY_LINEARS, targets=["q_proj"], rank=4)
    commit = hub.add("acme/spam", adapter)
    scene.server.engine.replies["hub/acme/spam"] = b"ham"
    async with scene.server.client(headers={"authorization": "Bearer sk-callers-own"}) as client:
        asked = [client.post("/v1/completions", json={"model": "hub:acme/spam", "prompt": "hi"}) for _ in range(4)]
        replies = await asyncio.gather(*asked)
    assert [reply.status_code for reply in replies] == [200] * 4
    assert hub.count("GET", "adapter_model.safetensors") == 1
    assert scene.store.record("hub/acme/spam").notes == [f"fetched from acme/spam at commit {commit}"]
    assert "sk-callers-own" not in json.dumps(hub.seen)
    status, reply = await scene.ask("hub:acme/none")
    assert status == 404 and "there is no such repository" in reply["error"]["message"]
