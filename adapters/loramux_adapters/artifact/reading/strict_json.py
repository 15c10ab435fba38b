"""JSON from strangers: one object, no tricks. Knows nothing of adapters.

Why by hand: the standard library takes NaN, repeated keys, lone surrogates and any depth. It does the parsing; what it
lets through is refused here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import NoReturn

MAX_DEPTH = 16


class StrictJSONError(ValueError):
    """The text is not one plain JSON object; the message says why and quotes nothing but names."""


def quoted(text: str, limit: int = 120) -> str:
    """Hostile text made safe for a message: ASCII only, control characters escaped, at most `limit` characters."""
    shown = ascii(text)
    return shown if len(shown) <= limit else f"{shown[: limit - 4]}...'"


def parse_object(raw: bytes, *, limit: int, depth: int = MAX_DEPTH) -> dict[str, object]:
    """Parse UTF-8 JSON whose top level is an object.

    Refused with `StrictJSONError`: more than `limit` bytes, bytes that are not UTF-8, a name that stands twice in one
    object, NaN and infinities (1e999 too), integers of thousands of digits, half surrogate pairs, nesting deeper than
    `depth`.
    """
    if len(raw) > limit:
        raise StrictJSONError(f"has more than {limit} bytes")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise StrictJSONError("is not UTF-8") from error
    try:
        value = json.loads(
            text, object_pairs_hook=_unique_names, parse_constant=_refuse_constant, parse_float=_finite_float
        )
    except StrictJSONError:
        raise
    except RecursionError as error:
        raise StrictJSONError("nests too deeply") from error
    except ValueError as error:
        raise StrictJSONError("is not valid JSON") from error
    if not isinstance(value, dict):
        raise StrictJSONError("is not a JSON object")
    _check_depth(value, depth)
    if "\\u" in text:
        _check_encodable(value)
    return value


def is_empty(value: object) -> bool:
    """Whether a value says nothing: null, false, zero, or an empty string, list or object."""
    return value is None or value is False or value == 0 or value in ("", [], {})


def is_int(value: object) -> bool:
    """JSON integer: Python's bool is an int too, JSON's is not."""
    return type(value) is int


def is_number(value: object) -> bool:
    return type(value) is int or type(value) is float


def _unique_names(pairs: list[tuple[str, object]]) -> dict[str, object]:
    names = dict(pairs)
    if len(names) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise StrictJSONError(f"names {quoted(name)} twice")
            seen.add(name)
    return names


def _refuse_constant(name: str) -> NoReturn:
    raise StrictJSONError(f"holds {name}, which is not JSON")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise StrictJSONError("holds a number that is too large")
    return value


def _check_encodable(value: object) -> None:
    """An escape can smuggle in half a surrogate pair, which no one can write out again."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise StrictJSONError("holds half a surrogate pair") from error


def _check_depth(value: object, depth: int) -> None:
    level: list[object] = [value]
    for _ in range(depth):
        level = [child for node in level for child in _children(node) if isinstance(child, dict | list)]
        if not level:
            return
    raise StrictJSONError("nests too deeply")


def _children(node: object) -> Iterable[object]:
    if isinstance(node, dict):
        return node.values()
    return node if isinstance(node, list) else ()
