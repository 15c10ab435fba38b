"""Large replies are made by another thread, and by many calls of the encoder."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loramux_server.api.http import json_reply
from loramux_server.api.http.json_reply import json_in_pieces
from support.fakes_api import Server, make_server, record_of

VALUE: dict[str, Any] = {"a": [], "b": {}, "c": [1, [2, {"d": None}], 'é"'], "e": {"f": [{"g": 1.5}, True]}, 'h"': ()}

MESSAGES = [{"role": "user", "content": "x"}]


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return make_server(tmp_path)


@pytest.mark.parametrize("depth", range(6))
@pytest.mark.parametrize("value", [VALUE, [VALUE, VALUE], {}, [], 1, None])
def test_pieces_are_the_same_json(value: object, depth: int) -> None:
    assert json_in_pieces(value, depth=depth).decode() == json.dumps(value)


@pytest.mark.anyio
@pytest.mark.parametrize("path", ["/v1/models", "/v1/adapters"])
async def test_a_long_list_is_made_off_the_event_loop_item_by_item(
    server: Server, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    for number in range(300):
        server.store.known[f"a{number}"] = record_of(f"a{number}", f"{number:064x}")
    longest = 0

    def dumps(value: object) -> str:
        nonlocal longest
        with pytest.raises(RuntimeError):
            asyncio.get_running_loop()
        text = json.JSONEncoder().encode(value)
        longest = max(longest, len(text))
        return text

    monkeypatch.setattr(json_reply, "json", SimpleNamespace(dumps=dumps))
    async with server.client() as client:
        reply = await client.get(path)
    assert len(reply.json()["data"]) in (301, 302)
    assert 0 < longest < 2000


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("path", "body"),
    [
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 20},
        ),
        ("/v1/completions", {"prompt": ["x", "y"], "logprobs": 5, "max_tokens": 100}),
    ],
)
async def test_a_long_reply_with_log_probabilities_is_made_off_the_event_loop(
    server: Server, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    server.engine.replies[None] = b"a" * 90
    whole = (await server.post(path, {"model": "tiny-base"} | body)).json()
    made = []

    def pieces(value: object, *, depth: int) -> bytes:
        with pytest.raises(RuntimeError):
            asyncio.get_running_loop()
        made.append(depth)
        return json_in_pieces(value, depth=depth)

    monkeypatch.setattr("loramux_server.api.completions.reply.reply_format.json_in_pieces", pieces)
    again = (await server.post(path, {"model": "tiny-base"} | body)).json()
    assert made == [5]
    assert again | {"id": "", "created": 0} == whole | {"id": "", "created": 0}
