"""A JSON body -> its object, at a cost that its sender cannot choose.

A parser holds the interpreter's lock from the first byte to the last, so even in a worker thread it stops every stream
for as long as it takes. What it takes depends on how many lists, objects and strings it must make, and two megabytes
hold a million of them. So they are counted first, which is quick and always takes the same time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from loramux_adapters.artifact.reading.strict_json import StrictJSONError, parse_object
from loramux_server.api.http.worker_threads import run_in_thread
from loramux_server.errors import RequestError

MAX_CONTAINERS = 2**14  # lists and objects: 2,048 messages of several parts each
MAX_STRINGS = 2**15  # names of fields among them
MAX_VALUES = 2**17  # token ids, nearly always
MAX_FIELDS = 256  # of the outermost object
MAX_NESTING = 64  # objects and lists in one another: schemas of tools and replies describe what nests itself
MAX_DIGITS = 511  # in a row; reading a number of thousands takes the square of their count
SMALL = 16 * 2**10  # bytes of a body that is parsed on the event loop: a thread would take longer

_DIGITS_TO_NINES = bytes.maketrans(b"012345678", b"9" * 9)
_NINES = b"9" * (MAX_DIGITS + 1)

Parsed = TypeVar("Parsed")


async def parsed_off_loop(parse: Callable[[bytes], Parsed], raw: bytes) -> Parsed:
    """What `parse` makes of a body; in a worker thread unless the body is small."""
    return parse(raw) if len(raw) <= SMALL else await run_in_thread(parse, raw)


def json_object(raw: bytes) -> dict[str, Any]:
    """The object that a body is. Raises RequestError for any other JSON, and for what holds too many things."""
    refuse_crowded(raw)
    try:
        value: dict[str, Any] = parse_object(raw, limit=len(raw), depth=MAX_NESTING)
    except StrictJSONError as error:
        raise RequestError(f"the request body must be a JSON object, but it {error}", code="invalid_json") from error
    if len(value) > MAX_FIELDS:
        raise RequestError(f"the request body has {len(value)} parameters; at most {MAX_FIELDS} are taken")
    return value


def refuse_crowded(raw: bytes) -> None:
    """Raises RequestError where a body holds more lists, objects, strings, values or digits than any request needs."""
    if not _is_crowded(raw, raw.count(b'"')):
        return  # what stands inside strings was counted too, which can only be too many
    unescaped = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    quotes = unescaped.count(b'"')
    _refuse_above("strings", quotes // 2, MAX_STRINGS)
    outside = b"".join(unescaped.split(b'"')[::2])
    _refuse_above("lists and objects", _containers(outside), MAX_CONTAINERS)
    _refuse_above("values", outside.count(b","), MAX_VALUES)
    if _has_long_number(outside):
        raise RequestError(f"the request body holds a number of more than {MAX_DIGITS} digits", code="invalid_value")


def _is_crowded(text: bytes, quotes: int) -> bool:
    return (
        quotes > 2 * MAX_STRINGS
        or _containers(text) > MAX_CONTAINERS
        or text.count(b",") > MAX_VALUES
        or _has_long_number(text)
    )


def _has_long_number(text: bytes) -> bool:
    return _NINES in text.translate(_DIGITS_TO_NINES)


def _containers(text: bytes) -> int:
    return text.count(b"[") + text.count(b"{")


def _refuse_above(what: str, count: int, limit: int) -> None:
    if count > limit:
        raise RequestError(f"the request body holds {count} {what}; at most {limit} are taken", code="invalid_value")
