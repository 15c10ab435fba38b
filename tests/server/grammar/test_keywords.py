"""What llguidance is trusted with was tried: random replies under each keyword, and pairs of them, are valid."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from datetime import date
from decimal import Decimal
from ipaddress import IPv4Address, IPv6Address
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import jsonschema
import pytest

from loramux_server.errors import RequestError
from loramux_server.grammar.keywords import FORMATS, SUPPORTED
from loramux_server.grammar.shape import Shape
from support.grammar_walks import Walk, bytes_tokenizer, grammars_of

Schema = dict[str, Any]

DEFINITIONS: Schema = {
    "o": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False},
    "s": {"type": "string", "maxLength": 4},
}
PARTS: list[Schema] = [
    *({"type": name} for name in ("object", "string", "integer", "number", "array", "boolean")),
    *({"type": ["object", "null"]}, {"type": ["integer", "string"]}),
    *({"minimum": 2.5}, {"maximum": 40}, {"exclusiveMinimum": 3}, {"exclusiveMaximum": 7.5}, {"multipleOf": 3}),
    *({"multipleOf": 0.5}, {"minimum": -20, "maximum": -3}),
    *({"minLength": 2}, {"maxLength": 3}, {"pattern": "^[ab]+$"}, {"pattern": "^b"}, {"format": "date"}),
    *({"prefixItems": [{"type": "integer"}, {"type": "null"}]}, {"items": {"type": "integer"}}, {"items": False}),
    *({"minItems": 2}, {"maxItems": 3}),
    *({"properties": {"a": {"type": "integer"}, "b": {"type": "null"}}}, {"properties": {"b": False}}),
    *({"patternProperties": {"^a": {"type": "integer"}}}, {"patternProperties": {"^[ab]$": {"type": "integer"}}}),
    *({"additionalProperties": False}, {"additionalProperties": {"type": "integer"}}),
    *({"required": ["a"]}, {"required": ["a", "c"]}),
    *({"minProperties": 1}, {"minProperties": 2}, {"maxProperties": 1}, {"maxProperties": 3}),
    *({"enum": ["ab", 4, {"a": 1, "b": None}, [1, None], None]}, {"const": {"a": 2}}, {"const": 6}, {"const": "ab"}),
    *({"$ref": "#/$defs/o"}, {"$ref": "#/$defs/s"}),
    {"allOf": [{"properties": {"a": {"minimum": 3}}}, {"required": ["a"]}]},
    {"anyOf": [{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}, {"minimum": 5}]},
    {"oneOf": [{"type": "string"}, {"type": "array"}]},
    {
        "oneOf": [
            {"type": "object", "properties": {"k": {"const": "x"}}, "required": ["k"]},
            {"type": "object", "properties": {"k": {"const": "y"}}, "required": ["k"]},
        ]
    },
]
OF_OBJECTS = [
    part
    for part in PARTS
    if part.keys()
    & {"properties", "patternProperties", "additionalProperties", "required", "minProperties", "maxProperties"}
]


def replies(schema: Schema, num: int) -> int:
    """Walks that came to an end; all are valid. 0 where the schema is refused."""
    ended = 0
    exact = json.loads(json.dumps(schema), parse_float=Decimal)
    validator = jsonschema.Draft202012Validator(exact, format_checker=jsonschema.FormatChecker(["date"]))
    for seed in range(num):
        try:
            grammar = grammars_of().of(Shape("json_schema", schema), "response_format")
        except RequestError:
            return 0
        walk = Walk(bytes_tokenizer(), grammar, seed, max_tokens=120)
        if walk.ended:
            ended += 1
            validator.validate(json.loads(walk.text, parse_float=Decimal))
    return ended


def merged(*parts: Schema) -> Schema | None:
    keys = [key for part in parts for key in part]
    return {key: value for part in parts for key, value in part.items()} if len(set(keys)) == len(keys) else None


def test_every_supported_keyword_is_tried() -> None:
    assert {key for part in PARTS for key in part} | {"format"} >= set(SUPPORTED)


@pytest.mark.parametrize("part", PARTS, ids=json.dumps)
def test_replies_under_one_keyword_are_valid(part: Schema) -> None:
    if part != {"minProperties": 2}:  # two names may be the same
        assert replies(part | {"$defs": DEFINITIONS}, 6) > 2


@pytest.mark.parametrize("way", ["beside", "allOf", "anyOf"])
@pytest.mark.parametrize("third", range(3))
def test_replies_under_two_keywords_are_valid_or_the_schema_is_refused(way: str, third: int) -> None:
    held = refused = 0
    for one, other in list(itertools.combinations(PARTS, 2))[third::3]:
        both = merged(one, other) if way == "beside" else {way: [one, other]}
        if both is not None:
            found = replies(both | {"$defs": DEFINITIONS}, 2)
            held, refused = held + (found > 0), refused + (found == 0)
    assert held > 3 * refused


def test_replies_under_three_keywords_of_objects_are_valid_or_the_schema_is_refused() -> None:
    held = refused = 0
    for parts in itertools.combinations(OF_OBJECTS, 3):
        together = merged({"type": "object"}, *parts)
        if together is not None:
            found = replies(together, 3)
            held, refused = held + (found > 0), refused + (found == 0)
    assert held > refused


def hostname(text: str) -> None:
    assert len(text) <= 253
    assert all(re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?", part) for part in text.split("."))


def moment(text: str) -> None:
    hours, _, zone = text[:8], text[8:], re.search(r"(?i)(z|[+-]\d\d:\d\d)$", text)
    assert zone is not None and re.fullmatch(r"([01]\d|2[0-3]):[0-5]\d:([0-5]\d|60)", hours)


def day(text: str) -> None:
    date.fromisoformat(text if not text.endswith("02-29") else "2024-02-29")  # of every year, says llguidance


def day_and_moment(text: str) -> None:
    day(text[:10])
    assert text[10] in "tT"
    moment(text[11:])


READ: dict[str, Callable[[str], object]] = {
    "date": day,
    "date-time": day_and_moment,
    "time": moment,
    "duration": lambda text: re.fullmatch(r"P(?=.)(\d+[YMWD])*(T(?=.)(\d+[HMS])*)?", text) or 1 / 0,
    "email": lambda text: re.fullmatch(r"[^@\s]+@[^@\s]+", text) or 1 / 0,
    "hostname": hostname,
    "ipv4": IPv4Address,
    "ipv6": IPv6Address,
    "uri": lambda text: urlsplit(text).scheme or 1 / 0,
    "uuid": UUID,
}


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_replies_under_a_format_are_of_that_format(name: str) -> None:
    ended = 0
    for seed in range(60):
        schema = {"type": "string", "format": name, "maxLength": 60}
        walk = Walk(bytes_tokenizer(), grammars_of().of(Shape("json_schema", schema), "p"), seed, max_tokens=80)
        ended += walk.ended
        if walk.ended and not json.loads(walk.text).startswith("0000-"):  # Python has no year 0
            READ[name](json.loads(walk.text))
    assert ended > 10
