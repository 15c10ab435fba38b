"""What a reply shall be: OpenAI's and vLLM's ways to say it, and what holds a reply to it."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from loramux_server.api.completions.request.chat import parse_chat
from loramux_server.api.completions.request.completion import parse_completion
from loramux_server.errors import RequestError
from loramux_server.grammar.shape import Shape
from support.fakes_api import BASE_NAME, FakeGrammars, Server, make_server

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
NAMED = {"name": "answer", "schema": SCHEMA, "strict": True}
MESSAGES = [{"role": "user", "content": "hi"}]
BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": MESSAGES}),
    ("/v1/completions", {"prompt": "Say"}),
]


@pytest.fixture
def grammars() -> FakeGrammars:
    return FakeGrammars()


@pytest.fixture
def server(tmp_path: Path, grammars: FakeGrammars) -> Server:
    return make_server(tmp_path, grammars=grammars)


def chat(**fields: Any) -> Any:
    return parse_chat(json.dumps({"model": "m", "messages": MESSAGES, **fields}).encode())


def completion(**fields: Any) -> Any:
    return parse_completion(json.dumps({"model": "m", "prompt": "x", **fields}).encode())


@pytest.mark.parametrize("parse", [chat, completion])
@pytest.mark.parametrize(
    ("name", "value", "shape"),
    [
        ("response_format", {"type": "json_object"}, Shape("json_object")),
        ("response_format", {"type": "json_schema", "json_schema": NAMED}, Shape("json_schema", SCHEMA)),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "a"}}, Shape("json_object")),
        ("response_format", {"type": "json_schema", "json_schema": {"schema": True}}, Shape("json_schema", True)),
        ("guided_json", SCHEMA, Shape("json_schema", SCHEMA)),
        ("guided_json", json.dumps(SCHEMA), Shape("json_schema", SCHEMA)),
        ("guided_regex", "[ab]+", Shape("regex", "[ab]+")),
        ("guided_choice", ["a", "b"], Shape("choice", ["a", "b"])),
        ("guided_grammar", 'start: "a"', Shape("lark", 'start: "a"')),
        ("guided_json_object", True, Shape("json_object")),
        ("structured_outputs", {"json": SCHEMA}, Shape("json_schema", SCHEMA)),
        ("structured_outputs", {"json": json.dumps(SCHEMA), "regex": None}, Shape("json_schema", SCHEMA)),
        ("structured_outputs", {"regex": "a"}, Shape("regex", "a")),
        ("structured_outputs", {"choice": ["a"], "disable_any_whitespace": False}, Shape("choice", ["a"])),
        ("structured_outputs", {"grammar": "g"}, Shape("lark", "g")),
        ("structured_outputs", {"json_object": True, "whitespace_pattern": None}, Shape("json_object")),
    ],
)
def test_a_shape_has_many_names(parse: Any, name: str, value: object, shape: Shape) -> None:
    assert parse(**{name: value}).shape == (shape, name)


@pytest.mark.parametrize("parse", [chat, completion])
@pytest.mark.parametrize(
    "fields",
    [{}, {"response_format": {"type": "text"}}, {"response_format": None, "guided_json": None},
     {"guided_json_object": False}, {"structured_outputs": None}],
)  # fmt: skip
def test_a_reply_is_free_where_nothing_is_asked(parse: Any, fields: dict[str, Any]) -> None:
    assert parse(**fields).shape is None


@pytest.mark.parametrize("parse", [chat, completion])
@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("response_format", {"type": "structural_tag"}, "structural_tag"), ("response_format", {}, "'type'"),
        ("response_format", "json_object", "object"), ("response_format", {"type": "xml"}, "json_schema"),
        ("response_format", {"type": "text", "schema": {}}, "'schema'"),
        ("response_format", {"type": "json_schema"}, "json_schema"),
        ("response_format", {"type": "json_schema", "json_schema": {"schema": []}}, "schema"),
        ("response_format", {"type": "json_schema", "json_schema": {"schema": {}, "x": 1}}, "json_schema.x"),
        ("response_format", {"type": "json_schema", "json_schema": {"name": 5, "schema": {}}}, "json_schema.name"),
        ("response_format", {"type": "x\u202e"}, "type"),
        ("guided_json", "{", "JSON schema"), ("guided_json", 5, "JSON schema"), ("guided_json", "[]", "JSON schema"),
        ("guided_json", '{"a":1,"a":2}', "JSON schema"), ("guided_json", "[" * 10_000, "JSON schema"),
        ("guided_regex", "", "not empty"), ("guided_regex", 5, "pattern"), ("guided_grammar", {}, "grammar"),
        ("guided_choice", [], "1 to 1024"), ("guided_choice", ["a", ""], "not empty"), ("guided_choice", "a", "list"),
        ("guided_choice", ["a"] * 1025, "1024"), ("guided_json_object", 1, "boolean"),
        ("structured_outputs", {}, "exactly one"), ("structured_outputs", {"regex": "a", "choice": ["a"]}, "not 2"),
        ("structured_outputs", {"json_object": False}, "exactly one"), ("structured_outputs", [], "object"),
        ("structured_outputs", {"structural_tag": "{}"}, "structural_tag"),
        ("structured_outputs", {"json": SCHEMA, "disable_any_whitespace": True}, "disable_any_whitespace"),
        ("structured_outputs", {"json": SCHEMA, "whitespace_pattern": " "}, "whitespace_pattern"),
        ("structured_outputs", {"xml": "a"}, "'xml'"), ("structured_outputs", {"json": "{"}, "'json'"),
    ],
)  # fmt: skip
def test_what_is_no_shape_is_refused_by_name(parse: Any, name: str, value: object, says: str) -> None:
    with pytest.raises(RequestError, match=f"'{name}'") as caught:
        parse(**{name: value})
    assert says in str(caught.value) and caught.value.param == name
    unsupported = says in ("structural_tag", "disable_any_whitespace", "whitespace_pattern")
    assert caught.value.code == ("unsupported_value" if unsupported else "invalid_value")
    assert str(caught.value).isprintable() and str(caught.value).isascii()


@pytest.mark.parametrize("parse", [chat, completion])
def test_a_reply_has_one_shape(parse: Any) -> None:
    with pytest.raises(RequestError, match="'response_format' and 'guided_regex' both") as caught:
        parse(response_format={"type": "json_object"}, guided_regex="a")
    assert caught.value.param == "guided_regex"
    assert parse(response_format={"type": "text"}, guided_regex="a").shape is not None
    with pytest.raises(RequestError, match="'ignore_eos'"):
        parse(guided_regex="a", ignore_eos=True)


@pytest.mark.anyio
@pytest.mark.parametrize(("path", "body"), BODIES)
async def test_each_reply_is_held_by_a_grammar_of_its_own_made_off_the_loop(
    server: Server, grammars: FakeGrammars, path: str, body: dict[str, Any]
) -> None:
    reply = await server.post(path, {"model": BASE_NAME, **body, "n": 3, "guided_regex": "a+"})
    assert reply.status_code == 200
    assert grammars.asked == [(Shape("regex", "a+"), "guided_regex")] * 3
    made = [sequence.params.grammar for sequence in server.engine.sequences]
    assert len({id(one) for one in made}) == 3 and None not in made
    assert threading.get_ident() not in grammars.threads


@pytest.mark.anyio
@pytest.mark.parametrize(("path", "body"), BODIES)
async def test_a_shape_that_cannot_be_is_400_before_anything_begins(
    server: Server, path: str, body: dict[str, Any]
) -> None:
    for stream in (False, True):
        reply = await server.post(path, {"model": "pirate", **body, "guided_regex": "(", "stream": stream})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "guided_regex")
    assert server.engine.sequences == [] and server.store.leased == 0
