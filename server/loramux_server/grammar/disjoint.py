"""Whether no value is valid under two schemas at once: then `oneOf` of them is `anyOf`, which a grammar can hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loramux_server.grammar.reply_check import Normal, SchemaCheck, json_type

_TYPES = frozenset(["null", "boolean", "integer", "number", "string", "array", "object"])
_MOST_STEPS = 50_000  # of one proof; a schema that needs more counts as not proven
_DEPTH = 12


class Disjointness:
    """Proofs over one schema's definitions. What cannot be proven soon counts as not so."""

    def __init__(self, definitions: Mapping[str, Normal]) -> None:
        self._definitions = definitions
        self._steps = 0

    def overlap(self, schemas: list[Normal]) -> tuple[int, int] | None:
        """The first two (their places) that may share a value; None: no two do."""
        for later in range(len(schemas)):
            for earlier in range(later):
                if not self._apart(schemas[earlier], schemas[later], 0):
                    return earlier, later
        return None

    def _apart(self, one: Normal, other: Normal, depth: int) -> bool:
        self._steps += 1
        if one is False or other is False:
            return True
        if isinstance(one, bool) or isinstance(other, bool) or depth > _DEPTH or self._steps > _MOST_STEPS:
            return False
        return (
            not _types(one) & _types(other)
            or self._apart_by_values(one, other)
            or self._apart_by_values(other, one)
            or self._apart_by_parts(one, other, depth)
            or self._apart_by_parts(other, one, depth)
            or self._apart_by_properties(one, other, depth)
        )

    def _apart_by_values(self, one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
        """All that one of them allows are a few values, none of which is valid under the other."""
        values = [one["const"]] if "const" in one else one.get("enum")
        if values is None:
            return False
        known = [other["const"]] if "const" in other else other.get("enum")
        if known is not None and all(isinstance(value, str) for value in [*values, *known]):
            return not set(values) & set(known)
        check = SchemaCheck(self._definitions)
        return all(check.problem(value, other, "#") is not None for value in values)

    def _apart_by_parts(self, one: Mapping[str, Any], other: Normal, depth: int) -> bool:
        if "$ref" in one and self._apart(self._definitions[one["$ref"].rpartition("/")[2]], other, depth + 1):
            return True
        if any(self._apart(each, other, depth + 1) for each in one.get("allOf", ())):
            return True
        return any(
            all(self._apart(each, other, depth + 1) for each in one[keyword])
            for keyword in ("anyOf", "oneOf")
            if keyword in one
        )

    def _apart_by_properties(self, one: Mapping[str, Any], other: Mapping[str, Any], depth: int) -> bool:
        """Both are objects that need a property, and no value of it suits both."""
        if _types(one) != {"object"} or _types(other) != {"object"}:
            return False
        ours, theirs = one.get("properties", {}), other.get("properties", {})
        return any(
            self._apart(ours[name], theirs[name], depth + 1)
            for name in one.get("required", ())
            if name in other.get("required", ()) and name in ours and name in theirs
        )


def _types(schema: Mapping[str, Any]) -> frozenset[str]:
    """Of values that may be valid, a whole number being a number too."""
    found = _TYPES
    if "type" in schema:
        names = {schema["type"]} if isinstance(schema["type"], str) else set(schema["type"])
        found = frozenset(names | ({"integer"} if "number" in names else set()))
    for values in ([schema["const"]] if "const" in schema else None, schema.get("enum")):
        if values is not None:
            found &= frozenset(name for value in values for name in json_type(value))
    return found
