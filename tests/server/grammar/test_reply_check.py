"""The small check of whole replies says what jsonschema says."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import pytest

from loramux_server.grammar.limits import GrammarLimits
from loramux_server.grammar.reply_check import problem_of
from loramux_server.grammar.schema import normal_schema

PARTS: list[dict[str, Any]] = [
    {"type": "integer"},
    {"type": ["number", "null"]},
    {"minimum": 2},
    {"exclusiveMaximum": 5},
    {"multipleOf": 0.5},
    {"minLength": 2},
    {"maxLength": 2},
    {"enum": [1, "ab", {"a": 1}, [True]]},
    {"const": {"a": 1.0}},
    {"properties": {"a": {"type": "integer"}, "b": False}},
    {"additionalProperties": {"type": "string"}},
    {"required": ["a"]},
    {"minProperties": 1},
    {"maxProperties": 1},
    {"items": {"type": "integer"}},
    {"prefixItems": [{"type": "null"}, {}]},
    {"minItems": 2},
    {"maxItems": 1},
    {"anyOf": [{"type": "string"}, {"required": ["b"], "type": "object"}]},
    {"allOf": [{"minimum": 1}, {"minLength": 1}]},
    {"$ref": "#/$defs/a"},
]
VALUES: list[Any] = [
    *(None, True, False, 0, 1, 1.0, 2, 2.25, 4.5, 7, -3, "", "a", "ab", "abc", 1e400),
    *([], [1], [None, 1], [None, "x", 3], [True], {}, {"a": 1}, {"a": "x"}, {"b": 1}, {"a": 1, "c": "d"}),
    *({"a": [1, {"a": None}], "c": 3}, [[1], [2, 3]], {"a": True}),
]


def test_parts_and_sums_of_parts_are_judged_as_jsonschema_judges_them() -> None:
    rng = random.Random(7)
    wrong = 0
    for number in range(3000):
        chosen = rng.sample(PARTS, 1 if number < 100 else 2)
        schema = {key: value for part in chosen for key, value in part.items()} | {"$defs": {"a": {"maxItems": 2}}}
        value = rng.choice(VALUES)
        if value == 1e400 and "multipleOf" in schema:
            continue
        normal = normal_schema(schema, "p", GrammarLimits())
        problem = problem_of(json.dumps(value).replace("Infinity", "1e400"), normal)
        wrong += problem is not None

        assert (problem is None) == jsonschema.Draft202012Validator(schema).is_valid(value), (schema, value, problem)
    assert 500 < wrong < 2500


@pytest.mark.parametrize("text", ["", "{", "NaN", "[1,]", "{} x", '"\x00"', "[" * 100_000])
def test_what_is_no_json_is_no_reply(text: str) -> None:
    assert "it is no JSON that can be read" in str(problem_of(text, True))


def test_numbers_of_many_digits_are_read() -> None:
    assert problem_of("9" * 6000, {"type": "integer"}) is not None  # more than a float holds, and Python reads no more
    assert problem_of("9" * 3000, {"type": "integer"}) is None
    assert problem_of("0." + "9" * 6000, {"type": "number", "multipleOf": 0.5}) is None


def test_schemas_that_meet_in_many_ways_are_looked_at_once() -> None:
    """A walk along every path through these would take 2 ** 40 steps."""
    definitions: dict[str, Any] = {
        f"a{number}": {"allOf": [{"$ref": f"#/$defs/a{number + 1}"}, {"$ref": f"#/$defs/a{number + 1}"}]}
        for number in range(40)
    }
    schema = {"$defs": {**definitions, "a40": {"type": "object"}}, "$ref": "#/$defs/a0"}

    assert problem_of('{"a": [1, {}]}', schema) is None
    assert problem_of("3", schema) is not None


def test_a_reply_as_deep_as_it_is_long_is_told_so_and_raises_nothing() -> None:
    schema = normal_schema({"type": "array", "items": {"$ref": "#"}}, "guided_json", GrammarLimits())
    answers = {depth: problem_of("[" * depth + "]" * depth, schema) for depth in (20, 450, 5000)}
    assert answers[20] is None
    assert answers[450] == "it is nested too deeply to be checked"
    assert "no JSON that can be read" in str(answers[5000])
