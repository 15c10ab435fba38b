"""A pattern as text -> its term, and which bytes may stand side by side in its texts.

Only what llguidance is known to read in the same way: `Unclear` is raised for everything else, also for what is wrong.
`tests/server/grammar/test_pattern_reading.py` holds it against llguidance.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from loramux_server.grammar.residuals import Ranges, Term, Terms, Unclear, all_but, ranges_of

MOST_CHARACTERS = 2_000  # of a pattern that is read
_ASCII = ((0, 0x7F),)
_CONTROLS = {"n": 10, "t": 9, "r": 13, "f": 12, "v": 11}
_CLASSES = {"d": ((48, 57),), "w": ((48, 57), (65, 90), (95, 95), (97, 122)), "s": ((9, 13), (32, 32))}  # within ASCII
_GROUP = re.compile(r"\((?:\?(?::|P?<[A-Za-z_]\w*>))?", re.ASCII)
_COUNT = re.compile(r"\{(\d+)(?:(,)(\d*))?\}", re.ASCII)
_OPERATORS = frozenset("()[]{}*+?|^$.\\")
_PUNCTUATION = frozenset("!\"#$%&'()*+,-./:;=?@[\\]^_`{|}~")
_BEYOND = sum(1 << byte for byte in range(0x80, 0x100))


@dataclass(frozen=True, slots=True)
class _Part:
    """Of a pattern.

    Attributes:
        first, last: bytes with which its texts may begin and end, bit i for byte i.
    """

    term: Term
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class ReadPattern:
    """
    Attributes:
        beside: for each byte, the bytes that may follow it within a text of the pattern, bit i for byte i; some that
            never do may be among them.
        inside: all bytes that its texts have, in the same way.
        classes: [256] for each byte, one that no term tells from it.
    """

    term: Term
    beside: tuple[int, ...]
    inside: int
    classes: bytes


def read_pattern(pattern: str, terms: Terms) -> ReadPattern:
    """Raises Unclear."""
    if not pattern or len(pattern) > MOST_CHARACTERS:
        raise Unclear
    try:
        return _Reader(pattern, terms).read()
    except RecursionError:
        raise Unclear from None


class _Reader:
    def __init__(self, pattern: str, terms: Terms) -> None:
        self._text = pattern
        self._at = 0
        self._terms = terms
        self._joints: dict[int, int] = {}  # bytes with which one part ends -> those with which the next may begin
        self._sets: dict[int, None] = {}  # of characters: their ASCII ones, bit i for byte i
        self._inside = 0

    def read(self) -> ReadPattern:
        begins = self._text.startswith("^")
        self._at += begins
        alternatives = self._alternatives(top=True)
        ends = self._next() == "$"
        self._at += ends
        if self._at < len(self._text) or ((begins or ends) and len(alternatives) > 1):
            raise Unclear
        beside = [0] * 256
        for last, first in self._joints.items():
            for byte in _bits(last):
                beside[byte] |= first
        return ReadPattern(self._either(alternatives).term, tuple(beside), self._inside, self._classes())

    def _next(self) -> str:
        return self._text[self._at : self._at + 1]

    def _alternatives(self, *, top: bool = False) -> list[_Part]:
        found = [self._sequence(top)]
        while self._next() == "|":
            self._at += 1
            found.append(self._sequence(top))
        return found

    def _either(self, parts: list[_Part]) -> _Part:
        first = last = 0
        for part in parts:
            first, last = first | part.first, last | part.last
        return _Part(self._terms.either(part.term for part in parts), first, last)

    def _sequence(self, top: bool) -> _Part:
        parts = []
        while (character := self._next()) and character not in "|)" and not (top and self._is_last("$")):
            parts.append(self._repeated(self._one(character)))
        whole = _Part(self._terms.empty, 0, 0)
        for part in reversed(parts):
            whole = self._joined(part, whole)
        return whole

    def _is_last(self, character: str) -> bool:
        return self._at == len(self._text) - 1 and self._text[self._at] == character

    def _joined(self, one: _Part, other: _Part) -> _Part:
        self._join(one.last, other.first)
        first = one.first | (other.first if one.term.nullable else 0)
        last = other.last | (one.last if other.term.nullable else 0)
        return _Part(self._terms.then(one.term, other.term), first, last)

    def _join(self, last: int, first: int) -> None:
        self._joints[last] = self._joints.get(last, 0) | first

    def _repeated(self, part: _Part) -> _Part:
        operator = self._next()
        if not operator or operator not in "*+?{":
            return part
        least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(operator, (0, 0))
        length = 1
        if operator == "{":
            count = _COUNT.match(self._text, self._at)
            if not count:
                raise Unclear
            least = int(count[1])
            most = least if not count[2] else int(count[3]) if count[3] else None
            length = len(count[0])
        self._at += length
        self._at += self._next() == "?"  # lazy: it has the same texts
        if (following := self._next()) and following in "*+?{":
            raise Unclear
        if most is not None and most < max(least, 1):
            raise Unclear
        self._join(part.last, part.first)
        return _Part(self._terms.repeat(part.term, least, most), part.first, part.last)

    def _one(self, character: str) -> _Part:
        if character == "(":
            opening = _GROUP.match(self._text, self._at)
            assert opening is not None
            self._at = opening.end()
            if self._next() == "?":  # flags and the like
                raise Unclear
            inside = self._either(self._alternatives())
            if self._next() != ")":
                raise Unclear
            self._at += 1
            return inside
        if character == "[":
            return self._class()
        self._at += 1
        if character == ".":
            return self._characters(all_but(((10, 10),)))
        if character == "\\":
            escaped = self._next()
            if escaped.lower() in _CLASSES:
                self._at += 1
                ranges = _CLASSES[escaped.lower()]
                return self._characters(ranges if escaped.islower() else _but(ranges, _ASCII), f"[\\{escaped}]")
            return self._characters(((self._escaped(),) * 2,))
        if character in _OPERATORS:
            raise Unclear
        return self._characters(((ord(character),) * 2,))

    def _escaped(self) -> int:
        """The code point behind a backslash."""
        escaped = self._next()
        self._at += 1
        if escaped in _CONTROLS:
            return _CONTROLS[escaped]
        if escaped not in _PUNCTUATION:
            raise Unclear
        return ord(escaped)

    def _class(self) -> _Part:
        begun = self._at
        self._at += 1
        negated = self._next() == "^"
        self._at += negated
        pairs: list[tuple[int, int]] = []
        known = True
        while self._next() != "]" or not (pairs or not known):
            ranges = self._class_item()
            if ranges is None:
                known = False
                escaped = self._text[self._at - 1]
                inside = _CLASSES[escaped.lower()]
                pairs += inside if escaped.islower() else _but(inside, _ASCII)
            else:
                pairs += ranges
        self._at += 1
        found = ranges_of(pairs)
        if known:
            return self._characters(all_but(found) if negated else found)
        return self._characters(
            _but(found, _ASCII) if negated else _within(found, _ASCII), self._text[begun : self._at]
        )

    def _class_item(self) -> Ranges | None:
        """None: a class of which only the ASCII part is known, the letter of which stands before the place."""
        low = self._class_character()
        if low is None:
            if self._next() == "-" and self._text[self._at + 1 : self._at + 2] != "]":
                raise Unclear
            return None
        if self._next() != "-" or self._text[self._at + 1 : self._at + 2] == "]":
            return ((low, low),)
        self._at += 1
        high = None if self._next() == "-" else self._class_character()  # "--" takes off what follows
        if high is None or high < low:
            raise Unclear
        return ((low, high),)

    def _class_character(self) -> int | None:
        character = self._next()
        self._at += 1
        if character == "\\":
            if self._next().lower() in _CLASSES:
                self._at += 1
                return None
            return self._escaped()
        # "[" opens a class within, "&&", "--" and "~~" are operations of classes, "]" as the first is read in two ways.
        if character in ("", "[", "]") or (character in "&-~" and self._next() == character):
            raise Unclear
        return ord(character)

    def _characters(self, ranges: Ranges, unknown: str = "") -> _Part:
        first = 0
        for low, high in ranges:
            for byte in range(low, min(high, 0x7F) + 1):
                first |= 1 << byte
        self._sets[first] = None
        last = first
        if unknown or ranges and ranges[-1][1] > 0x7F:
            first, last = first | _BEYOND, last | _BEYOND
            self._join(_BEYOND, _BEYOND)
        self._inside |= first
        return _Part(self._terms.characters(ranges, unknown), first, last)

    def _classes(self) -> bytes:
        alike: dict[tuple[bool, ...], int] = {}
        found = bytearray(range(256))
        for byte in range(0x80):
            has = tuple(bool(its >> byte & 1) for its in self._sets)
            found[byte] = alike.setdefault(has, byte)
        return bytes(found)


def _bits(mask: int) -> Iterable[int]:
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest


def _within(ranges: Iterable[tuple[int, int]], bounds: Ranges) -> Ranges:
    (low, high) = bounds[0]
    return ranges_of((max(low, first), min(high, last)) for first, last in ranges if first <= high and last >= low)


def _but(ranges: Ranges, bounds: Ranges) -> Ranges:
    """What of the bounds is not in the ranges."""
    return _within(all_but(ranges_of(ranges)), bounds)
