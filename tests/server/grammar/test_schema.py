"""Schemas are read in all drafts, and what cannot be held is refused by name and place."""

from __future__ import annotations

from typing import Any

import pytest

from loramux_server.errors import RequestError
from loramux_server.grammar.keywords import REFUSED, REFUSED_FORMATS
from loramux_server.grammar.limits import GrammarLimits
from loramux_server.grammar.schema import normal_schema


def normal(schema: Any, **limits: int) -> Any:
    return normal_schema(schema, "response_format", GrammarLimits(**limits))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"title": "A", "type": "string", "x-order": 3, "markdownDescription": "b"}, {"type": "string"}),
        ({"type": ["null", "string", "null"]}, {"type": ["null", "string"]}),
        ({"minimum": 3, "exclusiveMinimum": True}, {"exclusiveMinimum": 3}),
        ({"maximum": 3, "exclusiveMaximum": False}, {"maximum": 3}),
        ({"items": [{"type": "null"}], "additionalItems": False}, {"prefixItems": [{"type": "null"}], "items": False}),
        ({"items": {"type": "null"}, "additionalItems": False}, {"items": {"type": "null"}}),
        ({"uniqueItems": False, "unevaluatedProperties": True, "nullable": False}, {}),
        ({"format": "int32", "type": "integer"}, {"type": "integer"}),
        ({"maxLength": 3.0}, {"maxLength": 3}),
        ({"maxItems": 10**9}, {"maxItems": 100_000}),
        ({"const": None}, {"const": None}),
        ({"required": ["a", "a"], "properties": {"a": True}}, {"properties": {"a": True}, "required": ["a"]}),
        (True, True),
        (False, False),
    ],
)
def test_a_schema_is_written_in_the_words_of_today(schema: Any, expected: Any) -> None:
    assert normal(schema) == expected


def test_references_lead_to_definitions_of_their_own_and_others_are_left_out() -> None:
    schema = {
        "$defs": {"a/b": {"properties": {"next": {"$ref": "#/$defs/a~1b"}}}, "unused": {"not": {}}},
        "properties": {"x": {"$ref": "#/$defs/a~1b"}, "y": {"$ref": "#/properties/x"}, "z": {"$ref": "#/%24defs/a~1b"}},
    }
    found = normal(schema)

    assert found["$defs"][found["properties"]["x"]["$ref"].removeprefix("#/$defs/")] == {
        "properties": {"next": found["properties"]["x"]}
    }
    assert "not" not in str(found)


def test_beside_a_reference_old_drafts_hold_nothing() -> None:
    schema = {"definitions": {"a": {"type": "string"}}, "$ref": "#/definitions/a", "maxLength": 3}

    assert "maxLength" in normal(schema)
    assert "maxLength" not in normal({**schema, "$schema": "http://json-schema.org/draft-07/schema#"})


@pytest.mark.parametrize("keyword", sorted(REFUSED))
def test_a_keyword_that_cannot_be_held_is_refused_by_name_and_place(keyword: str) -> None:
    with pytest.raises(RequestError, match=r"at #/properties/a~1b/items: ") as caught:
        normal({"properties": {"a/b": {"items": {keyword: True if keyword == "uniqueItems" else {"type": "null"}}}}})

    assert f"'{keyword}'" in str(caught.value)
    assert caught.value.param == "response_format"
    assert caught.value.code == "unsupported_value"


