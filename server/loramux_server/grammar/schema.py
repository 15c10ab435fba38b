"""A client's JSON schema -> the same with only what llguidance is known to hold; all else is refused by name and place.

What comes out has no annotations and no `oneOf`, its keywords in one order, and each `$ref` leads to a definition of
its own. Drafts 4 to 2020-12 are read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NoReturn
from urllib.parse import unquote

from loramux_server.errors import RequestError
from loramux_server.grammar.disjoint import Disjointness
from loramux_server.grammar.keywords import (
    ANNOTATIONS,
    FORMATS,
    REFUSED,
    REFUSED_FORMATS,
    SUPPORTED,
    ignores_siblings,
    slip_for,
)
from loramux_server.grammar.limits import GrammarLimits
from loramux_server.grammar.patterns import check_pattern, is_finite, may_match
from loramux_server.grammar.reply_check import Normal

TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
_IN_PLACE = ("allOf", "anyOf", "oneOf")  # of the same value as the schema they stand in


def normal_schema(schema: object, param: str, limits: GrammarLimits) -> Normal:
    """
    Raises:
        RequestError: it is no schema, too large, or has something that cannot be held; the message names the place.
    """
    return _Schema(schema, param, limits).normal()


class _Schema:
    """One schema while it is read."""

    def __init__(self, root: object, param: str, limits: GrammarLimits) -> None:
        self._root = root
        self._param = param
        self._limits = limits
        self._nodes = self._references = 0
        self._names: dict[str, str] = {}  # pointer -> name of its definition
        self._unread: list[str] = []
        self._lone_refs = False
        self._property_names: set[str] = set()
        self._one_ofs: list[tuple[dict[str, Any], str]] = []
        self._closed_patterns: list[tuple[str, str]] = []  # (pattern, place), where no other names are allowed
        self._read_value: dict[str, Callable[[Any, str], Any]] = {
            "type": self._types,
            "enum": self._enum,
            "const": lambda value, _: value,
            "pattern": self._pattern,
            "format": self._format,
            "required": self._required,
            "prefixItems": self._schemas,
            "items": self._schema,
            "properties": self._named_schemas,
            "patternProperties": self._pattern_schemas,
            "additionalProperties": self._schema,
            **dict.fromkeys(_IN_PLACE, self._schemas),
            **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), self._number),
            "multipleOf": self._step,
            **dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems"), self._count),
            **dict.fromkeys(("minProperties", "maxProperties"), self._count),
            "$ref": self._reference,
        }

    def normal(self) -> Normal:
        self._check_size()
        if isinstance(self._root, dict):
            draft = self._root.get("$schema", "")
            if not isinstance(draft, str):
                self._wrong("#", "$schema", "a string")
            self._lone_refs = ignores_siblings(draft)
        found = self._schema(self._root, "#")
        definitions: dict[str, Normal] = {}
        while self._unread:
            pointer = self._unread.pop()
            definitions[self._names[pointer]] = self._schema(self._at(pointer), f"#{pointer}")
        _refuse_loops(definitions, {name: pointer for pointer, name in self._names.items()}, self._refuse)
        self._check_patterns()
        self._resolve_one_of(definitions)
        if definitions and isinstance(found, dict):
            found["$defs"] = definitions
        return found

    def _resolve_one_of(self, definitions: Mapping[str, Normal]) -> None:
        disjointness = Disjointness(definitions)
        overlaps = [(disjointness.overlap(schema["oneOf"]), place) for schema, place in self._one_ofs]
        for overlap, place in overlaps:
            if overlap is not None:
                self._refuse(
                    place,
                    f"'oneOf' is not supported where a value might be valid under two of its schemas, as under number "
                    f"{overlap[0]} and {overlap[1]} (from 0); use 'anyOf'",
                )
        for schema, _ in self._one_ofs:
            options = {"anyOf": schema.pop("oneOf")}
            if "anyOf" in schema:
                schema["allOf"] = [*schema.get("allOf", ()), {"anyOf": schema.pop("anyOf")}]
            schema |= options

    def _check_patterns(self) -> None:
        """llguidance takes the names of properties out of what a pattern matches; where nothing is left it ends within
        the object, behind a comma. Schemas are merged where they meet, so names are looked for in all of them."""
        for pattern, place in self._closed_patterns:
            taken = next((name for name in sorted(self._property_names) if may_match(pattern, name)), None)
            if taken is not None and is_finite(pattern):
                self._refuse(
                    place,
                    f"a pattern of few names that also matches the property {json.dumps(taken)[:100]} is not supported "
                    "beside 'additionalProperties': false; write its names into 'properties'",
                )

    def _check_size(self) -> None:
        """Depth first, without recursion, so that nothing behind this can be deep."""
        left: list[tuple[object, int]] = [(self._root, 1)]
        while left:
            value, depth = left.pop()
            if depth > 2 * self._limits.max_depth:
                self._refuse("#", f"it is nested deeper than {2 * self._limits.max_depth} levels", "invalid_value")
            if isinstance(value, dict):
                left += ((each, depth + 1) for each in value.values())
            elif isinstance(value, list):
                left += ((each, depth + 1) for each in value)
        try:
            size = len(json.dumps(self._root, allow_nan=False, separators=(",", ":")).encode())
        except (TypeError, ValueError) as error:
            self._refuse("#", f"it is no JSON: {error}", "invalid_value")
        if size > self._limits.max_bytes:
            self._refuse("#", f"it has {size} bytes, and {self._limits.max_bytes} are allowed", "invalid_value")

    def _refuse(self, place: str, what: str, code: str = "unsupported_value") -> NoReturn:
        raise RequestError(f"the JSON schema at {place}: {what}", param=self._param, code=code)

    def _wrong(self, place: str, keyword: str, wanted: str) -> NoReturn:
        self._refuse(place, f"'{keyword}' must be {wanted}", "invalid_value")

    def _schema(self, value: Any, place: str) -> Normal:
        self._nodes += 1
        if self._nodes > self._limits.max_nodes:
            self._refuse(place, f"there are more than {self._limits.max_nodes} schemas in it", "invalid_value")
        if isinstance(value, bool):
            return value
        if not isinstance(value, dict):
            self._refuse(place, "a schema must be an object or a boolean", "invalid_value")
        for keyword in value:
            self._check_known(keyword, value, place)
        given = {keyword: value[keyword] for keyword in value if keyword in SUPPORTED}
        if self._lone_refs and "$ref" in given:
            given = {"$ref": given["$ref"]}
        self._as_today(given, value, place)
        found: dict[str, Any] = {}
        for keyword in SUPPORTED:
            if keyword in given:
                read = self._read_value[keyword](given[keyword], f"{place}/{_escaped(keyword)}")
                if read is not None or keyword == "const":
                    found[keyword] = read
        self._check_together(found, place)
        return found

    def _check_known(self, keyword: str, schema: Mapping[str, Any], place: str) -> None:
        if keyword in SUPPORTED or keyword == "additionalItems":
            return
        if keyword in ANNOTATIONS:
            if keyword == "$id" and place != "#":
                self._refuse(place, "'$id' below the root is not supported; use '$defs' and '$ref'")
            return
        means_nothing = schema[keyword] is (keyword in ("unevaluatedProperties", "unevaluatedItems"))
        if keyword in ("uniqueItems", "nullable", "unevaluatedProperties", "unevaluatedItems") and means_nothing:
            return
        if keyword in REFUSED:
            self._refuse(place, f"'{keyword}' is not supported; {REFUSED[keyword]}")
        meant = slip_for(keyword)
        if meant is not None:
            self._refuse(place, f"'{keyword[:100]}' is no keyword; did you mean '{meant}'?", "invalid_value")

    def _as_today(self, given: dict[str, Any], schema: Mapping[str, Any], place: str) -> None:
        """Older drafts' tuples and exclusive bounds in the words of 2020-12."""
        if isinstance(given.get("items"), list):
            if "prefixItems" in given:
                self._wrong(place, "items", "a schema where there are 'prefixItems'")
            given["prefixItems"] = given.pop("items")
            if "additionalItems" in schema:
                given["items"] = schema["additionalItems"]
        for bound in ("Minimum", "Maximum"):
            exclusive, plain = f"exclusive{bound}", bound.lower()
            if isinstance(given.get(exclusive), bool):
                if given.pop(exclusive) and plain in given:
                    given[exclusive] = given.pop(plain)

    def _check_together(self, found: dict[str, Any], place: str) -> None:
        """Pairs of keywords that are held alone, but not together."""
        if "oneOf" in found:
            self._one_ofs.append((found, place))
        self._property_names.update(found.get("properties", ()), found.get("required", ()))
        if found.get("additionalProperties") is False:
            patterns = found.get("patternProperties", ())
            self._closed_patterns += (
                (pattern, f"{place}/patternProperties/{_escaped(pattern)}") for pattern in patterns
            )
        required = len(found.get("required", ()))
        if found.get("minProperties", 0) > required + 1:  # a key may be written twice in one object
            self._refuse(
                place,
                "'minProperties' is not supported where it is more than the number of 'required' properties and 1; "
                "name what is required",
            )

    def _types(self, value: Any, place: str) -> str | list[str]:
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list) or not names or not all(name in TYPES for name in names):
            self._wrong(place, "type", f"one of {', '.join(TYPES)}, or a list of them")
        return value if isinstance(value, str) else list(dict.fromkeys(names))

    def _enum(self, value: Any, place: str) -> list[Any]:
        if not isinstance(value, list) or not value:
            self._wrong(place, "enum", "a list of at least one value")
        if len(value) > self._limits.max_choices:
            self._refuse(place, f"'enum' may have {self._limits.max_choices} values at most", "invalid_value")
        return value

    def _pattern(self, value: Any, place: str) -> str:
        if not isinstance(value, str):
            self._wrong(place, "pattern", "a string")
        check_pattern(value, self._param, f"the JSON schema at {place}", self._limits)
        return value

    def _format(self, value: Any, place: str) -> str | None:
        if not isinstance(value, str):
            self._wrong(place, "format", "a string")
        if value in REFUSED_FORMATS:
            self._refuse(place, f"format '{value}' is not supported; supported are {', '.join(sorted(FORMATS))}")
        return value if value in FORMATS else None

    def _required(self, value: Any, place: str) -> list[str]:
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            self._wrong(place, "required", "a list of strings")
        if len(value) > self._limits.max_properties:
            self._refuse(place, f"there may be {self._limits.max_properties} names at most", "invalid_value")
        return list(dict.fromkeys(value))

    def _schemas(self, value: Any, place: str) -> list[Normal]:
        if not isinstance(value, list) or not value:
            self._wrong(place, place.rpartition("/")[2], "a list of at least one schema")
        return [self._schema(each, f"{place}/{index}") for index, each in enumerate(value)]

    def _named_schemas(self, value: Any, place: str) -> dict[str, Normal]:
        if not isinstance(value, dict):
            self._wrong(place, place.rpartition("/")[2], "an object of schemas")
        if len(value) > self._limits.max_properties:
            self._refuse(place, f"there may be {self._limits.max_properties} names at most", "invalid_value")
        return {name: self._schema(each, f"{place}/{_escaped(name)}") for name, each in value.items()}

    def _pattern_schemas(self, value: Any, place: str) -> dict[str, Normal]:
        found = self._named_schemas(value, place)
        for pattern in found:
            check_pattern(pattern, self._param, f"the JSON schema at {place}", self._limits)
        return found

    def _number(self, value: Any, place: str) -> int | float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e300:
            self._wrong(place, place.rpartition("/")[2], "a number between -1e300 and 1e300")
        return value

    def _step(self, value: Any, place: str) -> int | float:
        number = self._number(value, place)
        if not 1e-9 <= number <= 1e9:
            self._wrong(place, "multipleOf", "a number between 1e-9 and 1e9")
        return number

    def _count(self, value: Any, place: str) -> int:
        keyword = place.rpartition("/")[2]
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or value < 0
            or value % 1
            or math.isinf(value)
        ):
            self._wrong(place, keyword, "a whole number of at least 0")
        if value > self._limits.max_count:
            if keyword.startswith("max"):
                return self._limits.max_count
            self._refuse(place, f"'{keyword}' may be {self._limits.max_count} at most", "invalid_value")
        return int(value)

    def _reference(self, value: Any, place: str) -> str:
        if not isinstance(value, str):
            self._wrong(place, "$ref", "a string")
        self._references += 1
        if self._references > self._limits.max_references:
            self._refuse(place, f"there are more than {self._limits.max_references} '$ref's", "invalid_value")
        if value != "#" and not value.startswith("#/"):
            self._refuse(place, f"'$ref' {json.dumps(value)[:200]} is not supported; use one that begins with '#/'")
        pointer = value[1:]
        if pointer not in self._names:
            self._at(pointer, place)
            self._names[pointer] = f"d{len(self._names)}"
            self._unread.append(pointer)
        return f"#/$defs/{self._names[pointer]}"

    def _at(self, pointer: str, place: str = "#") -> Any:
        value: Any = self._root
        for part in unquote(pointer).split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            if isinstance(value, dict) and part in value:
                value = value[part]
            elif isinstance(value, list) and part.isascii() and part.isdigit() and int(part[:9]) < len(value):
                value = value[int(part[:9])]
            else:
                self._refuse(place, f"'$ref' {json.dumps('#' + pointer)[:200]} leads nowhere", "invalid_value")
        return value


def _escaped(name: str) -> str:
    return name[:100].replace("~", "~0").replace("/", "~1")


def _refuse_loops(
    definitions: Mapping[str, Normal], pointers: Mapping[str, str], refuse: Callable[[str, str, str], NoReturn]
) -> None:
    """Definitions that are made of themselves, with nothing of a value between: no value could ever be found valid."""
    needs = {name: _in_place_references(schema) for name, schema in definitions.items()}
    while bottom := [name for name, others in needs.items() if not others & needs.keys()]:
        for name in bottom:
            del needs[name]
    for name in needs:
        refuse(f"#{pointers[name]}", "it is defined by itself alone", "invalid_value")


def _in_place_references(schema: Normal) -> set[str]:
    found: set[str] = set()
    left: list[Normal] = [schema]
    while left:
        each = left.pop()
        if isinstance(each, dict):
            if "$ref" in each:
                found.add(each["$ref"].rpartition("/")[2])
            for keyword in _IN_PLACE:
                left += each.get(keyword, ())
    return found
