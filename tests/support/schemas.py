"""300 JSON schemas of our own, of the kinds that people send: written by templates, seeded, the same in every run."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

Schema = dict[str, Any]

_WORDS = (
    "id name title status owner email city street zip country amount price currency quantity created updated kind "
    "level tags labels source target region bucket image port path host user account message score rating language "
    "version"
).split()
_NUM_EACH = 30


def corpus() -> Iterator[tuple[str, Schema]]:
    """(name, schema) of each."""
    for kind, make in _KINDS.items():
        rng = random.Random(f"loramux {kind}")
        for number in range(_NUM_EACH):
            yield f"{kind} {number}", make(rng, number)


def _words(rng: random.Random, low: int, high: int) -> list[str]:
    return rng.sample(_WORDS, rng.randint(low, high))


def _text(rng: random.Random) -> str:
    return f"The {' '.join(_words(rng, 2, 5))} of it."


def _leaf(rng: random.Random, *, hard: bool = False) -> Schema:
    """A value that is no object and no list."""
    easy: list[Callable[[], Schema]] = [
        lambda: {"type": "string"},
        lambda: {"type": "integer"},
        lambda: {"type": "number"},
        lambda: {"type": "boolean"},
        lambda: {"type": "string", "enum": _words(rng, 2, 6)},
        lambda: {"type": "string", "description": _text(rng), "default": "x"},
        lambda: {"type": ["string", "null"]},
    ]
    more: list[Callable[[], Schema]] = [
        lambda: {"type": "integer", "minimum": rng.randint(-50, 0), "maximum": rng.randint(1, 5000)},
        lambda: {"type": "number", "exclusiveMinimum": 0, "maximum": rng.choice([1, 10.5, 99.75])},
        lambda: {"type": "integer", "multipleOf": rng.choice([2, 5, 10, 100])},
        lambda: {"type": "string", "minLength": rng.randint(1, 3), "maxLength": rng.randint(4, 80)},
        lambda: {"type": "string", "pattern": rng.choice(_PATTERNS)},
        lambda: {"type": "string", "format": rng.choice(["date", "date-time", "uuid", "ipv4", "time", "hostname"])},
        lambda: {"const": rng.choice(["v1", 7, True, None])},
        lambda: {"enum": [1, "one", None, True]},
        lambda: {"anyOf": [{"type": "integer"}, {"type": "string", "maxLength": 12}]},
    ]
    return rng.choice(easy + more if hard else easy)()


_PATTERNS = (
    r"^[a-z][a-z0-9-]{0,20}$",
    r"^\d{3}-\d{2}-\d{4}$",
    r"^(GET|PUT|POST|DELETE)$",
    r"^v\d+(\.\d+){0,2}$",
    r"^#[0-9a-fA-F]{6}$",
    r"^[A-Z]{2,3}$",
    r"^\+?[0-9 ]{4,14}$",
    r"^[^/\s]{1,16}(/[^/\s]{1,16}){0,3}$",
)


def _object(rng: random.Random, depth: int, *, hard: bool = False, closed: float = 0.5) -> Schema:
    properties: Schema = {}
    for name in _words(rng, 2, 6):
        turn = rng.random()
        if depth and turn < 0.2:
            properties[name] = _object(rng, depth - 1, hard=hard, closed=closed)
        elif depth and turn < 0.4:
            item = _object(rng, depth - 1, hard=hard) if rng.random() < 0.3 else _leaf(rng, hard=hard)
            properties[name] = {"type": "array", "items": item}
            if hard:
                properties[name] |= rng.choice([{}, {"minItems": 1}, {"maxItems": 4}, {"minItems": 2, "maxItems": 5}])
        else:
            properties[name] = _leaf(rng, hard=hard)
    found: Schema = {"type": "object", "properties": properties}
    names = list(properties)
    found["required"] = rng.sample(names, rng.randint(0, len(names)))
    if rng.random() < closed:
        found["additionalProperties"] = False
    return found


def _trivial(rng: random.Random, number: int) -> Schema:
    found = _leaf(rng, hard=number % 2 == 1) if number % 3 else {"type": "array", "items": _leaf(rng)}
    return {"title": f"Value {number}"} | found


def _function_call(rng: random.Random, number: int) -> Schema:
    arguments = _object(rng, number % 3, closed=0.3)
    if number % 2:
        return arguments
    return {
        "type": "object",
        "properties": {"name": {"const": f"{rng.choice(_WORDS)}_{rng.choice(_WORDS)}"}, "arguments": arguments},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _strict(rng: random.Random, number: int) -> Schema:
    """As OpenAI wants it: all required, nothing else allowed, optional ones nullable."""

    def tight(schema: Schema) -> Schema:
        if schema.get("type") == "object":
            schema["properties"] = {name: tight(each) for name, each in schema["properties"].items()}
            schema |= {"required": list(schema["properties"]), "additionalProperties": False}
        elif schema.get("type") == "array":
            schema["items"] = tight(schema["items"])
        return schema

    found = tight(_object(rng, 2))
    if number % 3 == 0:
        found["properties"]["children"] = {"type": "array", "items": {"$ref": "#"}}
        found["required"].append("children")
    if number % 3 == 1:
        found["$defs"] = {"step": tight(_object(rng, 0))}
        found["properties"]["steps"] = {"type": "array", "items": {"$ref": "#/$defs/step"}}
        found["required"].append("steps")
    return found


def _event(rng: random.Random, number: int) -> Schema:
    """As event trackers keep them."""
    return {
        "$schema": "http://events.example.com/schemas/self-desc/jsonschema/1-0-0#",
        "description": _text(rng),
        "self": {"vendor": "com.example", "name": f"event_{number}", "format": "jsonschema", "version": "1-0-0"},
        "type": "object",
        "properties": {
            **{
                name: {"type": ["string", "null"], "maxLength": rng.choice([36, 255, 4096])}
                for name in _words(rng, 1, 4)
            },
            "eventId": {"type": "string", "format": "uuid"},
            "timestamp": {"type": "string", "format": "date-time"},
            "position": {"type": ["integer", "null"], "minimum": 0, "maximum": 32767},
            "ratio": {"type": ["number", "null"], "minimum": 0, "maximum": 1},
        },
        "required": ["eventId", *rng.choice([[], ["timestamp"], ["position", "timestamp"]])],
        "additionalProperties": False,
    }


def _manifest(rng: random.Random, number: int) -> Schema:
    """As clusters are configured."""
    text = {"type": "string"}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": f"Manifest {number}",
        "type": "object",
        "x-kubernetes-group-version-kind": [{"group": "apps", "kind": "Deployment", "version": "v1"}],
        "definitions": {
            "meta": {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9]{0,20}[a-z0-9])?$"},
                    "labels": {"type": "object", "additionalProperties": text},
                    "annotations": {"type": ["object", "null"], "additionalProperties": text},
                },
                "required": ["name"],
            },
            "quantity": {
                "anyOf": [{"type": "integer", "format": "int32"}, {"type": "string", "pattern": r"^\d{1,4}[kMG]i?$"}]
            },
            "container": {
                "type": "object",
                "properties": {
                    "name": text,
                    "image": text,
                    "command": {"type": "array", "items": text, "x-kubernetes-list-type": "atomic"},
                    "limits": {"type": "object", "additionalProperties": {"$ref": "#/definitions/quantity"}},
                    "ports": {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "properties": {
                                "containerPort": {"type": "integer", "minimum": 1, "maximum": 65535},
                                "protocol": {"enum": ["TCP", "UDP"]},
                            },
                            "required": ["containerPort"],
                            "additionalProperties": False,
                        },
                    },
                },
                "required": rng.choice([["name"], ["name", "image"]]),
            },
        },
        "properties": {
            "apiVersion": {"const": "apps/v1"},
            "kind": {"enum": rng.choice([["Deployment"], ["Pod", "Job"]])},
            "metadata": {"$ref": "#/definitions/meta"},
            "spec": {
                "type": "object",
                "properties": {
                    "replicas": {"type": "integer", "format": "int32", "minimum": 0},
                    "containers": {"type": "array", "minItems": 1, "items": {"$ref": "#/definitions/container"}},
                    **{name: _leaf(rng) for name in _words(rng, 0, number % 5)},
                },
                "required": ["containers"],
            },
        },
        "required": ["apiVersion", "kind", "metadata", "spec"],
        "additionalProperties": False,
    }


def _config(rng: random.Random, number: int) -> Schema:
    """As editors check configuration files with."""
    step = {
        "type": "object",
        "properties": {
            "run": {"type": "string", "markdownDescription": _text(rng)},
            "with": {"type": "object", "additionalProperties": {"type": ["string", "integer", "boolean"]}},
            "timeout-minutes": {"type": "number", "exclusiveMinimum": 0},
        },
        "anyOf": [{"required": ["run"]}, {"required": ["with"]}],
    }
    return {
        "$schema": rng.choice(["http://json-schema.org/draft-04/schema#", "http://json-schema.org/draft-07/schema"]),
        "$id": f"https://example.com/config-{number}.json",
        "title": "A workflow",
        "definitions": {"step": step, "names": {"type": "array", "items": {"type": "string"}, "minItems": 1}},
        "type": "object",
        "properties": {
            "name": {"type": "string", "defaultSnippets": []},
            "on": {"oneOf": [{"enum": ["push", "pull_request"]}, {"$ref": "#/definitions/names"}]},
            "env": {
                "type": "object",
                "patternProperties": {"^[A-Z_]+$": {"type": "string"}},
                "additionalProperties": False,
            },
            "jobs": {
                "type": "object",
                "patternProperties": {
                    "^[a-z_][a-z0-9_-]*$": {
                        "type": "object",
                        "properties": {
                            "needs": {"$ref": "#/definitions/names"},
                            "steps": {"type": "array", "items": {"$ref": "#/definitions/step"}},
                            **{name: _leaf(rng, hard=True) for name in _words(rng, 0, 3)},
                        },
                    }
                },
                "minProperties": 1,
                "additionalProperties": False,
            },
        },
        "required": ["on", "jobs"] if number % 2 else ["jobs"],
    }


def _model(rng: random.Random, number: int) -> Schema:
    """As Python's model classes write theirs."""
    kinds = _words(rng, 2, 4)
    definitions: Schema = {
        f"Of{kind.title()}": {
            "title": f"Of{kind.title()}",
            "type": "object",
            "properties": {"kind": {"const": kind, "title": "Kind", "type": "string"}, **_object(rng, 0)["properties"]},
            "required": ["kind"],
        }
        for kind in kinds
    }
    definitions["Node"] = {
        "type": "object",
        "title": "Node",
        "properties": {
            "value": {"title": "Value", "type": "integer"},
            "left": {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}], "default": None},
            "right": {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}], "default": None},
        },
        "required": ["value"],
    }
    for each in definitions.values():
        each["properties"].pop("kind", None) if each["title"] == "Node" else None
    choice: Schema = {
        rng.choice(["anyOf", "oneOf"]): [{"$ref": f"#/$defs/{name}"} for name in definitions if name != "Node"]
    }
    if "oneOf" in choice:
        choice["discriminator"] = {"propertyName": "kind"}
    pair = {"type": "array", "prefixItems": [_leaf(rng), _leaf(rng)], "minItems": 2, "maxItems": 2}
    return {
        "$defs": definitions,
        "title": f"Model{number}",
        "type": "object",
        "properties": {
            "item": choice,
            "tree": {"$ref": "#/$defs/Node"},
            "pair": {**pair, "title": "Pair"},
            "when": {"anyOf": [{"type": "string", "format": "date"}, {"type": "null"}], "title": "When"},
            "table": {"type": "object", "additionalProperties": _leaf(rng), "title": "Table"},
        },
        "required": rng.choice([["item"], ["item", "pair"], ["tree", "table"]]),
    }


