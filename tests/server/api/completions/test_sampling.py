"""Options of how tokens are chosen, on their way to the engine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loramux_server.api.completions.request.completion import parse_completion
from loramux_server.api.completions.sampling import sampling_of
from loramux_server.base.tokenizer import BaseTokenizer
from support.fakes_api import BASE_NAME, FakeTokenizer, Server, make_server
from support.tokenizer_families import family

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "hi"}]
BODIES: list[tuple[str, dict[str, Any]]] = [(CHAT, {"messages": MESSAGES}), (COMPLETIONS, {"prompt": "Say"})]


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return make_server(tmp_path)


@pytest.mark.anyio
@pytest.mark.parametrize(("path", "body"), BODIES)
async def test_options_reach_the_engine(server: Server, path: str, body: dict[str, Any]) -> None:
    asked = {
        "presence_penalty": 0.5, "frequency_penalty": -2, "repetition_penalty": 1.25, "min_tokens": 2, "n": 2,
        "logit_bias": {"65": -100, "66": 2.5, "67": 0}, "allowed_token_ids": [65, 66, 66], "stop_token_ids": [7],
        "bad_words": ["ab", "ab", " c"],
    }  # fmt: skip
    reply = await server.post(path, {"model": BASE_NAME, **body, **asked})
    assert reply.status_code == 200, reply.text
    for sequence in server.engine.sequences:
        params = sequence.params
        assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.5, -2, 1.25)
        assert params.logit_bias == ((65, -100.0), (66, 2.5)) and params.allowed_token_ids == (65, 66)
        assert params.min_tokens == 2 and params.stop_token_ids == {7, 257}
        assert params.bad_words == ((97, 98), (99,)), "with a space they are longer, and forbid a space"
    assert len(server.engine.sequences) == 2


@pytest.mark.anyio
@pytest.mark.parametrize(("path", "body"), BODIES)
async def test_defaults_change_nothing(server: Server, path: str, body: dict[str, Any]) -> None:
    nothing = {
        "presence_penalty": 0, "frequency_penalty": None, "repetition_penalty": 1, "min_tokens": 0, "n": 1,
        "logit_bias": {}, "allowed_token_ids": [], "stop_token_ids": [], "bad_words": [],
    }  # fmt: skip
    for more in ({}, nothing):
        await server.post(path, {"model": BASE_NAME, **body, **more})
    plain, other = (sequence.params for sequence in server.engine.sequences)
    assert plain == other and plain.allowed_token_ids is None


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("logit_bias", {"258": 1}), ("logit_bias", {"-1": 1}), ("logit_bias", {"a": 1}), ("logit_bias", {"1": 101}),
        ("logit_bias", {"1": True}), ("logit_bias", {"1": "1"}), ("logit_bias", {"1": 1, "01": 1}),
        ("logit_bias", {"9" * 11: 1}), ("logit_bias", [1]), ("logit_bias", {str(i): 1 for i in range(1025)}),
        ("logit_bias", {"1": 10**400}), ("logit_bias", {"\u0661": 1}),
        ("allowed_token_ids", [258]), ("allowed_token_ids", [-1]), ("allowed_token_ids", ["1"]),
        ("stop_token_ids", [258]), ("stop_token_ids", [True]), ("stop_token_ids", [1] * 129),
        ("bad_words", [""]), ("bad_words", ["  "]), ("bad_words", "x"), ("bad_words", ["x"] * 257),
        ("bad_words", [chr(65 + i) * 256 for i in range(20)]),
        ("repetition_penalty", 0), ("repetition_penalty", 101), ("presence_penalty", 2.1), ("frequency_penalty", "1"),
        ("min_tokens", -1), ("min_tokens", 1.5), ("include_stop_str_in_output", 1),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("path", "body"), BODIES)
async def test_what_is_out_of_bounds_is_400_by_name(
    server: Server, path: str, body: dict[str, Any], param: str, value: object
) -> None:
    reply = await server.post(path, {"model": BASE_NAME, **body, param: value})
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["param"].partition(".")[0] == param and f"'{param}" in error["message"]
    assert server.engine.sequences == []


def bad_words_of(tokenizer: Any, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    body = parse_completion(json.dumps({"model": "m", "prompt": "x", "bad_words": [*words]}).encode())
    return sampling_of(body, tokenizer).bad_words


@pytest.mark.parametrize("name", ["byte-level BPE", "Gemma", "Llama 2", "Mistral"])
def test_a_bad_word_is_met_at_the_beginning_and_behind_a_space(name: str) -> None:
    """One form where a tokenizer has no other, and each without the tokens around a text."""
    raw = family(name)
    tokenizer = BaseTokenizer(raw, SimpleNamespace(eos_token_id=None), len(raw))
    words = bad_words_of(tokenizer, ["fox", " fox", "fox"])
    bare = tuple(tokenizer.encode("fox", around=False))
    spaced = tuple(tokenizer.encode(" fox", around=False))
    assert words[0] == bare and set(words) <= {bare, spaced}
    assert (spaced in words) == (len(spaced) == len(bare))
    assert not {token for word in words for token in word} & tokenizer.special_ids


def test_special_tokens_in_a_bad_word_are_text() -> None:
    tokenizer = FakeTokenizer()
    bad_words_of(tokenizer, ["<end>"])
    assert not tokenizer.special and not tokenizer.around
