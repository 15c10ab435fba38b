"""JSON that comes character by character.

Every function is a generator that is sent one character at a time, and ends with the last one of what it reads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from typing import TypeVar

SPACE = " \t\r\n"
_CLOSES = {"{": "}", "[": "]"}
_ESCAPES = {'"': '"', "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_UNKNOWN = "\N{REPLACEMENT CHARACTER}"
_LONGEST_STRING = 1024  # of a key or a name: where there is none, what looks like a call is not held back for long

T = TypeVar("T")
Reading = Generator[None, str, T]
Take = Callable[[str], None]


class Unexpected(Exception):
    """The character sent last does not belong to what is read."""


def behind_space() -> Reading[str]:
    """The first character that is no white space."""
    while True:
        character = yield
        if character not in SPACE:
            return character


def literal(text: str) -> Reading[None]:
    """Exactly this text."""
    for expected in text:
        if (yield) != expected:
            raise Unexpected


def string() -> Reading[str]:
    """What a short string says, behind its opening quote and up to the closing one."""
    raw: list[str] = []
    while True:
        character = yield
        if character == '"':
            break
        raw.append(character)
        if len(raw) > _LONGEST_STRING:
            raise Unexpected
        if character == "\\":
            raw.append((yield))
    try:
        text: str = json.loads(f'"{"".join(raw)}"', strict=False)
    except ValueError:
        raise Unexpected from None
    return text


def container(first: str, take: Take) -> Reading[None]:
    """An object or a list, from its opening bracket on to its closing one; `take` gets every character of it.

    Brackets and strings are looked at, nothing else: what stands between is whatever the model wrote.
    """
    take(first)
    closing = [_CLOSES[first]]
    while closing:
        character = yield
        if character in "}]":
            if character != closing.pop():
                raise Unexpected
        elif character in "{[":
            closing.append(_CLOSES[character])
        take(character)
        if character == '"':
            yield from _inside_string(take)


def _inside_string(take: Take) -> Reading[None]:
    while True:
        character = yield
        take(character)
        if character == '"':
            return
        if character == "\\":
            take((yield))


def decoded(take: Take) -> Reading[None]:
    """A string whose text is wanted as it comes: behind its opening quote and up to the closing one."""
    high: int | None = None  # the first half of a character of two
    while True:
        character = yield
        if high is not None and character != "\\":
            take(_UNKNOWN)
            high = None
        if character == '"':
            return
        if character != "\\":
            take(character)
            continue
        character = yield
        if character != "u":
            if high is not None:
                take(_UNKNOWN)
                high = None
            if character not in _ESCAPES:
                raise Unexpected
            take(_ESCAPES[character])
            continue
        unit = yield from _hexadecimal()
        if high is not None and 0xDC00 <= unit < 0xE000:
            take(chr(0x10000 + ((high - 0xD800) << 10) + unit - 0xDC00))
            high = None
            continue
        if high is not None:
            take(_UNKNOWN)
            high = None
        if 0xD800 <= unit < 0xDC00:
            high = unit
        else:
            take(_UNKNOWN if 0xDC00 <= unit < 0xE000 else chr(unit))


def _hexadecimal() -> Reading[int]:
    number = 0
    for _ in range(4):
        digit = yield
        if digit not in "0123456789abcdefABCDEF":
            raise Unexpected
        number = number * 16 + int(digit, 16)
    return number
