"""Patterns read byte by byte, against llguidance."""

from __future__ import annotations

import random

import pytest

from loramux_server.errors import RequestError
from loramux_server.grammar.pattern_reading import MOST_CHARACTERS, ReadPattern, read_pattern
from loramux_server.grammar.residuals import Term, Terms, Unclear
from loramux_server.grammar.vocabulary import TokenTexts, Vocabulary
from support.grammar_walks import bytes_tokenizer, tokens_in
from support.patterns import WRITTEN, matcher_of, random_pattern, walk


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(bytes_tokenizer())


def read(pattern: str) -> tuple[ReadPattern, Terms] | None:
    terms = Terms(100_000, 10**9)
    try:
        return read_pattern(pattern, terms), terms
    except Unclear:
        return None


def follow(terms: Terms, term: Term, text: bytes) -> Term | None:
    try:
        for byte in text:
            term = terms.after(term, byte)
    except Unclear:
        return None
    return term


def may_have(of_pattern: ReadPattern, text: bytes) -> bool:
    return TokenTexts([text]).longest(of_pattern.inside, of_pattern.beside) == len(text)


def compare(pattern: str, vocabulary: Vocabulary, seed: int) -> int:
    """The number of places at which both say the same of every byte."""
    found = read(pattern)
    if found is None:
        return 0
    of_pattern, terms = found
    rest, places, before = of_pattern.term, 0, b""
    for token, mask in walk(pattern, vocabulary, random.Random(seed), 40):
        if token is not None:
            text = vocabulary.text(token)
            assert may_have(of_pattern, before[-1:] + text), (pattern, before)
            after = follow(terms, rest, text)
            if after is None:
                return places
            alike = follow(terms, rest, text.translate(of_pattern.classes))
            assert alike is after
            rest, before = after, before + text
        allowed = {vocabulary.text(token)[0] for token in tokens_in(vocabulary.without_ends(mask.bits)).tolist()}
        for byte in range(256):
            after = follow(terms, rest, bytes([byte]))
            assert after is None or (after is not terms.nothing) == (byte in allowed), (pattern, before, byte)
        assert rest.nullable == mask.may_end, (pattern, before)
        places += 1
    return places


def test_the_tokens_of_these_tests_are_single_bytes(vocabulary: Vocabulary) -> None:
    texts = {vocabulary.text(token) for token in range(vocabulary.size)} - {b""}
    assert texts >= {bytes([byte]) for byte in range(256)}


@pytest.mark.parametrize("pattern", WRITTEN)
def test_what_may_follow_in_a_pattern_is_what_llguidance_says(pattern: str, vocabulary: Vocabulary) -> None:
    for seed in range(4):
        compare(pattern, vocabulary, seed)


def test_random_patterns_are_read_as_llguidance_reads_them(vocabulary: Vocabulary) -> None:
    rng = random.Random(7)
    places = sum(compare(random_pattern(rng), vocabulary, seed) for seed in range(300))
    assert places > 3_000


@pytest.mark.parametrize(
    "pattern",
    [
        r"[]a]+", "[a&&b]", "[a--b]", "[ --a]", "[^|9 --|]", "[+--]", "[a~~b]", "[[:alpha:]]", "[[ab]c]", r"[\d-z]",
        "[z-a]", "[a", "a{,3}", "a+??",
        "a**", "a{2}{3}", "a{3,2}", "a{0}", "(?i)a", "(?s:.)", r"\x41", r"\u0041", r"\p{L}", r"\Aa", "a^b", "a$b",
        "^a|b$", "(a", "a)", "*a", "a]", "a}", "\\", "", "a" * (MOST_CHARACTERS + 1), r"[^\w\W]", "(" * 900 + ")" * 900,
    ],
)  # fmt: skip
def test_what_others_may_read_in_another_way_is_not_read(pattern: str) -> None:
    assert read(pattern) is None


@pytest.mark.parametrize("pattern", ["a", "[a-z]{2,9}", r"\w+", ".", "(?:a|b)*", "^a$", "^(a|b)$", r"\.", "é{3}"])
def test_what_is_common_is_read(pattern: str) -> None:
    assert read(pattern) is not None


def test_what_is_read_is_compiled_by_llguidance(vocabulary: Vocabulary) -> None:
    rng = random.Random(3)
    for _ in range(100):
        pattern = random_pattern(rng)
        try:
            assert read(pattern) is None or not matcher_of(pattern, vocabulary).is_error(), pattern
        except RequestError:
            continue


def test_characters_of_a_named_class_are_known_within_ascii_alone() -> None:
    found = read(r"[\w!]+")
    assert found is not None
    of_pattern, terms = found
    assert terms.after(of_pattern.term, ord("_")) is not terms.nothing
    assert terms.after(of_pattern.term, ord(" ")) is terms.nothing
    with pytest.raises(Unclear):
        terms.after(of_pattern.term, "é".encode()[0])


def test_bytes_that_never_stand_side_by_side_are_known() -> None:
    found = read("([a-z]{2,9} ){500}")
    assert found is not None
    of_pattern, _ = found
    assert may_have(of_pattern, b"ab cd e") and may_have(of_pattern, b" ")
    assert not any(may_have(of_pattern, text) for text in (b"a  b", b"A", b"aA", "é".encode()))


def test_bytes_that_no_part_tells_apart_are_one() -> None:
    found = read("[a-c]x[b-d]é")
    assert found is not None
    classes = found[0].classes
    assert classes[ord("a")] != classes[ord("b")] == classes[ord("c")] != classes[ord("d")] != classes[ord("x")]
    assert classes[ord("A")] == classes[0] and classes[0x80:] == bytes(range(0x80, 0x100))
