from __future__ import annotations

import io

import pytest

from loramux_server.plain_text import columns_of, for_reader, masked, printable, shortened, wrapped


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, ä, 中, 😀", "plain, ä, 中, 😀"),
        ("\x1b[2J", "\\x1b[2J"),
        ("\x9b2J", "\\x9b2J"),
        ("a\rb\tc\x00\x07", "a\\rb\\tc\\x00\\x07"),
        ("\u202eabc\u2028", "\\u202eabc\\u2028"),
        ("\udcff", "\\udcff"),
        ("a\nb", "a\\nb"),
    ],
)
def test_what_a_terminal_obeys_or_does_not_show_is_an_escape(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable("a\nb\x1b", lines=True) == "a\nb\\x1b"


def test_a_long_value_is_cut_and_says_how_long_it_is() -> None:
    assert shortened("x" * 80) == "x" * 80
    assert shortened(10**4000) == "1" + "0" * 79 + "... (4,001 characters)"
    assert shortened("\x1b") == "\\x1b"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://host:8000/x", "http://host:8000/x"),
        ("http://user:word@host:8000", "http://***@host:8000"),
        ("http://word@host", "http://***@host"),
        ("user:word@host", "***@host"),
        ("http://user:w/o?r#d@host", "http://***@host"),
        ("http://user:wo@rd@host", "http://***@host"),
        ("ftp://u:w@x://y:z@host", "ftp://***@host"),
        ("u:w@x://y", "***@x://y"),
    ],
)
def test_a_url_is_shown_without_its_password(url: str, shown: str) -> None:
    assert masked(url) == shown


def test_lines_are_broken_at_words_and_what_follows_is_indented() -> None:
    text = "  - one two three four five six\nshort"
    assert wrapped(text, 20) == "  - one two three\n    four five six\nshort"
    assert wrapped("word" * 20, 20) == "word" * 20
    assert wrapped(text, None) == text


def test_a_pipe_has_no_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    long = "some words " * 10
    assert columns_of(io.StringIO()) is None and for_reader(long, io.StringIO()) == long
    assert columns_of(Terminal()) == 30 and "\n" in for_reader(long, Terminal())
