"""`loramux adapters push` with an adapter of a hub: fetched, labelled, and sent as one of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from loramux_adapters.artifact.config import CONFIG_FILE
from loramux_adapters.artifact.format import digest_of, read_config
from loramux_server.cli import main as cli
from loramux_server.client.adapter_source import AdapterSource
from loramux_server.client.adapters import AdaptersClient
from loramux_server.client.connection import ServerReply
from loramux_server.errors import ConfigError
from loramux_server.hub.hub_name import HubName
from support.adapter_files import TINY_LINEARS, write_adapter
from support.fake_hub import FakeHub, point_to, running_hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with running_hub() as hub:
        point_to(hub, monkeypatch.setenv, tmp_path / "home")
        monkeypatch.chdir(tmp_path)
        yield hub


@pytest.fixture
def pushed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str], tuple[str, ...], str]]:
    """Name, files, notes and version of what was sent."""
    seen: list[tuple[str, list[str], tuple[str, ...], str]] = []

    def push(self: AdaptersClient, name: str, directory: Path, **options: Any) -> ServerReply:
        config = read_config(directory)
        version = digest_of(config, directory)
        seen.append((name, sorted(path.name for path in directory.iterdir()), config.notes, version))
        return ServerReply(201, {"outcome": "created", "version": version, "notes": [*config.notes]})

    monkeypatch.setattr(AdaptersClient, "push", push)
    return seen


def loramux(*argv: str) -> int:
    return cli.main(["adapters", *argv], {})


@pytest.mark.parametrize("spelled", ["acme/spam", "hub:acme/spam"])
def test_an_adapter_of_a_hub_is_pushed_under_its_name_and_tells_its_commit(
    hub: FakeHub, pushed: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], spelled: str
) -> None:
    adapter = write_adapter(tmp_path / "adapter", TINY_LINEARS, targets=["q_proj"], rank=4)
    commit = hub.add("acme/spam", adapter)
    assert loramux("push", spelled) == 0
    (one,) = pushed
    assert one[0] == "acme/spam" and one[1] == [CONFIG_FILE, "adapter_model.safetensors"]
    assert one[2] == (f"fetched from acme/spam at commit {commit}",)
    assert one[3] == digest_of(read_config(adapter), adapter)
    said = capsys.readouterr()
    assert said.out.splitlines()[0] == f"acme/spam at commit {commit}, from the hub"
    assert f"  fetched from acme/spam at commit {commit}" in said.out
    assert "fetching acme/spam from the hub:" in said.err


def test_a_revision_and_a_name_of_its_own(hub: FakeHub, pushed: list[Any], tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", TINY_LINEARS, targets=["q_proj"], rank=4)
    commit = hub.add("acme/spam", adapter, revision="v2")
    assert loramux("push", "acme/spam@v2", "--name", "ham") == 0
    assert pushed[0][0] == "ham" and commit in pushed[0][2][0]


def test_what_cannot_be_had_is_one_line_and_nothing_is_sent(
    hub: FakeHub, pushed: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert loramux("push", "acme/none") == 1
    said = capsys.readouterr().err
    assert said.startswith("loramux: acme/none cannot be had from the hub: there is no such repository")
    assert said.count("\n") == 1 and pushed == []


def test_offline_takes_what_is_in_the_cache_and_says_so(
    hub: FakeHub,
    pushed: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hub.add("acme/spam", write_adapter(tmp_path / "adapter", TINY_LINEARS, targets=["q_proj"], rank=4))
    assert loramux("push", "acme/spam") == 0
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    capsys.readouterr()
    assert loramux("push", "acme/spam") == 0
    assert "from the hub's cache on this machine, since the hub cannot be asked" in capsys.readouterr().out
    assert len(pushed) == 2


def test_what_is_on_this_machine_is_meant_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert AdapterSource.of("acme/spam").on_hub == HubName("acme/spam")
    write_adapter(tmp_path / "acme" / "spam", TINY_LINEARS, targets=["q_proj"])
    assert AdapterSource.of("acme/spam") == AdapterSource(directory=Path("acme/spam"))
    assert AdapterSource.of("acme/spam").name == "spam"
    assert AdapterSource.of("hub:acme/spam").on_hub == HubName("acme/spam")
    assert AdapterSource.of("./acme/other").directory == Path("acme/other")
    assert AdapterSource.of("no/such/dir").directory == Path("no/such/dir")


@pytest.mark.parametrize("text", ["hub:spam", "hub:../x", "hub:acme/spam@"])
def test_what_is_no_name_of_a_hub_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="owner/name@revision"):
        AdapterSource.of(text)


@pytest.mark.parametrize("file", ["lora.gguf", "lora.safetensors"])
def test_a_file_is_to_be_converted_first(
    tmp_path: Path, pushed: list[Any], capsys: pytest.CaptureFixture[str], file: str
) -> None:
    (tmp_path / file).write_bytes(b"GGUF")
    assert loramux("push", str(tmp_path / file), "--name", "spam") == 1
    assert f"loramux adapters convert {tmp_path / file}" in capsys.readouterr().err
    assert pushed == []


@contextmanager
def no_files(self: AdapterSource, *told: object) -> Iterator[Path]:
    raise AssertionError("nothing may be fetched")
    yield Path()


def test_a_name_that_no_adapter_can_have_is_refused_before_anything_is_fetched(
    monkeypatch: pytest.MonkeyPatch, pushed: list[Any]
) -> None:
    monkeypatch.setattr(AdapterSource, "files", no_files)
    assert loramux("push", "acme/spam", "--name", "a:b") == 2
