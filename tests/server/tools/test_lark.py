"""Grammars of calls: whatever they let a model write is read as valid calls."""

from __future__ import annotations

import json
import random
from functools import cache
from typing import Any

import jsonschema
import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from loramux_server.grammar.shape import Shape
from loramux_server.tools.answers import shape_beside
from loramux_server.tools.calls import AddedTokens, CallPart, Tool, WrittenCall
from loramux_server.tools.formats import CallFormat
from loramux_server.tools.reasoning import Reasoning

FORMATS = (
    "hermes",
    "qwen3_coder",
    "llama3",
    "mistral",
    "mistral_args",
    "mistral_named",
    "granite",
    "smollm3",
    "json",
)
THINK = Reasoning("<think>", "</think>")
SPECIAL = ("[TOOL_CALLS]", "[ARGS]", "<|tool_call|>", "<|python_tag|>")
SHOWN = ("<tool_call>", "</tool_call>", "<think>", "</think>")
END = 256

PLACE = {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"], "additionalProperties": False}
TOOLS = (
    Tool(
        "weather",
        "",
        {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 5},
                "where": {"$ref": "#/$defs/Place"},
                "days": {"type": "integer"},
                "unit": {"enum": ["C", "F"]},
            },
            "required": ["city", "where"],
            "additionalProperties": False,
            "$defs": {"Place": PLACE},
        },
    ),
    Tool(
        "weather_now",
        "",
        {
            "type": "object",
            "properties": {"where": {"$ref": "#/$defs/Place"}},
            "$defs": {"Place": {"type": "boolean"}},
            "additionalProperties": False,
        },
    ),
    Tool("time"),
)


