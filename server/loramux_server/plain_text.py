"""Text for people: foreign characters made harmless, long values cut, passwords left out, lines wrapped at words."""

from __future__ import annotations

import os
import shutil
import textwrap
from typing import TextIO

MAX_SHOWN = 80  # characters of a value in a message
_LEAST_COLUMNS = 20


def printable(text: str, *, lines: bool = False) -> str:
    """The text with whatever a terminal obeys, or does not show, as an escape; line ends too unless `lines`."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or (lines and char == "\n") else char.encode("unicode_escape").decode()
        for char in text
    )


def shortened(value: object, limit: int = MAX_SHOWN) -> str:
    """A value as a message shows it: of a long one the beginning, and how long it is."""
    text = str(value)
    return printable(text if len(text) <= limit else f"{text[:limit]}... ({len(text):,} characters)")


def masked(url: str) -> str:
    """A URL, or what somebody took for one, without the user and the password in it."""
    scheme, separator, rest = url.partition("://")
    if not separator or "@" in scheme:
        scheme, separator, rest = "", "", url
    _, at, host = rest.rpartition("@")
    return f"{scheme}{separator}***@{host}" if at else url


def columns_of(stream: TextIO) -> int | None:
    """How wide the terminal is that the stream goes to; None if it goes elsewhere, where lines stay whole."""
    if not stream.isatty():
        return None
    try:
        own = os.get_terminal_size(stream.fileno())
    except (OSError, ValueError):
        own = os.terminal_size((80, 24))
    return max(_LEAST_COLUMNS, shutil.get_terminal_size(own).columns)


def wrapped(text: str, columns: int | None) -> str:
    """The text with its lines broken at words, so that none is longer unless a word is; what follows is indented."""
    return text if columns is None else "\n".join(_wrapped_line(line, columns) for line in text.split("\n"))


def for_reader(text: str, stream: TextIO) -> str:
    """The text as it is written to this stream: harmless, and wrapped where that is a terminal."""
    return wrapped(printable(text, lines=True), columns_of(stream))


def _wrapped_line(line: str, columns: int) -> str:
    if len(line) <= columns:
        return line
    indent = line[: len(line) - len(line.lstrip())]
    return textwrap.fill(
        line.lstrip(),
        columns,
        initial_indent=indent,
        subsequent_indent=f"{indent}  ",
        break_long_words=False,
        break_on_hyphens=False,
    )