@pytest.mark.parametrize("name", sorted(REFUSED_FORMATS))
def test_a_format_that_cannot_be_held_is_refused(name: str) -> None:
    with pytest.raises(RequestError, match=f"format '{name}' is not supported"):
        normal({"type": "string", "format": name})


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (
            {"properties": {"a": {"maxLenght": 3}}},
            "#/properties/a: 'maxLenght' is no keyword; did you mean 'maxLength'",
        ),
        ({"requried": ["a"]}, "did you mean 'required'"),
        ({"type": "strin"}, "'type' must be one of"),
        ({"type": []}, "'type' must be one of"),
        ({"enum": []}, "'enum' must be a list of at least one value"),
        ({"minLength": -1}, "'minLength' must be a whole number"),
        ({"minLength": True}, "'minLength' must be a whole number"),
        ({"minLength": 1e9}, "'minLength' may be 100000 at most"),
        ({"minimum": "3"}, "'minimum' must be a number"),
        ({"multipleOf": 0}, "'multipleOf' must be a number between"),
        ({"required": "a"}, "'required' must be a list of strings"),
        ({"properties": []}, "'properties' must be an object of schemas"),
        ({"items": 3}, "a schema must be an object or a boolean"),
        ({"anyOf": []}, "'anyOf' must be a list of at least one schema"),
        ({"$ref": "https://example.com/a"}, "use one that begins with '#/'"),
        ({"$ref": "#anchor"}, "use one that begins with '#/'"),
        ({"$ref": "#/$defs/a"}, "leads nowhere"),
        ({"items": {"$id": "https://example.com/a"}}, "'\\$id' below the root is not supported"),
        ({"$ref": "#"}, "defined by itself alone"),
        ({"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"}, "defined by itself alone"),
        ({"minProperties": 3, "required": ["a"]}, "'minProperties' is not supported where"),
        ({"pattern": "(?=a)"}, "look-ahead"),
        ({"patternProperties": {"\\bx": True}}, "word boundary"),
        (
            {"oneOf": [{"type": "number"}, {"type": "integer"}]},
            "valid under two of its schemas, as under number 0 and 1",
        ),
        ("string", "a schema must be an object or a boolean"),
        ({"const": float("nan")}, "it is no JSON"),
    ],
)
def test_what_is_wrong_with_a_schema_is_said(schema: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        normal(schema)


def test_a_pattern_of_few_names_beside_one_of_the_properties_is_refused_where_no_others_are_allowed() -> None:
    """llguidance 1.9.1 leaves no name to the pattern, and ends behind a comma."""
    schema = {
        "properties": {"a": {"type": "integer"}},
        "patternProperties": {"^a$": {"type": "integer"}},
        "additionalProperties": False,
    }
    with pytest.raises(RequestError, match="#/patternProperties/\\^a\\$: a pattern of few names"):
        normal(schema)
    with pytest.raises(RequestError, match="a pattern of few names"):
        normal({"allOf": [{"properties": {"a": True}}, {k: v for k, v in schema.items() if k != "properties"}]})
    normal(schema | {"patternProperties": {"^a": True}})
    normal(schema | {"additionalProperties": True})
    normal(schema | {"patternProperties": {"^[b-z]$": True}})


def nested(depth: int) -> Any:
    schema: Any = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "limits", "message"),
    [
        (nested(5000), {}, "nested deeper than"),
        ({"enum": list(range(50))}, {"max_choices": 49}, "'enum' may have 49"),
        ({"enum": ["x" * 200]}, {"max_bytes": 100}, "and 100 are allowed"),
        ({"properties": {str(number): True for number in range(30)}}, {"max_properties": 29}, "29 names at most"),
        ({"anyOf": [{"type": "null"}] * 30}, {"max_nodes": 30}, "more than 30 schemas"),
        ({"$defs": {"a": {}}, "anyOf": [{"$ref": "#/$defs/a"}] * 30}, {"max_references": 29}, "more than 29 '\\$ref's"),
    ],
)
def test_a_schema_is_bounded(schema: Any, limits: dict[str, int], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        normal(schema, **limits)


def thing(kind: str, **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"kind": {"const": kind}, **more}, "required": ["kind"]}


@pytest.mark.parametrize(
    "options",
    [
        [{"type": "string"}, {"type": "array"}, {"enum": [1, None]}],
        [thing("a"), thing("b", x={"type": "null"}), thing("c")],
        [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}],
        [{"anyOf": [{"const": 1}, {"const": 2}]}, {"allOf": [{"type": "integer", "minimum": 5}]}, {"const": 3}],
        [{"const": "x"}, {"type": "string", "minLength": 2}],
    ],
)
def test_one_of_schemas_that_share_no_value_is_any_of_them(options: list[Any]) -> None:
    found = normal({"$defs": {"a": thing("a"), "b": thing("b")}, "oneOf": options, "anyOf": [True, {"type": "null"}]})

    assert len(found["anyOf"]) == len(options)
    assert "oneOf" not in found
    assert len(found["allOf"]) == 1


@pytest.mark.parametrize(
    "options",
    [
        [
            {"properties": {"k": {"const": 1}}, "required": ["k"]},
            {"properties": {"k": {"const": 2}}, "required": ["k"]},
        ],
        [thing("a"), {"type": "object", "properties": {"kind": {"const": "b"}}}],
        [{"const": 1}, {"const": 1.0}],
        [{"type": "string", "pattern": "^a"}, {"type": "string", "pattern": "^b"}],
        [True, {"type": "string"}],
        [{"enum": [True, 2]}, {"enum": [1, True]}],
    ],
)
def test_one_of_schemas_that_may_share_a_value_is_refused(options: list[Any]) -> None:
    with pytest.raises(RequestError, match="number 0 and 1"):
        normal({"oneOf": options})
