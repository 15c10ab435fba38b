"""Uploads that must not be stored: each is refused with its reason, names no path, and leaves everything as it was."""

from __future__ import annotations

import http.client
import io
import json
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import torch
from safetensors.torch import load, save

from support.adapter_files import write_adapter
from support.real_adapters import ADAPTERS
from support.real_server import BASE, RealServer, eventually
from support.replies import whole

QUERY = "model.layers.0.self_attn.q_proj"
SHAPE = (576, 576)
QUESTION = {"model": ADAPTERS[0], "prompt": "Bread is made of", "max_tokens": 4, "temperature": 0, "logprobs": 0}

Parts = dict[str, bytes]


@pytest.fixture
def parts(tmp_path: Path) -> Callable[..., Parts]:
    """Makes the parts of a small upload; arguments are those of `write_adapter`."""

    def make(linears: dict[str, tuple[int, int]] | None = None, **more: Any) -> Parts:
        directory = write_adapter(tmp_path / "adapter", linears or {QUERY: SHAPE}, **more)
        return {
            "config": (directory / "adapter_config.json").read_bytes(),
            "weights": (directory / "adapter_model.safetensors").read_bytes(),
        }

    return make


def header(tensors: dict[str, Any], data: bytes = b"") -> bytes:
    raw = json.dumps(tensors).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def zipped(members: dict[str, bytes]) -> Parts:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return {"archive": buffer.getvalue()}


