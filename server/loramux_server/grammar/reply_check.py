"""A reply against its schema, once, at its end: what a grammar let through wrongly must not pass as complete."""

from __future__ import annotations

import json
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import Any

_MOST_DIGITS = 4000  # Python reads no longer whole number
_NONE = object()

Normal = dict[str, Any] | bool  # a schema as `schema.py` makes it


def problem_of(text: str, schema: Normal) -> str | None:
    """What is wrong with this reply, for a client; None if nothing is.

    Checked is all that a normal schema can say, but for `pattern`, `format` and the names of `patternProperties`: these
    are made of automata, and matching them anew takes time without bounds.
    """
    try:
        value = json.loads(text, parse_int=_whole, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        return f"it is no JSON that can be read: {error}"
    definitions = schema.get("$defs", {}) if isinstance(schema, dict) else {}
    try:
        return SchemaCheck(definitions).problem(value, schema, "#")
    except RecursionError:  # a schema may refer to itself, so a reply may be as deep as it is long
        return "it is nested too deeply to be checked"


def _whole(digits: str) -> int | float:
    return int(digits) if len(digits) < _MOST_DIGITS else float(digits)


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


class SchemaCheck:
    """Values against normal schemas that share definitions."""

    def __init__(self, definitions: Mapping[str, Normal]) -> None:
        self._definitions = definitions
        self._found: dict[tuple[int, int], str | None] = {}  # each schema looks at each value once

    def problem(self, value: Any, schema: Mapping[str, Any] | bool, place: str) -> str | None:
        if isinstance(schema, bool):
            return None if schema else f"nothing may stand at {place}"
        key = (id(value), id(schema))  # both live as long as this does
        if key not in self._found:
            self._found[key] = self._problem(value, schema, place)
        return self._found[key]

    def _problem(self, value: Any, schema: Mapping[str, Any], place: str) -> str | None:
        types = schema.get("type", _NONE)
        if types is not _NONE and not any(
            name in json_type(value) for name in ([types] if isinstance(types, str) else types)
        ):
            return f"{place} is not of type {types}"
        if "const" in schema and not same_json(value, schema["const"]):
            return f"{place} is not its const"
        if "enum" in schema and not any(same_json(value, each) for each in schema["enum"]):
            return f"{place} is none of its enum"
        if "$ref" in schema:
            wrong = self.problem(value, self._definitions[schema["$ref"].rpartition("/")[2]], place)
            if wrong is not None:
                return wrong
        for each in schema.get("allOf", ()):
            wrong = self.problem(value, each, place)
            if wrong is not None:
                return wrong
        if "anyOf" in schema and all(self.problem(value, each, place) for each in schema["anyOf"]):
            return f"{place} is valid under none of its anyOf"
        if "oneOf" in schema and sum(self.problem(value, each, place) is None for each in schema["oneOf"]) != 1:
            return f"{place} is not valid under exactly one of its oneOf"
        if isinstance(value, dict):
            return self._of_object(value, schema, place)
        if isinstance(value, list):
            return self._of_array(value, schema, place)
        if isinstance(value, str):
            return _out_of_bounds(len(value), schema, "minLength", "maxLength", place)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return _number_problem(value, schema, place)
        return None

    def _of_object(self, value: dict[str, Any], schema: Mapping[str, Any], place: str) -> str | None:
        missing = [name for name in schema.get("required", ()) if name not in value]
        if missing:
            return f"{place} lacks {missing[0]!r}"
        named = schema.get("properties", {})
        for name, each in value.items():
            if name in named:
                wrong = self.problem(each, named[name], f"{place}/{name}")
            elif "patternProperties" in schema:  # whose this name is, is not known here
                others = [*schema["patternProperties"].values(), schema.get("additionalProperties", True)]
                wrongs = [self.problem(each, other, f"{place}/{name}") for other in others]
                wrong = None if None in wrongs else wrongs[0]
            else:
                wrong = self.problem(each, schema.get("additionalProperties", True), f"{place}/{name}")
            if wrong is not None:
                return wrong
        return _out_of_bounds(len(value), schema, "minProperties", "maxProperties", place)

    def _of_array(self, value: list[Any], schema: Mapping[str, Any], place: str) -> str | None:
        first = schema.get("prefixItems", ())
        for index, each in enumerate(value):
            one = first[index] if index < len(first) else schema.get("items", True)
            wrong = self.problem(each, one, f"{place}/{index}")
            if wrong is not None:
                return wrong
        return _out_of_bounds(len(value), schema, "minItems", "maxItems", place)


def json_type(value: Any) -> tuple[str, ...]:
    """What `type` may call it."""
    if isinstance(value, bool) or value is None:
        return ("null" if value is None else "boolean",)
    if isinstance(value, (int, float)):
        return ("integer", "number") if isinstance(value, int) or value % 1 == 0 else ("number",)
    return ("string" if isinstance(value, str) else "array" if isinstance(value, list) else "object",)


def same_json(one: Any, other: Any) -> bool:
    """Equal as JSON: true is not 1."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same_json(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same_json, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


def _out_of_bounds(count: int, schema: Mapping[str, Any], least: str, most: str, place: str) -> str | None:
    if count < schema.get(least, 0):
        return f"{place} has less than its {least}"
    if most in schema and count > schema[most]:
        return f"{place} has more than its {most}"
    return None


def _number_problem(value: int | float, schema: Mapping[str, Any], place: str) -> str | None:
    if "minimum" in schema and value < schema["minimum"]:
        return f"{place} is below its minimum"
    if "maximum" in schema and value > schema["maximum"]:
        return f"{place} is above its maximum"
    if "exclusiveMinimum" in schema and value <= schema["exclusiveMinimum"]:
        return f"{place} is not above its exclusiveMinimum"
    if "exclusiveMaximum" in schema and value >= schema["exclusiveMaximum"]:
        return f"{place} is not below its exclusiveMaximum"
    if "multipleOf" in schema:
        try:
            if Decimal(repr(value)) % Decimal(repr(schema["multipleOf"])):
                return f"{place} is no multiple of its multipleOf"
        except InvalidOperation:  # more digits than a decimal has: the grammar alone holds it
            return None
    return None
