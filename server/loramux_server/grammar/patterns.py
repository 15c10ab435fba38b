"""Regular expressions of clients, checked for what llguidance's automaton cannot follow."""

from __future__ import annotations

import re
from typing import NoReturn

import regex

from loramux_server.errors import RequestError
from loramux_server.grammar.limits import GrammarLimits

_GROUPS = {
    "(?=": "a look-ahead (?=...)",
    "(?!": "a negative look-ahead (?!...)",
    "(?<=": "a look-behind (?<=...)",
    "(?<!": "a negative look-behind (?<!...)",
    "(?>": "an atomic group (?>...)",
    "(?(": "a condition (?(...)...)",
    "(?P=": "a reference to a group (?P=...)",
    "(?R": "recursion (?R)",
    "(?&": "recursion (?&...)",
    "(?#": "a comment (?#...)",
}
_ESCAPES = {
    "b": r"a word boundary \b",
    "B": r"\B",
    "A": r"the anchor \A",
    "z": r"the anchor \z",
    "Z": r"the anchor \Z",
    "G": r"the anchor \G",
    "k": r"a reference to a group \k",
    "g": r"a reference to a group \g",
    "<": r"a word boundary \<",
    ">": r"a word boundary \>",
}
_COUNT = re.compile(r"\{(\d+)(?:(,)(\d*))?\}")
_CLASS_OR_ESCAPE = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_UNBOUNDED = re.compile(r"[*+]|\{\d+,\}")
_MATCH_SECONDS = 0.05
_POSSESSIVE = re.compile(r"(?:[*+?]|\{\d+(?:,\d*)?\})\+")


def check_pattern(pattern: str, param: str, place: str, limits: GrammarLimits) -> None:
    """A pattern that the whole reply, or a string of it, is to match: `^` and `$` may stand at its ends alone.

    Args:
        place: what to call it in a message, such as "'pattern' at #/properties/zip".
    Raises:
        RequestError: it is too large, or has something that cannot be followed, by name.
    """

    def refuse(what: str, at: int) -> NoReturn:
        raise RequestError(
            f"{place} has {what} at character {at + 1}, which is not supported", param=param, code="unsupported_value"
        )

    if len(pattern.encode(errors="surrogatepass")) > limits.max_bytes // 16:
        raise RequestError(f"{place} has more than {limits.max_bytes // 16} bytes", param=param, code="invalid_value")
    depth, at, in_class = 0, 0, False
    while at < len(pattern):
        character = pattern[at]
        if character == "\\":
            escaped = pattern[at + 1 : at + 2]
            if not in_class and escaped.isdigit() and escaped != "0":
                refuse(f"a reference to a group \\{escaped}", at)
            if not in_class and escaped in _ESCAPES and escaped:
                refuse(_ESCAPES[escaped], at)
            at += 2
            continue
        if in_class:
            in_class = character != "]"
        elif character == "[":
            in_class = True
            at += 1 + (pattern[at + 1 : at + 2] == "^")
            at += pattern[at : at + 1] == "]"  # the first of a class is itself
            continue
        elif character == "(":
            depth += 1
            if depth > limits.max_depth:
                raise RequestError(
                    f"{place} has groups nested deeper than {limits.max_depth}", param=param, code="invalid_value"
                )
            for opening, name in _GROUPS.items():
                if pattern.startswith(opening, at):
                    refuse(name, at)
        elif character == ")":
            depth -= 1
        elif character in "*+?{":
            if _POSSESSIVE.match(pattern, at):
                refuse("a possessive quantifier", at)
            count = _COUNT.match(pattern, at)
            if count and any(_above(number, limits.max_count) for number in (count[1], count[3])):
                raise RequestError(
                    f"{place} repeats something more than {limits.max_count} times (at character {at + 1})",
                    param=param,
                    code="invalid_value",
                )
        at += 1


def _above(number: str | None, most: int) -> bool:
    return bool(number) and (len(str(number)) > len(str(most)) + 1 or int(str(number)) > most)


def is_finite(pattern: str) -> bool:
    """Whether it may match only so many texts: both of its ends are held, and nothing in it repeats without end.

    May say yes where it is not so, never the other way round.
    """
    bare = _CLASS_OR_ESCAPE.sub("x", pattern)
    return "^" in bare and "$" in bare and not _UNBOUNDED.search(bare)


def may_match(pattern: str, text: str) -> bool:
    """Whether it is found in this text, as far as can be told soon."""
    try:
        return regex.search(pattern, text, timeout=_MATCH_SECONDS) is not None
    except (regex.error, TimeoutError, RecursionError):
        return True
