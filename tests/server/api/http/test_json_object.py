"""Bodies are counted before they are parsed, and what is large is parsed off the event loop."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from loadtests.hostile_bodies import HostileBody, corpus

from loramux_server.api.http import json_object as module
from loramux_server.api.http.json_object import (
    MAX_CONTAINERS,
    MAX_DIGITS,
    MAX_FIELDS,
    MAX_STRINGS,
    MAX_VALUES,
    SMALL,
    json_object,
    parsed_off_loop,
)
from loramux_server.errors import RequestError
from support.fakes_api import BASE_NAME, Server, make_server


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return make_server(tmp_path)


@pytest.mark.anyio
@pytest.mark.parametrize("body", corpus(BASE_NAME), ids=lambda body: body.name)
async def test_a_hostile_body_gets_a_short_400_that_names_its_reason(server: Server, body: HostileBody) -> None:
    async with server.client() as client:
        reply = await client.post(body.path, content=body.raw, headers={"content-type": "application/json"})
    assert reply.status_code == 400
    assert body.reason in reply.json()["error"]["message"]
    assert len(reply.content) < 8192
    assert not server.engine.sequences and not server.store.leased


@pytest.mark.parametrize("body", corpus(BASE_NAME), ids=lambda body: body.name)
def test_a_parser_never_sees_more_than_the_bounds(monkeypatch: pytest.MonkeyPatch, body: HostileBody) -> None:
    parsed: list[bytes] = []

    def parse(raw: bytes, *, limit: int, depth: int) -> dict[str, Any]:
        parsed.append(raw)
        return {}

    monkeypatch.setattr(module, "parse_object", parse)
    try:
        json_object(body.raw)
    except RequestError:
        return
    text = "".join(parsed[0].decode(errors="replace").replace(r"\\", "").replace(r"\"", "").split('"')[::2])
    assert text.count("[") + text.count("{") <= MAX_CONTAINERS
    assert text.count(",") <= MAX_VALUES
    assert "9" * (MAX_DIGITS + 1) not in text


@pytest.mark.parametrize(
    ("most", "reason"),
    [
        (lambda extra: [[]] * (MAX_CONTAINERS - 2 + extra), "lists and objects"),
        (lambda extra: ["a"] * (MAX_STRINGS - 1 + extra), "strings"),
        (lambda extra: [1] * (MAX_VALUES + 1 + extra), "values"),
        (lambda extra: 10 ** (MAX_DIGITS - 1 + extra), "digits"),
    ],
)
def test_each_bound_is_exact(most: Any, reason: str) -> None:
    assert json_object(json.dumps({"a": most(0)}).encode())
    with pytest.raises(RequestError, match=reason):
        json_object(json.dumps({"a": most(1)}).encode())


@pytest.mark.parametrize(
    "text", ["[{," * 100_000, '"' * 200_000, "\\" * 200_000, '\\"[' * 100_000, "9" * 200_000, "é[" * 99_999]
)
def test_what_stands_inside_a_string_is_not_counted(text: str) -> None:
    assert json_object(json.dumps({"a": text}).encode()) == {"a": text}
    assert json_object(json.dumps({"a": [text, [], "x"]}, ensure_ascii=False).encode()) == {"a": [text, [], "x"]}


def test_the_number_of_parameters_is_bounded() -> None:
    assert len(json_object(json.dumps({str(i): i for i in range(MAX_FIELDS)}).encode())) == MAX_FIELDS
    with pytest.raises(RequestError, match="257 parameters; at most 256"):
        json_object(json.dumps({str(i): i for i in range(MAX_FIELDS + 1)}).encode())


@pytest.mark.anyio
async def test_a_large_body_is_parsed_by_another_thread() -> None:
    def thread(raw: bytes) -> int:
        return threading.get_ident()

    assert await parsed_off_loop(thread, bytes(SMALL)) == threading.get_ident()
    assert await parsed_off_loop(thread, bytes(SMALL + 1)) != threading.get_ident()


@pytest.mark.anyio
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_the_event_loop_parses_no_large_body(server: Server, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    def parse(raw: bytes, *, limit: int, depth: int) -> dict[str, Any]:
        with pytest.raises(RuntimeError):
            asyncio.get_running_loop()
        raise module.StrictJSONError("is not this thread's")

    monkeypatch.setattr(module, "parse_object", parse)
    assert "not this thread's" in (await server.post(path, {"a": "x" * SMALL})).json()["error"]["message"]