def _article(rng: random.Random, number: int) -> Schema:
    """As content is described in parts that are put together."""
    return {
        "$schema": "http://json-schema.org/draft-04/schema#",
        "definitions": {
            "dated": {"type": "object", "properties": {"created": {"type": "string", "format": "date-time"}}},
            "named": {
                "type": "object",
                "properties": {"name": {"type": "string", "minLength": 1}},
                "required": ["name"],
            },
            "geo": {
                "type": "object",
                "properties": {
                    "lat": {"type": "number", "minimum": -90, "maximum": 90},
                    "lon": {"type": "number", "minimum": -180, "maximum": 180, "exclusiveMaximum": True},
                },
                "required": ["lat", "lon"],
                "additionalProperties": False,
            },
        },
        "allOf": [
            {"$ref": "#/definitions/named"},
            *([{"$ref": "#/definitions/dated"}] if number % 2 else []),
            {
                "type": "object",
                "properties": {
                    "where": {"$ref": "#/definitions/geo"},
                    "words": {"type": "integer", "minimum": 0, "exclusiveMinimum": number % 3 == 0},
                    "size": {
                        "type": "array",
                        "items": [{"type": "integer"}, {"type": "integer"}],
                        "additionalItems": False,
                    },
                    **{name: _leaf(rng) for name in _words(rng, 1, 4) if name not in ("name", "created")},
                },
            },
        ],
    }


