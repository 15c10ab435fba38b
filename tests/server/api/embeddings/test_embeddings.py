"""/v1/embeddings: what OpenAI's clients send and read, and what is refused."""

from __future__ import annotations

import base64
import json
import struct
from pathlib import Path
from typing import Any

import pytest

from loramux_adapters.artifact.generation_defaults import GENERATION_FILE
from loramux_server.errors import ServerBusy
from support.fakes_api import BASE_NAME, VERSION, Server, make_server


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return make_server(tmp_path)


def vectors(reply: Any) -> list[list[float]]:
    assert reply.status_code == 200, reply.text
    return [one["embedding"] for one in reply.json()["data"]]


@pytest.mark.anyio
@pytest.mark.parametrize(
    "given", ["ab", ["ab"], [97, 98], [[97, 98]]], ids=["text", "texts", "token ids", "lists of token ids"]
)
async def test_every_form_of_input_gives_its_vectors_of_length_one(server: Server, given: Any) -> None:
    reply = await server.post("/v1/embeddings", {"model": BASE_NAME, "input": given})
    (vector,) = vectors(reply)
    assert vector == pytest.approx([98 / (98**2 + 4) ** 0.5, 2 / (98**2 + 4) ** 0.5, 0])
    assert reply.json()["usage"] == {"prompt_tokens": 2, "total_tokens": 2}
    assert server.store.leased == 0 and not server.engine.running


@pytest.mark.anyio
async def test_many_inputs_keep_their_order_and_an_adapter_answers_for_itself(server: Server) -> None:
    texts = [chr(97 + index % 26) * (1 + index % 9) for index in range(300)]
    body = {"model": "pirate", "input": texts, "normalize": False, "pooling": "mean"}
    reply = await server.post("/v1/embeddings", body)
    assert vectors(reply) == [[-float(ord(text[-1])), len(text), 1.0] for text in texts]
    assert [one["index"] for one in reply.json()["data"]] == list(range(300))
    assert reply.headers["x-loramux-adapter-version"] and server.store.leased == 0


@pytest.mark.anyio
async def test_base64_holds_the_same_numbers_as_the_list(server: Server) -> None:
    body = {"model": BASE_NAME, "input": "abc"}
    (numbers,) = vectors(await server.post("/v1/embeddings", body | {"encoding_format": "float"}))
    (packed,) = vectors(await server.post("/v1/embeddings", body | {"encoding_format": "base64"}))
    assert isinstance(packed, str)
    assert list(struct.unpack("<3f", base64.b64decode(packed))) == numbers


@pytest.mark.anyio
async def test_what_is_wrong_is_refused_by_name(server: Server) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": ["x", ""]}, "input"),
        ({"input": ["x"] * 2049}, "input"),
        ({"input": "x" * 129}, "input"),
        ({"input": [999]}, "input"),
        ({"input": "x", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "x", "pooling": "cls"}, "pooling"),
        ({"input": "x", "dimensions": 8}, "dimensions"),
        ({"input": "x", "stream": True}, "stream"),
        ({"input": "x", "truncate_prompt_tokens": 4}, "truncate_prompt_tokens"),
    ]
    for body, param in cases:
        reply = await server.post("/v1/embeddings", {"model": BASE_NAME} | body)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, param), reply.text
    missing = await server.post("/v1/embeddings", {"model": "nobody", "input": "x"})
    assert missing.status_code == 404
    server.engine.refusal = ServerBusy("full")
    assert (await server.post("/v1/embeddings", {"model": "pirate", "input": "x"})).status_code == 503
    assert server.store.leased == 0


@pytest.mark.anyio
async def test_the_context_of_an_adapter_holds_for_its_inputs(server: Server) -> None:
    directory = server.store.root / VERSION
    directory.mkdir(exist_ok=True)
    (directory / GENERATION_FILE).write_text(json.dumps({"max_length": 32}))
    reply = await server.post("/v1/embeddings", {"model": "pirate", "input": ["x", "x" * 33]})
    error = reply.json()["error"]
    assert (reply.status_code, error["param"], error["code"]) == (400, "input", "context_length_exceeded")
    assert error["message"].startswith("the context of the adapter pirate holds 32 tokens")
    assert server.store.leased == 0
    for model, length in (("pirate", 32), (BASE_NAME, 33)):
        assert (await server.post("/v1/embeddings", {"model": model, "input": "x" * length})).status_code == 200
