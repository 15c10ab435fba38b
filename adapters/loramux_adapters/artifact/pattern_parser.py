"""Text of a regular expression -> tree, for the subset that `patterns` runs."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

MAX_LENGTH = 1024
MAX_DEPTH = 16
MAX_REPEAT = 64

_DIGITS = frozenset("0123456789")
_WORD = _DIGITS | frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_")
_SPACE = frozenset(" \t\n\r\f\v")
_CLASSES = {"d": (_DIGITS, False), "w": (_WORD, False), "s": (_SPACE, False)} | {
    "D": (_DIGITS, True),
    "W": (_WORD, True),
    "S": (_SPACE, True),
}


class PatternRefused(ValueError):
    """The pattern is malformed, too large or outside the subset; the message says which, without quoting it."""


class Assertion(Enum):
    START = "^"
    END = "$"
    BORDER = "\\b"


@dataclass(frozen=True, slots=True)
class Chars:
    """One character out of `members`, or, if `negated`, one that is not among them."""

    members: frozenset[str]
    negated: bool = False

    def matches(self, char: str) -> bool:
        return (char in self.members) != self.negated


@dataclass(frozen=True, slots=True)
class Series:
    parts: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Alternation:
    options: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    """`part` at least `least` and at most `most` times (None: without end)."""

    part: Node
    least: int
    most: int | None


Node: TypeAlias = Chars | Assertion | Series | Alternation | Repeat

_ANY = Chars(frozenset("\n"), negated=True)


def parse(text: str) -> Node:
    """Parse a pattern; raises `PatternRefused`."""
    if len(text) > MAX_LENGTH:
        raise PatternRefused(f"has more than {MAX_LENGTH} characters")
    if not text.isascii() or not text.isprintable():
        raise PatternRefused("holds characters other than printable ASCII")
    parser = _Parser(text)
    node = parser.alternation(depth=0)
    if not parser.at_end:
        raise PatternRefused("has an unbalanced parenthesis")
    return node


class _Parser:
    """Recursive descent over the text; depth is bounded by `MAX_DEPTH`."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._position = 0

    @property
    def at_end(self) -> bool:
        return self._position == len(self._text)

    def alternation(self, depth: int) -> Node:
        if depth > MAX_DEPTH:
            raise PatternRefused("nests too deeply")
        options = [self._series(depth)]
        while self._take("|"):
            options.append(self._series(depth))
        return options[0] if len(options) == 1 else Alternation(tuple(options))

    def _series(self, depth: int) -> Node:
        parts: list[Node] = []
        while not self.at_end and self._peek() not in "|)":
            parts.append(self._repeated(self._atom(depth)))
        return Series(tuple(parts))

    def _atom(self, depth: int) -> Node:
        char = self._next()
        if char == "(":
            if self._take("?") and not self._take(":"):
                raise PatternRefused("uses a group of the form (?...), of which only (?:...) is known")
            node = self.alternation(depth + 1)
            if not self._take(")"):
                raise PatternRefused("has an unbalanced parenthesis")
            return node
        if char == "[":
            return self._char_class()
        if char == "\\":
            return self._escape()
        if char in "*+?":
            raise PatternRefused("repeats nothing")
        if char == "{" and self._counts(self._position) is not None:
            raise PatternRefused("repeats nothing")
        if char == ".":
            return _ANY
        if char in "^$":
            return Assertion(char)
        return Chars(frozenset(char))

    def _repeated(self, node: Node) -> Node:
        counts = self._quantifier()
        if counts is None:
            return node
        if isinstance(node, Assertion):
            raise PatternRefused("repeats nothing")
        self._take("?")  # lazy: the same texts match
        if self._quantifier() is not None:
            raise PatternRefused("repeats a repeat")
        return Repeat(node, *counts)

    def _quantifier(self) -> tuple[int, int | None] | None:
        if self.at_end:
            return None
        char = self._peek()
        if char in "*+?":
            self._position += 1
            return {"*": (0, None), "+": (1, None), "?": (0, 1)}[char]
        if char != "{":
            return None
        found = self._counts(self._position + 1)
        if found is None:
            return None  # as in `re`, a brace that starts no count is a literal
        least, most, self._position = found
        if max(least, most or 0) > MAX_REPEAT:
            raise PatternRefused(f"repeats more than {MAX_REPEAT} times")
        if most is not None and most < least:
            raise PatternRefused("has a repeat whose least is above its most")
        return least, most

    def _counts(self, start: int) -> tuple[int, int | None, int] | None:
        """(least, most, position after the brace) of "m}", "m,}", ",n}" or "m,n}" from `start` on; else None."""
        end = self._text.find("}", start)
        if end < 0:
            return None
        low, comma, high = self._text[start:end].partition(",")
        if any(char not in _DIGITS for char in low + high) or not (low or high or comma):
            return None
        if len(low) > 4 or len(high) > 4:
            raise PatternRefused(f"repeats more than {MAX_REPEAT} times")
        least = int(low or 0)
        return least, (int(high) if high else None) if comma else least, end + 1

    def _escape(self) -> Node:
        if self.at_end:
            raise PatternRefused("ends in a backslash")
        char = self._next()
        if char in _CLASSES:
            return Chars(*_CLASSES[char])
        if char == "b":
            return Assertion.BORDER
        return Chars(frozenset(self._literal_escape(char)))

    def _literal_escape(self, char: str) -> str:
        if char.isalnum():
            raise PatternRefused(f"uses the escape \\{char}, which is not known")
        return char

    def _char_class(self) -> Node:
        negated = self._take("^")
        members: set[str] = set()
        first = True
        while first or not self.at_end and self._peek() != "]":
            first = False
            low = self._class_item()
            if isinstance(low, frozenset):
                members |= low
            elif self._text.startswith("-", self._position) and not self._text.startswith("-]", self._position):
                self._position += 1
                high = self._class_item()
                if isinstance(high, frozenset) or high < low:
                    raise PatternRefused("has a bad range in a class")
                members.update(chr(code) for code in range(ord(low), ord(high) + 1))
            else:
                members.add(low)
        if not self._take("]"):
            raise PatternRefused("has a class without an end")
        return Chars(frozenset(members), negated)

    def _class_item(self) -> str | frozenset[str]:
        char = self._next()
        if char != "\\":
            return char
        escaped = self._next()
        if escaped in "DWS":
            raise PatternRefused(f"uses \\{escaped} in a class")
        return _CLASSES[escaped][0] if escaped in _CLASSES else self._literal_escape(escaped)

    def _peek(self) -> str:
        return self._text[self._position]

    def _next(self) -> str:
        if self.at_end:
            raise PatternRefused("ends too early")
        self._position += 1
        return self._text[self._position - 1]

    def _take(self, char: str) -> bool:
        found = self._text.startswith(char, self._position)
        self._position += found
        return found
