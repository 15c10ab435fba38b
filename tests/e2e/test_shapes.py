"""Replies held to shapes by the real process: what ends is valid, what does not says so, and neighbours change no bit.

A slice of the corpus; `LORAMUX_WHOLE_CORPUS=1` asks for all of its 300 schemas.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from loramux_adapters.device.cpu import CpuDevice
from loramux_server.base.loader import load_base_model
from loramux_server.base.source import EMBEDDED_NAME
from loramux_server.base.tokenizer import BaseTokenizer
from loramux_server.grammar.grammars import Grammars
from loramux_server.grammar.shape import Shape
from support.real_adapters import ADAPTERS
from support.real_server import BASE, RealServer
from support.schemas import corpus

WHOLE = bool(os.environ.get("LORAMUX_WHOLE_CORPUS"))
CORPUS = [*corpus()][:: 1 if WHOLE else 11]
TOKENS = 160 if WHOLE else 96
AT_ONCE = 8
CALENDAR = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 30}, "day": {"enum": ["Monday", "Friday"]}},
    "required": ["name", "day"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "event", "schema": CALENDAR}}
Fields = dict[str, Any]


def chat(server: RealServer, **fields: Any) -> Any:
    """The reply to a message, or the error in its place."""
    asked = {"role": "user", "content": fields.pop("question", "Science fair on Friday: Alice and Bob are going.")}
    body = {"model": BASE, "messages": [asked], "max_tokens": TOKENS, "temperature": 0} | fields
    with server.client() as client:
        response = client.post("/v1/chat/completions", json=body)
    return response.json() | {"status": response.status_code}


def choice_of(server: RealServer, **fields: Any) -> Fields:
    reply = chat(server, **fields)
    assert reply["status"] == 200, reply
    choice: Fields = reply["choices"][0]
    return choice


def streamed(server: RealServer, **fields: Any) -> tuple[str, str]:
    """(text, why it ended) of the same, chunk by chunk."""
    question = {"role": "user", "content": "Science fair on Friday: Alice and Bob are going."}
    body = {"model": BASE, "messages": [question], "max_tokens": TOKENS, "temperature": 0, "stream": True} | fields
    text, finish = "", ""
    with server.client() as client, client.stream("POST", "/v1/chat/completions", json=body) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                choice = json.loads(line.removeprefix("data: "))["choices"][0]
                text, finish = text + (choice["delta"].get("content") or ""), choice["finish_reason"] or finish
    return text, finish


def ways(schema: Fields) -> Iterable[Fields]:
    """How a client may ask for JSON of a schema."""
    yield {"response_format": {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, "strict": True}}}
    yield {"guided_json": schema}
    yield {"structured_outputs": {"json": json.dumps(schema)}}
    yield {"response_format": {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, "strict": False}}}


@pytest.fixture(scope="module")
def grammars(embedded_cache: Path) -> Iterable[tuple[BaseTokenizer, Grammars]]:
    base = load_base_model(EMBEDDED_NAME, device=CpuDevice(), cache_dir=embedded_cache, report=lambda line: None)
    tokenizer = BaseTokenizer(base.tokenizer, None, base.vocabulary)
    made = Grammars(tokenizer, num_workers=1)
    yield tokenizer, made
    made.close()


def test_what_ends_is_valid_and_what_is_cut_may_still_become_so(
    server: RealServer, grammars: tuple[BaseTokenizer, Grammars]
) -> None:
    """Of every schema, eight at a time, some drawn and some not, beside replies of adapters that are free."""

    def held(place: int, name: str, schema: Fields, way: Fields) -> str:
        drawn = {"temperature": 0.8, "seed": place} if place % 2 else {}
        reply = chat(server, question=f"Make up an example of {name}.", return_token_ids=True, **way, **drawn)
        if name.startswith("refused"):
            assert reply["status"] == 400 and reply["error"]["param"] == next(iter(way)), reply
            assert re.search(r"at #|'\w+'", reply["error"]["message"]), reply
            return "refused"
        assert reply["status"] == 200, (name, reply)
        choice = reply["choices"][0]
        text, reason = choice["message"]["content"], choice["finish_reason"]
        if reason == "stop":
            Draft202012Validator(schema).validate(json.loads(text))
            return "stop"
        assert reason == "length" and reply["usage"]["completion_tokens"] == TOKENS, (name, choice)
        grammar = grammars[1].of(Shape("json_schema", schema), "of the test")
        for token in choice["token_ids"]:
            grammar.advance(token)
        grammar.mask()  # something may follow
        return "length"

    def free(place: int) -> str:
        return str(choice_of(server, model=ADAPTERS[place % len(ADAPTERS)], max_tokens=48)["finish_reason"])

    chosen = [
        (place, name, schema, way)
        for place, ((name, schema), turn) in enumerate(zip(CORPUS, cycle(range(4)), strict=False))
        for way in [[*ways(schema)][turn]]
    ]
    with ThreadPoolExecutor(AT_ONCE) as clients, ThreadPoolExecutor(2) as others:
        beside = [others.submit(free, place) for place in range(16)]
        ends = [*clients.map(lambda asked: held(*asked), chosen)]
        assert {one.result() for one in beside} <= {"stop", "length"}
    assert len(ends) == len(CORPUS) and ends.count("refused") == sum(name.startswith("refused") for name, _ in CORPUS)
    assert ends.count("stop") > len(CORPUS) // 8, ends  # the model is small, and many schemas are long


PATTERNS: Sequence[tuple[Fields, str]] = [
    ({"guided_regex": r"\d{3}-\d{4}"}, r"\d{3}-\d{4}"),
    ({"structured_outputs": {"regex": r"[A-Z][a-z]{1,8}( [a-z]{1,8}){2}"}}, r"[A-Z][a-z]{1,8}( [a-z]{1,8}){2}"),
    ({"guided_choice": ["Friday night", "Friday", "Monday"]}, "Friday night|Friday|Monday"),
    ({"structured_outputs": {"choice": ["ja", "日本", "né"]}}, "ja|日本|né"),
    ({"guided_grammar": 'root ::= ("a" | "b")+ "!"'}, "[ab]+!"),
    ({"structured_outputs": {"grammar": 'start: WORD " " WORD\nWORD: /[a-z]{2,5}/'}}, "[a-z]{2,5} [a-z]{2,5}"),
]


@pytest.mark.parametrize(("asked", "pattern"), PATTERNS)
def test_other_shapes_are_kept_to_in_both_routes_and_as_streams(
    server: RealServer, asked: Fields, pattern: str
) -> None:
    choice = choice_of(server, **asked)
    text = choice["message"]["content"]
    if choice["finish_reason"] == "stop":
        assert re.fullmatch(pattern, text), text
    else:
        assert choice["finish_reason"] == "length" and pattern == "[ab]+!" and re.fullmatch("[ab]+", text)
    assert streamed(server, **asked) == (text, choice["finish_reason"])
    body = {"model": BASE, "prompt": "They meet", "max_tokens": TOKENS, "temperature": 0} | asked
    with server.client() as client:
        [of_text] = client.post("/v1/completions", json=body).json()["choices"]
    assert of_text["finish_reason"] == "length" or re.fullmatch(pattern, of_text["text"]), of_text


def test_a_held_reply_is_the_same_bit_for_bit_alone_and_in_company(server: RealServer) -> None:
    def asked(place: int) -> Fields:
        drawn = {"temperature": 1.1, "seed": 5, "top_p": 0.9} if place % 2 else {}
        return {"model": [BASE, *ADAPTERS][place % 4], "response_format": FORMAT, **drawn}

    def bits(place: int) -> tuple[str, str, list[float]]:
        choice = choice_of(server, logprobs=True, **asked(place))
        values = [one["logprob"] for one in choice["logprobs"]["content"]]
        return choice["message"]["content"], choice["finish_reason"], values

    def free(place: int) -> None:
        choice_of(server, model=ADAPTERS[place], max_tokens=40)

    alone = [bits(place) for place in range(6)]
    with ThreadPoolExecutor(12) as clients:
        beside = [clients.submit(free, place) for place in range(6)]
        assert [*clients.map(bits, range(6))] == alone
        for one in beside:
            one.result()
    assert [streamed(server, **asked(place)) for place in range(6)] == [(text, why) for text, why, _ in alone]


def test_each_of_several_replies_keeps_to_its_shape(server: RealServer) -> None:
    reply = chat(server, response_format=FORMAT, n=5, temperature=1.0, seed=8, logprobs=True, top_logprobs=2)
    assert reply["status"] == 200 and len(reply["choices"]) == 5
    texts = []
    for choice in reply["choices"]:
        assert "".join(one["token"] for one in choice["logprobs"]["content"]) == choice["message"]["content"]
        if choice["finish_reason"] == "stop":
            Draft202012Validator(CALENDAR).validate(json.loads(choice["message"]["content"]))
            texts.append(choice["message"]["content"])
    assert len({*texts}) > 1


def test_options_beside_a_shape_mean_what_they_say(server: RealServer) -> None:
    whole = choice_of(server, response_format=FORMAT)
    text = whole["message"]["content"]
    assert whole["finish_reason"] == "stop"
    one = choice_of(server, response_format=FORMAT, max_tokens=1)
    assert one["finish_reason"] == "length" and text.startswith(one["message"]["content"])
    stopped = choice_of(server, response_format=FORMAT, stop='"day"')
    assert stopped["finish_reason"] == "stop" and stopped["message"]["content"] == text[: text.index('"day"')]
    later = choice_of(server, response_format=FORMAT, min_tokens=60)  # a shape that is complete ends the reply
    assert later["finish_reason"] == "stop" and json.loads(later["message"]["content"])
    biased = choice_of(server, response_format=FORMAT, frequency_penalty=1.5, repetition_penalty=1.3)
    assert biased["finish_reason"] == "length" or json.loads(biased["message"]["content"])
    unasked = choice_of(server, question="Hi", response_format={"type": "json_object"})  # without the word
    assert unasked["message"]["content"].startswith("{") and unasked["message"]["content"].strip() != "{"


def test_a_reply_that_nothing_can_complete_ends_with_an_error(server: RealServer) -> None:
    for stream in (False, True):  # nothing has been sent yet, so a stream has the status too
        reply = chat(server, allowed_token_ids=[5, 6, 7], response_format=FORMAT, stream=stream)
        assert (reply["status"], reply["error"]["code"]) == (400, "reply_impossible"), reply
        assert "no token may be chosen" in reply["error"]["message"]
    later = {"guided_regex": "aaa1", "bad_words": ["1"]}
    assert chat(server, **later)["error"]["code"] == "reply_impossible"
    body = {"model": BASE, "prompt": "x", "stream": True, "max_tokens": 9} | later
    with server.client() as client, client.stream("POST", "/v1/completions", json=body) as response:
        events = [line for line in response.iter_lines() if line.startswith("data: {")]
    assert response.status_code == 200 and "reply_impossible" in events[-1]
    assert not any('"finish_reason":"stop"' in event.replace(" ", "") for event in events)


def test_thirty_new_schemas_at_once_and_clients_that_leave_harm_nobody(server: RealServer) -> None:
    def asked(number: int) -> str:
        schema = {**CALENDAR, "properties": {**CALENDAR["properties"], f"key{number}": {"type": "integer"}}}
        return str(choice_of(server, guided_json=schema, max_tokens=24)["finish_reason"])

    def leaves(number: int) -> None:
        schema = {"type": "array", "items": CALENDAR, "minItems": 100 + number}
        body = {"model": BASE, "messages": [{"role": "user", "content": "x"}], "guided_json": schema, "stream": True}
        with server.client() as client, client.stream("POST", "/v1/chat/completions", json=body) as response:
            next(line for line in response.iter_lines() if "content" in line)

    with ThreadPoolExecutor(34) as clients:
        left = [clients.submit(leaves, number) for number in range(4)]
        assert {*clients.map(asked, range(30))} <= {"stop", "length"}
        for one in left:
            one.result()
    server.wait_for("loramux_requests_running", 0.0, 10.0)