@cache
def tokenizer(*, special: bool) -> Tokenizer:
    """Bytes and the tags of all formats; `special`: these as tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({character: place for place, character in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<end>"])
    if special:
        made.add_special_tokens(list(SPECIAL))
        made.add_tokens([AddedToken(text, normalized=False) for text in SHOWN])
    return made


def added_of(tokens: Tokenizer) -> AddedTokens:
    known = tokens.get_added_tokens_decoder()
    return AddedTokens(
        {token.content: number for number, token in known.items()},
        frozenset(token.content for token in known.values() if token.special),
    )


def walk(grammar: str, tokens: Tokenizer, seed: int, *, longest: int = 1500) -> str:
    """A reply that the grammar allows, drawn with a liking for what ends things."""
    lark = LLMatcher.grammar_from_lark(grammar)
    engine = LLTokenizer(tokens.to_str(), eos_token=END)
    assert LLMatcher.validate_grammar(lark, engine) == ""
    matcher, mask, chance = LLMatcher(engine, lark), allocate_token_bitmask(1, engine.vocab_size), random.Random(seed)
    ends = [tokens.token_to_id(character) for character in '"}]0']
    ids: list[int] = []
    for _ in range(longest):
        fill_next_token_bitmask(matcher, mask)
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")[: engine.vocab_size]).tolist()
        assert allowed, matcher.get_error()
        if END in allowed and (len(allowed) == 1 or chance.random() < 0.4):
            return str(tokens.decode(ids, skip_special_tokens=False))
        closing = [token for token in ends if token in allowed]
        token = chance.choice(
            closing if closing and chance.random() < 0.5 else [each for each in allowed if each != END]
        )
        assert matcher.consume_token(token), matcher.get_error()
        ids.append(token)
    raise AssertionError(f"no end: {tokens.decode(ids, skip_special_tokens=False)[:300]!r}")


def typed(text: str, grammar: str, tokens: Tokenizer) -> bool:
    """Whether the grammar takes a whole reply."""
    matcher = LLMatcher(LLTokenizer(tokens.to_str(), eos_token=END), LLMatcher.grammar_from_lark(grammar))
    return bool(matcher.consume_tokens(tokens.encode(text, add_special_tokens=False).ids)) and matcher.is_accepting()


def calls_in(name: str, tokens: Tokenizer, text: str, **options: Any) -> list[CallPart]:
    reader = CallFormat(name, added_of(tokens)).reader(TOOLS, **options)
    part, rest = reader.add(text), reader.end()
    assert (part.content, rest) == ("", ("", "", ())), text
    return list(part.calls)


def check(calls: list[CallPart]) -> None:
    schemas = {tool.name: tool.parameters or {"type": "object", "additionalProperties": False} for tool in TOOLS}
    for call in calls:
        assert call.name is not None
        jsonschema.validate(json.loads(call.arguments), schemas[call.name])


@pytest.mark.parametrize("special", [True, False], ids=["tokens", "text"])
@pytest.mark.parametrize("name", [name for name in FORMATS if name != "qwen3_coder"])
def test_what_the_grammar_allows_is_read_as_valid_calls(name: str, special: bool) -> None:
    tokens = tokenizer(special=special)
    shape = CallFormat(name, added_of(tokens)).shape(TOOLS)
    seen: set[str | None] = set()
    for seed in range(6):
        found = calls_in(name, tokens, walk(shape.value, tokens, seed))
        assert found
        check(found)
        seen |= {call.name for call in found}

    assert shape.kind == "lark" and len(seen) > 1


ARGUMENTS = {"city": "a</p>", "where": {"x": 1}, "days": 3}


@pytest.mark.parametrize("special", [True, False], ids=["tokens", "text"])
@pytest.mark.parametrize("name", FORMATS)
def test_the_grammar_takes_calls_as_the_format_writes_them(name: str, special: bool) -> None:
    tokens = tokenizer(special=special)
    form = CallFormat(name, added_of(tokens))
    one = form.write([WrittenCall("weather", json.dumps(ARGUMENTS))])
    both = form.write([WrittenCall("weather", json.dumps(ARGUMENTS)), WrittenCall("time", "{}")])

    def takes(text: str, **options: Any) -> bool:
        return typed(text, form.shape(TOOLS, **options).value, tokens)

    assert [json.loads(call.arguments) for call in calls_in(name, tokens, both)] == [ARGUMENTS, {}]
    assert takes(one) and takes(both)
    assert takes(one, parallel=False) and not takes(both, parallel=False)
    assert takes(one, named="weather") and not takes(both, named="weather") and not takes(one, named="time")
    assert not takes("") and not takes("no call") and not takes(one.replace("weather", "unknown"))
    assert not takes(one.replace("days", "months"))


def test_values_between_tags_keep_their_schemas() -> None:
    tokens = tokenizer(special=True)
    form = CallFormat("qwen3_coder", added_of(tokens))
    grammar = form.shape(TOOLS, named="weather").value

    def call(city: str, where: str, unit: str) -> str:
        values = {"city": city, "where": where, "unit": unit}
        text = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
        return f"<tool_call>\n<function=weather>\n{text}</function>\n</tool_call>"

    right = call("Pa\nris", '{"x": 2}', "C")
    assert typed(right, grammar, tokens)
    found = calls_in("qwen3_coder", tokens, right)
    assert json.loads(found[0].arguments) == {"city": "Pa\nris", "where": {"x": 2}, "unit": "C"}
    assert not typed(call("Paris", '{"y": 2}', "C"), grammar, tokens)
    assert not typed(call("Paris", '{"x": 2}', "K"), grammar, tokens)


@pytest.mark.parametrize("special", [True, False], ids=["tokens", "text"])
def test_thinking_that_the_prompt_opened_comes_first(special: bool) -> None:
    tokens = tokenizer(special=special)
    form = CallFormat("hermes", added_of(tokens))
    call = '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
    opened = form.shape(TOOLS, reasoning=THINK, opened=True).value

    assert typed(f"Hm <tool_call> {{\n</think>\n\n{call}", opened, tokens)
    assert typed(f"</think>{call}", opened, tokens) and not typed(call, opened, tokens)
    assert typed(call, form.shape(TOOLS, reasoning=THINK).value, tokens)


def test_special_tokens_stand_in_the_grammar_by_their_numbers() -> None:
    tokens = tokenizer(special=True)
    grammar = CallFormat("mistral_args", added_of(tokens)).shape(TOOLS, named="time").value

    assert f'<[{tokens.token_to_id("[TOOL_CALLS]")}]> "time" <[{tokens.token_to_id("[ARGS]")}]>' in grammar


@pytest.mark.parametrize(
    "schema",
    [
        None,
        {},
        {"properties": {}},
        {"$ref": "#/$defs/A", "$defs": {"A": {"type": "object", "properties": {"a": {"type": "integer"}}}}},
        {"anyOf": [{"properties": {"a": {"type": "integer"}}, "required": ["a"]}, {"maxProperties": 0}]},
        {"type": "object", "properties": {"a": {"type": "integer"}}, "x-guidance": {"item_separator": "!"}},
    ],
)
def test_arguments_are_objects_whatever_the_schema_leaves_out(schema: dict[str, Any] | None) -> None:
    tokens = tokenizer(special=False)
    grammar = CallFormat("json").shape([Tool("f", "", schema)]).value

    assert typed('{"name": "f", "arguments": {}}', grammar, tokens)
    assert typed('{"name": "f", "arguments": {"a": 1}}', grammar, tokens) == (schema is not None)
    assert not typed('{"name": "f", "arguments": "a"}', grammar, tokens)
    assert not typed('{"name": "f", "arguments": [1]}', grammar, tokens)


SKY = {"type": "object", "properties": {"name": {"type": "string"}, "sky": {"$ref": "#/$defs/Sky"}}}
ANSWER = Shape("json_schema", SKY | {"$defs": {"Sky": {"enum": ["clear", "grey"]}}, "additionalProperties": False})


def lark(shape: Shape | None) -> str:
    """As the server compiles it."""
    assert shape is not None
    return shape.value if shape.kind == "lark" else "start: %json " + json.dumps(shape.value)


@pytest.mark.parametrize("special", [True, False], ids=["tokens", "text"])
@pytest.mark.parametrize("name", FORMATS)
def test_a_reply_of_a_shape_may_call_in_its_place(name: str, special: bool) -> None:
    tokens = tokenizer(special=special)
    form = CallFormat(name, added_of(tokens))
    called = form.write([WrittenCall("weather", json.dumps(ARGUMENTS))])
    for answer, right, wrong in (
        (ANSWER, '{"name": "Bob", "sky": "clear"}', '{"sky": "blue"}'),
        (Shape("json_schema", True), "[1]", "one"),
        (Shape("choice", ["yes", 'n"o']), 'n"o', "maybe"),
    ):
        for thought, before in ((None, ""), (THINK, "Hm, {.\n</think>\n\n")):
            both = shape_beside(answer, form, TOOLS, thought=thought)
            alone = shape_beside(answer, form, (), thought=thought)
            if answer.kind == "choice" and name in ("llama3", "json"):
                assert both is None
                continue
            free = called if answer.value is not True or name not in ("llama3", "json") else "{"
            cases = {right: (True, True), wrong: (False, False), "": (False, False), free: (free == called, False)}
            for text, taken in cases.items():
                found = typed(before + text, lark(both), tokens), typed(before + text, lark(alone), tokens)
                assert found == taken, (answer, text)
            assert not before or not typed(right, lark(both), tokens)


def test_a_pattern_or_a_grammar_stands_alone() -> None:
    for answer in (Shape("regex", "a+"), Shape("lark", 'start: "a"')):
        assert shape_beside(answer, CallFormat("json"), (), thought=THINK) is None


def test_a_parameter_that_is_called_like_a_special_token_is_text() -> None:
    tokens = tokenizer(special=True)
    schema = {"type": "object", "properties": {"<|tool_call|>": {"type": "string"}}, "required": ["<|tool_call|>"]}
    form = CallFormat("qwen3_coder", added_of(tokens))
    grammar = form.shape((Tool("time", "", schema),), named="time").value

    assert f"<[{tokens.token_to_id('<|tool_call|>')}]>" not in grammar
    assert '"<|tool_call|>"' in grammar
