"""Patterns, choices and grammars: what they take and what they refuse, by name."""

from __future__ import annotations

import time
from typing import Any

import pytest

from loramux_server.errors import RequestError
from loramux_server.grammar.shape import Shape
from support.grammar_walks import Walk, bytes_tokenizer, grammars_of, tokens_in


def takes(shape: Shape, text: str) -> bool:
    """Whether a reply may be this text."""
    grammar: Any = grammars_of().of(shape, "param")
    tokenizer = bytes_tokenizer()
    for token in tokenizer.encode(text, special=False):
        if grammar.ended or token not in tokens_in(grammar.mask()):
            return False
        grammar.advance(token)
    return bool(grammar.ended) or bool(tokenizer.stop_ids & set(tokens_in(grammar.mask()).tolist()))


@pytest.mark.parametrize(
    ("pattern", "good", "bad"),
    [
        (r"\d{3}", ["123"], ["12", "1234", "x123"]),
        (r"^\d{3}$", ["123"], ["12", "1234"]),
        (r"^a$|^b$", ["a", "b"], ["ab"]),
        (r"(^a|b$)", ["a", "b"], ["ab"]),
        (r"a/b\nc", ["a/b\nc"], ["a/b"]),
        (r"[^]a]+", ["bc"], ["a", "]"]),
        (r"[\]\-(?=]+", ["(?=]-"], ["a"]),
        (r"\(\?=a\)\\1", ["(?=a)\\1"], ["a"]),
        (r"(?i)yes|no", ["YES", "no"], ["y"]),
        (r"é+|\w\s", ["éé", "a "], ["e"]),
        (r"(?P<year>\d{4})-(?:0[1-9]|1[0-2])", ["2024-12"], ["2024-13"]),
        (r"a{2}b*?", ["aa", "aabb"], ["a"]),
    ],
)
def test_a_pattern_holds_the_whole_reply(pattern: str, good: list[str], bad: list[str]) -> None:
    assert all(takes(Shape("regex", pattern), text) for text in good)
    assert not any(takes(Shape("regex", pattern), text) for text in bad)


@pytest.mark.parametrize(
    ("pattern", "what"),
    [
        (r"(?=a)a", r"a look-ahead \(\?=...\) at character 1"),
        (r"x(?!a)a", "a negative look-ahead"),
        (r"(?<=a)a", "a look-behind"),
        (r"(?<!a)a", "a negative look-behind"),
        (r"(a)\1", r"a reference to a group \\1 at character 4"),
        (r"(?P<a>b)(?P=a)", "a reference to a group"),
        (r"\bfoo\b", "a word boundary"),
        (r"(?>a)", "an atomic group"),
        (r"a++", "a possessive quantifier at character 2"),
        (r"a{2}+", "a possessive quantifier"),
        (r"(a)(?(1)b|c)", "a condition"),
        (r"a{1,1000000}", "repeats something more than 100000 times"),
        (r"a{99999999999999999999}", "repeats something more than"),
        ("(" * 100 + "a" + ")" * 100, "groups nested deeper than 48"),
        ("a" * 20_000, "more than 16384 bytes"),
        (r"(a", "cannot be compiled"),
        (r"a$b", "cannot be compiled"),
        (r"[z-a]", "cannot be compiled"),
        (3, "must be a string"),
    ],
)
def test_what_a_pattern_cannot_have_is_refused_by_name(pattern: Any, what: str) -> None:
    with pytest.raises(RequestError, match=what) as caught:
        grammars_of().of(Shape("regex", pattern), "guided_regex")

    assert caught.value.param == "guided_regex"


TEXTS = ["a", "ab", "abc", 'quote " and \\', "line\nbreak", "<b>/x/", "日本", "tab\t", "ab"]


@pytest.mark.parametrize("text", TEXTS)
def test_a_choice_is_one_of_its_texts(text: str) -> None:
    shape = Shape("choice", TEXTS)

    assert takes(shape, text)
    assert not takes(shape, text + "x")
    assert not takes(shape, text[:-1]) or text[:-1] in TEXTS


