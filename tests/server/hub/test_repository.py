"""Adapters fetched from a hub that answers over HTTP on this machine, and all that can be wrong with one."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from loramux_adapters.artifact.config import SOURCE_KEY
from loramux_adapters.artifact.format import digest_of, read_config
from loramux_adapters.errors import AdapterRejected, AdapterTooLarge
from loramux_server.errors import HubUnreachable, NotOnHub
from loramux_server.hub import repository
from loramux_server.hub.hub_name import HubName
from loramux_server.hub.repository import Fetched, fetch, put_label
from loramux_server.publishing.adapter_files import copy_adapter
from support.adapter_files import TINY_LINEARS, write_adapter
from support.fake_hub import FakeHub, point_to, running_hub

NAME = HubName("acme/spam")
EXTRAS = {"README.md": b"# spam", "training_args.bin": b"\x80pickle", "tokenizer_config.json": b"{}"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with running_hub() as hub:
        point_to(hub, monkeypatch.setenv, tmp_path / "home")
        yield hub


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", TINY_LINEARS, targets=["q_proj"], rank=4)


def files_of(adapter: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in adapter.iterdir()}


def copied(fetched: Fetched, target: Path) -> Path:
    target.mkdir()
    copy_adapter(fetched.directory, (), target, limit=None)
    return target


def test_an_adapter_is_fetched_and_nothing_else(hub: FakeHub, adapter: Path, tmp_path: Path) -> None:
    commit = hub.add("acme/spam", files_of(adapter) | EXTRAS)
    told: list[tuple[int, int]] = []
    fetched = fetch(NAME, progress=lambda done, total: told.append((done, total)))
    assert (fetched.commit, fetched.cached) == (commit, False)
    copy = copied(fetched, tmp_path / "copy")
    assert {path.name for path in copy.iterdir()} == {*files_of(adapter), "tokenizer_config.json"}
    assert digest_of(read_config(copy), copy) == digest_of(read_config(adapter), adapter)
    assert hub.count("GET", "training_args.bin") == hub.count("GET", "README.md") == 0
    size = sum(map(len, files_of(adapter).values())) + 2
    assert told[-1] == (size, size)


def test_a_revision_is_a_branch_or_a_commit(hub: FakeHub, adapter: Path, tmp_path: Path) -> None:
    old = hub.add("acme/spam", files_of(adapter))
    other = write_adapter(tmp_path / "other", TINY_LINEARS, targets=["q_proj"], rank=4, seed=1)
    new = hub.add("acme/spam", files_of(other))
    trial = hub.add("acme/spam", files_of(other) | {"card.json": b"{}"}, revision="trial")
    assert fetch(NAME).commit == new
    assert fetch(HubName("acme/spam", "trial")).commit == trial
    assert fetch(HubName("acme/spam", old)).commit == old
    assert fetch(NAME).directory.name == new


def test_what_is_in_the_cache_is_not_fetched_again(hub: FakeHub, adapter: Path) -> None:
    hub.add("acme/spam", adapter)
    for _ in range(2):
        fetch(NAME)
    assert hub.count("GET", "adapter_model.safetensors") == 1


@pytest.mark.parametrize("how", ["offline", "away"])
def test_without_the_hub_the_cache_serves(
    hub: FakeHub, adapter: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    commit = hub.add("acme/spam", adapter)
    fetch(NAME)
    seen = len(hub.seen)
    if how == "offline":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    else:
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    fetched = fetch(NAME)
    assert (fetched.commit, fetched.cached) == (commit, True) and len(hub.seen) == seen


def test_offline_is_said_where_the_cache_has_nothing(
    hub: FakeHub, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("acme/spam", adapter)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubUnreachable, match="HF_HUB_OFFLINE is set, and the hub's cache"):
        fetch(NAME)
    assert hub.seen == []


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (HubName("acme/none"), "there is no such repository, or it is private"),
        (HubName("acme/spam", "nope"), "it has no revision nope"),
        (HubName("acme/gated"), "it is gated: accept its terms on the hub, and set HF_TOKEN"),
    ],
)
def test_what_cannot_be_had_is_said(hub: FakeHub, adapter: Path, name: HubName, says: str) -> None:
    hub.add("acme/spam", adapter)
    hub.add("acme/gated", adapter)
    hub.repositories["acme/gated"].gated = True
    with pytest.raises(NotOnHub, match=says):
        fetch(name)


def test_the_operators_token_opens_a_gated_one_and_goes_nowhere_else(
    hub: FakeHub, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", hub.token)
    monkeypatch.setenv("LORAMUX_API_KEY", "sk-callers-own")
    hub.add("acme/spam", adapter)
    hub.repositories["acme/spam"].gated = True
    with running_hub(FakeHub(repositories=hub.repositories)) as elsewhere:
        hub.cdn = elsewhere.url.replace("127.0.0.1", "localhost")
        fetch(NAME)
    assert [path for _, path, _ in elsewhere.seen if path.startswith("/cdn/")]
    assert all("authorization" not in headers for _, _, headers in elsewhere.seen)
    assert "sk-callers-own" not in json.dumps([*hub.seen, *elsewhere.seen])


def test_a_repository_that_moved_is_followed(hub: FakeHub, adapter: Path) -> None:
    commit = hub.add("acme/new-name", adapter)
    hub.moved["acme/spam"] = "acme/new-name"
    assert fetch(NAME).commit == commit


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"adapter_config.json": b"{}", "adapter_model.bin": b"\x80"}, "adapter_model.bin is a pickle"),
        ({"adapter_config.json": b"{}"}, "holds no adapter_model.safetensors"),
        ({"config.json": b"{}", "model.safetensors": b""}, "a whole model and no adapter"),
        ({"lora.gguf": b"GGUF"}, "but lora.gguf: download it, and .* `loramux adapters convert`"),
        ({"best/adapter_config.json": b"{}"}, "but in best/: download that directory"),
        ({"README.md": b""}, "holds no adapter_config.json"),
    ],
)
def test_what_is_no_adapter_is_refused_by_name(hub: FakeHub, files: dict[str, bytes], says: str) -> None:
    hub.add("acme/spam", files)
    with pytest.raises(AdapterRejected, match=says):
        fetch(NAME)
    assert hub.count("GET", ".bin") == hub.count("GET", ".gguf") == 0


def test_too_large_is_refused_before_it_is_fetched(hub: FakeHub, adapter: Path) -> None:
    hub.add("acme/spam", adapter)
    with pytest.raises(AdapterTooLarge):
        fetch(NAME, limit=4096)
    assert hub.count("GET", "adapter_model.safetensors") == 0


def test_a_hub_that_lies_about_sizes_is_stopped(hub: FakeHub, adapter: Path) -> None:
    hub.add("acme/spam", adapter)
    hub.told_sizes["adapter_model.safetensors"] = 10
    with pytest.raises(AdapterTooLarge):
        fetch(NAME, limit=4096)


def test_a_file_that_is_cut_short_is_not_taken(hub: FakeHub, adapter: Path) -> None:
    hub.add("acme/spam", adapter)
    hub.cut["adapter_model.safetensors"] = 1000
    with pytest.raises(HubUnreachable, match="could not be fetched"):
        fetch(NAME, seconds=20)
    hub.cut.clear()
    fetched = fetch(NAME)
    assert (fetched.directory / "adapter_model.safetensors").read_bytes() == (
        adapter / "adapter_model.safetensors"
    ).read_bytes()


def test_a_slow_hub_is_given_up(hub: FakeHub, adapter: Path) -> None:
    hub.add("acme/spam", adapter)
    hub.pause, hub.piece = 0.2, 16
    began = time.monotonic()
    with pytest.raises(HubUnreachable, match="did not come from the hub within 3 s"):
        fetch(NAME, seconds=3)
    assert time.monotonic() - began < 10


def test_a_fetch_is_ended_at_once(hub: FakeHub, adapter: Path) -> None:
    hub.add("acme/spam", adapter)
    hub.hold = threading.Event()
    stop = threading.Event()
    threading.Timer(0.5, stop.set).start()
    began = time.monotonic()
    with pytest.raises(HubUnreachable, match="the server stops"):
        fetch(NAME, stop=stop)
    assert time.monotonic() - began < 5


def test_a_broken_hub_is_unreachable(hub: FakeHub, adapter: Path) -> None:
    hub.add("acme/spam", adapter)
    hub.broken = 418
    with pytest.raises(HubUnreachable, match="could not be fetched"):
        fetch(NAME, seconds=30)


def test_a_label_says_where_a_version_is_from_and_changes_no_digest(adapter: Path) -> None:
    before = digest_of(read_config(adapter), adapter)
    put_label(adapter, "acme/spam at commit 12ab")
    config = read_config(adapter)
    assert config.notes == ("fetched from acme/spam at commit 12ab",) and digest_of(config, adapter) == before
    assert json.loads((adapter / "adapter_config.json").read_text())[SOURCE_KEY] == "acme/spam at commit 12ab"


def test_a_config_that_cannot_be_read_gets_no_label(adapter: Path) -> None:
    (adapter / "adapter_config.json").write_bytes(b"{")
    put_label(adapter, "acme/spam")
    assert (adapter / "adapter_config.json").read_bytes() == b"{"


def test_a_process_that_fails_is_told_by_its_last_line(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repository, "_FETCH", "loramux_server.hub.no_such_module")
    with pytest.raises(
        HubUnreachable, match="could not be fetched: .*No module named loramux_server.hub.no_such_module"
    ):
        fetch(NAME)
