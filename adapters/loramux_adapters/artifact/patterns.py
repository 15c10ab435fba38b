"""Regular expressions from strangers, matched in bounded time, with the meaning that PEFT's `re` gives them.

`re` has no time limit, so a short hostile pattern can take years. The library `regex` has one, but it reads some
patterns otherwise than `re`, and it writes counted repeats out when it compiles, which nothing interrupts. So only
patterns that both read alike are compiled, up to a size: literals, `.`, the escapes d w s D W S b, [classes], (groups),
(?:groups), look-ahead, look-behind, |, * + ? {m,n} (and their lazy forms), ^ and $.
"""

from __future__ import annotations

import re
import time

import regex

from loramux_adapters.errors import AdapterRejected

# Of all patterns of one config together. Measured: compiling takes 7 us and 0.5 KiB for each character.
MAX_SIZE = 8192
MAX_PATTERNS = 512
MATCH_SECONDS = 0.5
MAX_DEPTH = 16

_TOKEN = re.compile(
    r"""
      (?P<open> \( (?: \?: | \?<?[=!] | (?!\?) ) )
    | (?P<close> \) )
    | (?P<repeat> (?: [*?] | (?P<once> \+ ) | \{ (?=[\d,]) (?P<least> \d{0,3} ) (?: ,\d{0,3} )? \} ) \?? (?![*+?{]) )
    | (?P<atom> \\ (?: [dwsDWSb] | [^A-Za-z0-9] )
        | \[ \^? \]? (?: \\ (?: [dwsDWS] | [^A-Za-z0-9] ) | (?! -- | && | ~~ | \|\| ) [^\\\[\]] )* \]
        | [^\\()\[{*+?] )
    """,
    re.VERBOSE,
)
_UNKNOWN = {
    "(": "has a group of the form (?...) that is neither (?:...) nor look-ahead nor look-behind",
    "[": "has a class that does not end, or holds an unknown escape, [, --, &&, ~~ or ||",
    "\\": "has an escape that is not known, or ends in a backslash",
    "{": "has a { that starts no repeat of at most 999 times, or repeats a repeat: the character itself is \\{",
    "*": "repeats a repeat",
    "+": "repeats a repeat",
    "?": "repeats a repeat",
}


class PatternRefused(ValueError):
    """The pattern is malformed, too large or has a construct that is refused; the message says which."""


class Budget:
    """What the patterns of one config may cost together. Not thread-safe."""

    def __init__(self, seconds: float = MATCH_SECONDS) -> None:
        """`seconds`: of the calling thread's own processor time, for all matches."""
        self._seconds = seconds
        self._size = MAX_SIZE
        self._patterns = MAX_PATTERNS

    def check(self, text: str) -> None:
        """Take what compiling this pattern costs. Raises `PatternRefused` if it is too much or not a pattern for us."""
        self._patterns -= 1
        if self._patterns < 0:
            raise PatternRefused(f"is one of more than {MAX_PATTERNS} regular expressions in the config")
        if not text.isascii() or not text.isprintable():
            raise PatternRefused("holds characters other than printable ASCII")
        self._size -= _size_of(text, self._size)
        try:
            re.compile(text)
        except re.error as error:
            raise PatternRefused(f"is malformed: {error.msg}") from error

    def match(self, pattern: regex.Pattern[str], text: str, what: str) -> regex.Match[str] | None:
        """Match from the start of `text`, a module path in printable ASCII.

        Raises `AdapterRejected`, naming `what`, when the time is used up. What other threads do does not count: the
        library's clock runs with them, so a match that it gave up too early is tried again.
        """
        while self._seconds > 0:
            started = time.thread_time()
            try:
                return pattern.match(text, timeout=self._seconds)
            except TimeoutError:
                continue
            finally:
                self._seconds -= time.thread_time() - started
        raise AdapterRejected(
            [f"{what} cannot be matched in time: write simpler regular expressions, or plain module names"]
        )


class Pattern:
    """One pattern for whole texts. Not thread-safe."""

    def __init__(self, text: str, budget: Budget | None = None) -> None:
        """Raises `PatternRefused`."""
        self._budget = budget or Budget()
        self._budget.check(text)
        self._what = f"the regular expression {ascii(text)[:120]}"
        self._compiled = compiled(rf"(?:{text})\Z")

    def fullmatch(self, text: str) -> bool:
        """Whether the whole text matches, as `re.fullmatch` would say of it. Raises `AdapterRejected`; see `Budget`."""
        return self._budget.match(self._compiled, text, self._what) is not None


def compiled(text: str) -> regex.Pattern[str]:
    """Compile a checked pattern, without the library's cache: that counts patterns, not bytes."""
    return regex.compile(text, regex.VERSION0, cache_pattern=False)


def _size_of(text: str, limit: int) -> int:
    """Characters once repeats are written out as the library does. Raises `PatternRefused`, also if over `limit`."""
    sizes = [0]  # of each open group
    position = last = 0
    while position < len(text):
        token = _TOKEN.match(text, position)
        if token is None:
            raise PatternRefused(_UNKNOWN[text[position]])
        position = token.end()
        if token["open"]:
            sizes.append(0)
        elif token["close"]:
            if len(sizes) == 1:
                raise PatternRefused("has an unbalanced parenthesis")
            last = sizes.pop() + len("()")
            sizes[-1] += last
        elif token["repeat"]:
            sizes[-1] += last * (1 if token["once"] else int(token["least"] or 0)) + len(token[0])
        else:
            last = len(token[0])
            sizes[-1] += last
        if len(sizes) > MAX_DEPTH + 1:
            raise PatternRefused("nests too deeply")
        if sizes[-1] > limit:
            raise PatternRefused(
                f"takes the config over {MAX_SIZE:,} characters of regular expressions, repeats written out"
            )
    if len(sizes) > 1:
        raise PatternRefused("has an unbalanced parenthesis")
    return sizes[0]