@pytest.mark.parametrize("texts", [[], "a", [""], ["a", 3], None, ["a"] * 4001, ["a" * 300_000]])
def test_a_choice_that_is_none_is_refused(texts: Any) -> None:
    with pytest.raises(RequestError, match="'guided_choice'"):
        grammars_of().of(Shape("choice", texts), "guided_choice")


def test_a_grammar_is_lark_or_gbnf() -> None:
    lark = Shape("lark", 'start: "a" b+\nb: /[0-9]/ | "(" b ")"')
    gbnf = Shape("lark", '# comment\nroot ::= "a" b+\nb ::= [0-9] | "(" b ")"\n')

    for shape in (lark, gbnf):
        assert takes(shape, "a1(2)((3))")
        assert not takes(shape, "a(1")


def test_schemas_within_a_grammar_are_held_to_what_others_are() -> None:
    good = 'start: "<call>" %json {"type": "object", "properties": {"a": {"const": "%json {"}}, "required": ["a"], '
    good += '"title": "x", "additionalProperties": false} "</call>"'

    assert takes(Shape("lark", good), '<call>{"a": "%json {"}</call>')
    assert not takes(Shape("lark", good), '<call>{"a":   "%json {"}</call>')  # white space is bounded here as well
    for wrong in ('{"type": "array", "uniqueItems": true}', '{"$ref": "https://example.com"}', '{"a'):
        with pytest.raises(RequestError, match="uniqueItems|'#/'|%json"):
            grammars_of().of(Shape("lark", f"start: %json {wrong}"), "guided_grammar")
        with pytest.raises(RequestError, match="uniqueItems|'#/'|%json"):
            text = f'// a "quote\nstart: "\\"" /[a"]/ "/" %json {wrong}'
            grammars_of().of(Shape("lark", text), "guided_grammar")


def test_what_a_text_or_a_comment_of_a_grammar_says_is_no_schema() -> None:
    grammar = 'start: "%json {" "\\"%json {" // %json {\n'
    assert takes(Shape("lark", grammar), '%json {"%json {')
    for endless in ('\\"', "\\/"):  # a second is ten times what it takes, and a hundredth of what its square would
        begun = time.thread_time()
        with pytest.raises(RequestError):
            grammars_of().of(Shape("lark", "start: %json " + endless * 100_000), "guided_grammar")
        assert time.thread_time() - begun < 1


@pytest.mark.parametrize(
    "grammar",
    [
        "start: a",
        '{"grammars": [{"json_schema": {"type": "object", "if": {}}}]}',
        "",
        "root ::= (",
        "root ::= " + "(" * 5000 + '"a"' + ")" * 5000,
        "start: " + "(" * 5000 + '"a"' + ")" * 5000,
        "start: @other",
        "start: a\na: a",
        "start: <|no such token|>",
        "a" * 300_000,
        None,
    ],
)
def test_a_grammar_that_cannot_be_read_is_refused(grammar: Any) -> None:
    with pytest.raises(RequestError) as caught:
        grammars_of().of(Shape("lark", grammar), "guided_grammar")

    assert caught.value.param == "guided_grammar"
    assert len(str(caught.value)) < 500


def test_json_has_white_space_with_an_end() -> None:
    shape = Shape("json_object")

    for good in (
        '{"a":1,"b":[1,2]}',
        '{"a": 1, "b": [1, 2]}',
        '{\n  "a": 1,\n  "b": [\n    1\n  ]\n}',
        '{\n\t"a": 1\n}',
    ):
        assert takes(shape, good)
    for bad in (' {"a":1}', '{"a":  1}', '{\n\n"a":1}', "{" + "\n" + " " * 41 + "}", "[1]", '{"a":1} '):
        assert not takes(shape, bad)


def test_any_object_comes_to_an_end() -> None:
    for seed in range(10):
        assert Walk(bytes_tokenizer(), grammars_of().of(Shape("json_object"), "p"), seed).text.startswith("{")