def _hard(rng: random.Random, number: int) -> Schema:
    return _object(rng, 3, hard=True)


def _refused(rng: random.Random, number: int) -> Schema:
    """With something that cannot be held, somewhere within."""
    wrong: list[Schema] = [
        {"type": "array", "items": {"type": "string"}, "uniqueItems": True},
        {"type": "object", "if": {"required": ["a"]}, "then": {"required": ["b"]}},
        {"not": {"type": "string"}},
        {"type": "object", "dependentRequired": {"a": ["b"]}},
        {"type": "object", "propertyNames": {"pattern": "^a"}},
        {"type": "array", "contains": {"const": 1}},
        {"$ref": "https://example.com/other.json"},
        {"type": "object", "unevaluatedProperties": False},
        {"type": "string", "pattern": "^(?!x)y"},
        {"type": "string", "format": "iri"},
        {"type": "object", "minProperties": 3},
        {"oneOf": [{"type": "number"}, {"type": "integer"}]},
        {"type": "string", "maxLenght": 3},
        {"type": "strin"},
        {"type": "object", "properties": {"a": {"enum": []}}},
    ]
    found = _object(rng, 1, closed=0)
    found["properties"]["wrong"] = wrong[number % len(wrong)]
    return found


_KINDS: dict[str, Callable[[random.Random, int], Schema]] = {
    "trivial": _trivial,
    "function call": _function_call,
    "strict": _strict,
    "event": _event,
    "manifest": _manifest,
    "config": _config,
    "model": _model,
    "article": _article,
    "hard": _hard,
    "refused": _refused,
}
