"""Adapters from a hub and from other tools' files on a real server: each answers as the same adapter uploaded does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loramux_server.cli import main as cli
from support.adapter_files import TINY_LINEARS, write_adapter
from support.fake_hub import FakeHub, point_to, running_hub
from support.foreign_adapters import write_gguf_lora, write_kohya
from support.real_server import RealServer, running_server
from support.tiny_models import save_tiny_model

BODY = {"prompt": "The keeper of the", "max_tokens": 8, "temperature": 0, "logprobs": 2, "ignore_eos": True}
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj"]


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    with running_hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def adapter(place: Path, hub: FakeHub) -> Path:
    adapter = write_adapter(place / "spam", TINY_LINEARS, targets=TARGETS, rank=4, std_b=0.3)
    hub.add("acme/spam", adapter)
    hub.add("other/spam", adapter)
    return adapter


@pytest.fixture(scope="module")
def server(place: Path, hub: FakeHub) -> Iterator[RealServer]:
    base = save_tiny_model(place / "base")
    environ: dict[str, str] = {}
    point_to(hub, environ.__setitem__, place / "home")
    flags = ("--base", str(base), "--served-model-name", "tiny", "--hub-adapters", "acme/*", "--max-model-len", "256")
    with running_server(place / "store", *flags, environ=environ) as server:
        yield server


def loramux(server: RealServer, *argv: object) -> int:
    return cli.main(["adapters", *map(str, argv)], {"LORAMUX_URL": server.url})


def asked(server: RealServer, model: str, **body: Any) -> tuple[int, Any]:
    with server.client() as client:
        reply = client.post("/v1/completions", json=BODY | {"model": model} | body)
    return reply.status_code, reply.json()["choices"][0] if reply.status_code == 200 else reply.json()["error"]


def test_every_way_brings_the_same_bits(
    server: RealServer, hub: FakeHub, adapter: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point_to(hub, monkeypatch.setenv, place / "home")
    monkeypatch.chdir(place)
    gguf = write_gguf_lora(adapter, place / "l.gguf", "llama", heads=4, kv_heads=2, layers=2)
    kohya = write_kohya(adapter, place / "k.safetensors")
    assert loramux(server, "convert", gguf, place / "from-gguf", "--base", place / "base") == 0
    assert loramux(server, "convert", kohya, place / "from-kohya") == 0
    for source, name in (
        (adapter, "uploaded"),
        (place / "from-gguf", "from-gguf"),
        (place / "from-kohya", "from-kohya"),
        ("hub:acme/spam", "pushed-from-hub"),
    ):
        assert loramux(server, "push", source, "--name", name) == 0
    _, bare = asked(server, "tiny")
    status, expected = asked(server, "uploaded")
    assert status == 200 and expected["logprobs"] != bare["logprobs"]
    for name in ("from-gguf", "from-kohya", "pushed-from-hub", "hub:acme/spam", "hub/acme/spam"):
        assert asked(server, name) == (200, expected), name
    adapters = server.adapters()
    versions = {adapters[name]["version"] for name in adapters}
    assert len(versions) == 1 and "hub/acme/spam" in adapters


def test_what_is_not_allowed_or_not_there_is_a_404(server: RealServer, adapter: Path) -> None:
    for model, says in (("hub:other/spam", "--hub-adapters"), ("hub:acme/none", "there is no such repository")):
        status, error = asked(server, model)
        assert status == 404 and says in error["message"]
        assert error["code"] == "model_not_found"


def test_generation_defaults_and_context_hold_in_real_requests(server: RealServer, adapter: Path, place: Path) -> None:
    said = write_adapter(place / "said", TINY_LINEARS, targets=TARGETS, rank=4, std_b=0.3)
    (said / "generation_config.json").write_text(
        '{"do_sample": false, "max_new_tokens": 3, "max_length": 40, "stop_strings": ["\\u0000"]}'
    )
    assert loramux(server, "push", said) == 0
    shown = server.adapters()["said"]
    assert shown["context"] == 40
    assert shown["generation_defaults"] == {"temperature": 0.0, "max_tokens": 3, "stop": ["\0"]}
    _, expected = asked(server, "said", max_tokens=3, stop=["\0"])
    status, got = asked(server, "said", max_tokens=None, temperature=None)
    assert status == 200 and got == expected
    assert len(got["logprobs"]["tokens"]) == 3
    status, error = asked(server, "said", prompt="x" * 60)
    assert status == 400 and "the context of the adapter said holds 40 tokens" in error["message"]
