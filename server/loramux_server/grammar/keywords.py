"""What may stand in a JSON schema: what holds a reply, what says nothing about it, what cannot be held.

Which keywords llguidance 1.9 holds was tried, not read: `tests/server/grammar/test_keywords.py` walks through its masks
at random, for each keyword and each pair, and validates what comes out.
"""

from __future__ import annotations

from difflib import get_close_matches

# in the order in which they are handed on; llguidance intersects what stands before an applicator with it
SUPPORTED = (
    "type",
    "minimum",
    "maximum",
    "exclusiveMinimum",
    "exclusiveMaximum",
    "multipleOf",
    "minLength",
    "maxLength",
    "pattern",
    "format",
    "prefixItems",
    "items",
    "minItems",
    "maxItems",
    "properties",
    "patternProperties",
    "additionalProperties",
    "required",
    "minProperties",
    "maxProperties",
    "enum",
    "const",
    "$ref",
    "allOf",
    "anyOf",
    "oneOf",
)

# read, but not handed on: for people and programs, or names within the schema
ANNOTATIONS = frozenset(
    [
        *("$schema", "$id", "id", "$anchor", "$comment", "$defs", "definitions", "$vocabulary"),
        *("title", "description", "default", "example", "examples", "deprecated", "readOnly", "writeOnly"),
        *("contentMediaType", "contentEncoding", "contentSchema", "discriminator", "externalDocs", "xml"),
    ]
)

# keyword -> what to do without it
REFUSED = {
    "uniqueItems": "leave it out and check the reply",
    "contains": "describe the items with 'items' or 'prefixItems'",
    "minContains": "describe the items with 'items' or 'prefixItems'",
    "maxContains": "describe the items with 'items' or 'prefixItems'",
    "unevaluatedItems": "use 'items'",
    "unevaluatedProperties": "use 'additionalProperties'",
    "propertyNames": "use 'patternProperties' with 'additionalProperties': false",
    "dependentRequired": "use 'anyOf' with the possible objects",
    "dependentSchemas": "use 'anyOf' with the possible objects",
    "dependencies": "use 'anyOf' with the possible objects",
    "not": "say what the value may be",
    "if": "use 'anyOf' with the possible values",
    "then": "use 'anyOf' with the possible values",
    "else": "use 'anyOf' with the possible values",
    "nullable": 'use a list of types, such as ["string", "null"]',
    "$dynamicRef": "use '$ref'",
    "$dynamicAnchor": "use '$ref' with '$defs'",
    "$recursiveRef": "use '$ref'",
    "$recursiveAnchor": "use '$ref' with '$defs'",
}

FORMATS = frozenset(["date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"])

# formats of the drafts that are assertions to many validators; other names say nothing about a value
REFUSED_FORMATS = frozenset(
    [
        *("idn-email", "idn-hostname", "iri", "iri-reference", "uri-reference", "uri-template"),
        *("json-pointer", "relative-json-pointer", "regex", "color", "phone", "style"),
    ]
)

_OLD_DRAFTS = ("draft-03", "draft-04", "draft-06", "draft-07")


def slip_for(word: str) -> str | None:
    """The keyword that was meant by an unknown one; None where it is another tool's word, which says nothing here."""
    alike = get_close_matches(word, [*SUPPORTED, *REFUSED, "additionalItems"], n=1, cutoff=0.85)
    return alike[0] if alike else None


def ignores_siblings(uri: str) -> bool:
    """Whether keywords beside a `$ref` mean nothing in this draft."""
    return any(name in uri for name in _OLD_DRAFTS)