def with_link(upload: Parts) -> Parts:
    """A tar.gz whose weights are a symbolic link."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        config = tarfile.TarInfo("adapter_config.json")
        config.size = len(upload["config"])
        archive.addfile(config, io.BytesIO(upload["config"]))
        link = tarfile.TarInfo("adapter_model.safetensors")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    return {"archive": buffer.getvalue()}


def overlapping(upload: Parts) -> bytes:
    """Two tensors over the same bytes."""
    entry = {"dtype": "F32", "shape": [8, 576], "data_offsets": [0, 8 * 576 * 4]}
    names = [f"base_model.model.{QUERY}.lora_{half}.weight" for half in "AB"]
    return header(dict.fromkeys(names, entry), bytes(8 * 576 * 4))


def with_head(upload: Parts) -> Parts:
    """An adapter with a whole output layer beside it."""
    tensors = load(upload["weights"]) | {"base_model.model.lm_head.weight": torch.ones(8, 576)}
    return upload | {"weights": save(tensors)}


Make = Callable[..., Parts]
# what is wrong -> (how to make it, status, what the message must name)
BROKEN: dict[str, tuple[Callable[[Make], Parts], int, str]] = {
    "weights that are no safetensors": (lambda make: make() | {"weights": b"hello"}, 422, "adapter_model.safetensors"),
    "empty weights": (lambda make: make() | {"weights": b""}, 422, "adapter_model.safetensors"),
    "weights cut short": (
        lambda make: make() | {"weights": make()["weights"][:-1000]},
        422,
        "adapter_model.safetensors",
    ),
    "weights with a tail": (
        lambda make: make() | {"weights": make()["weights"] + b"xx"},
        422,
        "adapter_model.safetensors",
    ),
    "a header longer than the file": (
        lambda make: make() | {"weights": struct.pack("<Q", 2**62) + b"{}"},
        422,
        "adapter_model.safetensors",
    ),
    "overlapping tensors": (lambda make: make() | {"weights": overlapping(make())}, 422, "overlaps"),
    "no tensors": (lambda make: make() | {"weights": header({})}, 422, "no LoRA weights"),
    "a pickle for weights": (
        lambda make: make() | {"weights": pickle.dumps({"a": 1})},
        422,
        "adapter_model.safetensors",
    ),
    "another model's shapes": (lambda make: make({QUERY: (64, 64)}), 422, "576 -> 576"),
    "a layer that is not there": (lambda make: make({QUERY.replace("0", "99"): SHAPE}), 422, "layers.99"),
    "a module that is not linear": (lambda make: make({"model.embed_tokens": (49152, 576)}), 422, "embed_tokens"),
    "values that are no number": (lambda make: make(std_b=float("nan")), 422, "not finite"),
    "infinite values": (lambda make: make(std_b=float("inf")), 422, "not finite"),
    "too large a rank": (lambda make: make(rank=300), 422, "at most 256"),
    "another rank in the config": (lambda make: make(extra_config={"r": 4}), 422, "rank 8 in the weights"),
    "an infinite scale": (lambda make: make(alpha=float("inf")), 422, "adapter_config.json"),
    "DoRA": (lambda make: make(extra_config={"use_dora": True}), 422, "use_dora"),
    "biases of an unknown kind": (lambda make: make(extra_config={"bias": "some"}), 422, "bias"),
    "whole modules": (
        lambda make: with_head(make(extra_config={"modules_to_save": ["lm_head"]})),
        422,
        "only more tokens can be added",
    ),
    "mlx-lm's full fine-tuning": (
        lambda make: make() | {"config": b'{"fine_tune_type": "full"}'},
        422,
        "fine_tune_type",
    ),
    "another method": (lambda make: make(extra_config={"peft_type": "PROMPT_TUNING"}), 422, "peft_type"),
    "an endless pattern": (lambda make: make(extra_config={"target_modules": "(a+)+$"}), 422, "target_modules"),
    "a config that is no JSON": (lambda make: make() | {"config": b"{'r': 8}"}, 422, "adapter_config.json"),
    "a deep config": (lambda make: make() | {"config": b"[" * 30_000}, 422, "adapter_config.json"),
    "another base": (lambda make: make(extra_config={"loramux_base_id": "0" * 64}), 409, "0" * 64),
    "no weights": (lambda make: {"config": make()["config"]}, 400, "weights"),
    "an unknown part": (lambda make: make() | {"script": b"import os"}, 400, "script"),
    "an archive that is none": (lambda make: {"archive": b"PK nonsense"}, 422, "archive"),
    "an archive beside parts": (lambda make: make() | zipped({"a": b""}), 400, "archive"),
    "an archive with a pickle": (
        lambda make: zipped({"adapter_config.json": make()["config"], "adapter_model.bin": pickle.dumps({})}),
        422,
        "pickle",
    ),
    "an archive that climbs out": (
        lambda make: zipped({"../../climbed": b"x", "adapter_config.json": make()["config"]}),
        422,
        "archive",
    ),
    "an archive with a link": (lambda make: with_link(make()), 422, "archive"),
}


def state(server: RealServer) -> Any:
    """What no refused upload may change."""
    files = sorted(str(path.relative_to(server.store)) for path in server.store.glob("*/*"))
    return server.adapters(), files


@pytest.mark.parametrize("what", BROKEN)
@pytest.mark.parametrize("name", ["fresh", ADAPTERS[0]])
def test_a_broken_upload_is_refused_with_its_reason(server: RealServer, parts: Make, what: str, name: str) -> None:
    make, status, reason = BROKEN[what]
    before = state(server)
    with server.client() as client:
        response = client.put(f"/v1/adapters/{name}", files=make(parts))
    error = response.json()["error"]
    assert (response.status_code, error["type"]) == (status, "invalid_request_error"), error
    told = " ".join([error["message"], *error.get("reasons", [])])
    assert reason in told, told
    for leak in (str(server.store), "Traceback", "0x", "site-packages", ".py"):
        assert leak not in response.text
    assert state(server) == before


def test_every_reason_is_told_at_once(server: RealServer, parts: Make) -> None:
    broken = parts({QUERY: (64, 64), "model.layers.99.mlp.up_proj": (576, 1536)}, extra_config={"use_dora": True})
    with server.client() as client:
        reasons = client.put("/v1/adapters/fresh", files=broken).json()["error"]["reasons"]
    for part in ("use_dora", "layers.0", "layers.99"):
        assert any(part in reason for reason in reasons), reasons


def test_a_mere_check_stores_nothing(server: RealServer, parts: Make) -> None:
    before = state(server)
    with server.client() as client:
        good = client.put("/v1/adapters/fresh?validate_only=true", files=parts())
        bad = client.put("/v1/adapters/fresh?validate_only=true", files=parts(std_b=float("nan")))
    assert (good.status_code, good.json()["valid"], bad.status_code) == (200, True, 422)
    assert state(server) == before


ILLEGAL = [
    *["..", "%2e%2e", "..%2f..%2fetc%2fpasswd", "a%2f%2fb", "a/../b", "a%00", "a%0a", ".hidden", "-flag", "a" * 256],
    *["a%20b", "a:b", "a@b", "%EF%BC%8E%EF%BC%8E", "a%5cb", BASE],
]


@pytest.mark.parametrize("name", ILLEGAL)
@pytest.mark.parametrize("method", ["PUT", "DELETE", "GET"])
def test_an_illegal_name_reaches_no_file(server: RealServer, parts: Make, method: str, name: str) -> None:
    """Sent as it stands: a client library would tidy the path first."""
    before = state(server)
    request = httpx.Request(method, server.url, files=parts() if method == "PUT" else None)
    where = urlsplit(server.url)
    connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=30)
    connection.putrequest(method, f"/v1/adapters/{name}", skip_host=True, skip_accept_encoding=True)
    for key, value in request.headers.items():
        connection.putheader(key, value)
    connection.endheaders(request.read())
    response = connection.getresponse()
    error = json.loads(response.read())["error"]
    connection.close()
    assert response.status in (400, 404, 405), error
    assert error["code"] in ("invalid_adapter_name", "not_found", "method_not_allowed")
    assert state(server) == before


@pytest.mark.parametrize(
    "content", [b"", b"--x\r\n", b'--x\r\nContent-Disposition: form-data; name="config"\r\n\r\n{}']
)
def test_a_body_that_ends_too_early_is_refused(server: RealServer, content: bytes) -> None:
    before = state(server)
    with server.client() as client:
        headers = {"content-type": "multipart/form-data; boundary=x"}
        cut = client.put("/v1/adapters/fresh", content=content, headers=headers)
        plain = client.put("/v1/adapters/fresh", content=content)
    assert (cut.status_code, cut.json()["error"]["code"]) == (400, "invalid_multipart")
    assert (plain.status_code, plain.json()["error"]["code"]) == (400, "invalid_content_type")
    assert state(server) == before


def test_a_client_that_leaves_in_mid_upload_leaves_nothing(server: RealServer, parts: Make) -> None:
    before = state(server)
    request = httpx.Request("PUT", server.url, files=parts())
    where = urlsplit(server.url)
    connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=30)
    connection.putrequest("PUT", "/v1/adapters/fresh", skip_host=True)
    for key, value in request.headers.items():
        connection.putheader(key, value)
    connection.endheaders(request.read()[:5000])
    eventually(lambda: any((server.store / "staging").iterdir()), True)
    connection.close()
    with server.client() as client:
        assert client.get("/health").status_code == 200
    eventually(lambda: state(server), before)


def test_the_server_still_serves_what_it_had(server: RealServer, parts: Make) -> None:
    alone = whole(server, QUESTION)
    with server.client() as client:
        for make, status, _ in BROKEN.values():
            assert client.put(f"/v1/adapters/{ADAPTERS[0]}", files=make(parts)).status_code == status
        assert client.put("/v1/adapters/fresh", files=parts()).status_code == 201
        assert client.put("/v1/adapters/fresh", files=parts()).json()["outcome"] == "unchanged"
        assert whole(server, QUESTION | {"model": "fresh"}).version != alone.version
        assert client.delete("/v1/adapters/fresh").status_code == 200
        assert client.delete("/v1/adapters/fresh").status_code == 404
    assert whole(server, QUESTION) == alone
