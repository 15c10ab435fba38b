"""Terms of patterns: what cutting them leaves as it is, and their bounds."""

from __future__ import annotations

import random

import pytest

from loramux_server.grammar.pattern_reading import read_pattern
from loramux_server.grammar.residuals import Term, Terms, Unclear, all_but, ranges_of
from support.patterns import random_pattern

ALPHABET = b"ab "


def texts_and_beginnings(terms: Terms, term: Term, length: int) -> tuple[set[bytes], set[bytes]]:
    """Whole texts shorter than `length`, and what begins texts up to it: found by writing out all there are."""
    whole: set[bytes] = set()
    beginnings: set[bytes] = set()
    left = [(b"", term)]
    while left:
        text, rest = left.pop()
        beginnings.add(text)
        if rest.nullable and len(text) < length:
            whole.add(text)
        if len(text) == length:
            continue
        if rest is terms.anything:
            left += [(text + bytes([byte]), rest) for byte in ALPHABET]
            continue
        for byte in ALPHABET:
            after = after_with_anything(terms, rest, byte)
            if after is not terms.nothing:
                left.append((text + bytes([byte]), after))
    return whole, beginnings


def after_with_anything(terms: Terms, term: Term, byte: int) -> Term:
    """`after`, which is not for cut terms: it takes what follows a cut for nothing."""
    if term is terms.anything:
        return term
    if term.kind == "then":
        first, rest = term.parts
        after = terms.then(after_with_anything(terms, first, byte), rest)
        return terms.either((after, after_with_anything(terms, rest, byte))) if first.nullable else after
    if term.kind == "either":
        return terms.either([after_with_anything(terms, part, byte) for part in term.parts])
    if term.kind == "repeat":
        once, least, most = term.parts
        more = terms.repeat(once, max(0, least - 1), None if most is None else most - 1)
        return terms.then(after_with_anything(terms, once, byte), more)
    return terms.after(term, byte)


def test_a_cut_term_has_the_same_texts_and_beginnings_as_far_as_it_goes() -> None:
    """Against a slow reference that writes all of them out."""
    rng = random.Random(11)
    cut_away = 0
    for _ in range(400):
        terms = Terms(10**6, 10**9)
        term = read_pattern(random_pattern(rng).replace("é", "a").replace("語", "b"), terms).term
        for length in (1, 2, 4, 5):
            cut = terms.cut(term, length)
            cut_away += cut is not term
            assert texts_and_beginnings(terms, cut, length) == texts_and_beginnings(terms, term, length)
    assert cut_away > 300


def cut_of(terms: Terms, pattern: str, text: bytes, length: int) -> Term:
    term = read_pattern(pattern, terms).term
    for byte in text:
        term = terms.after(term, byte)
    return terms.cut(term, length)


def test_places_that_differ_further_ahead_than_is_seen_are_alike() -> None:
    terms = Terms(10**5, 10**9)
    pattern = "([a-z]{2,9} ){500}"
    assert cut_of(terms, pattern, b"abc def ", 15) is cut_of(terms, pattern, b"xy ", 15)
    assert cut_of(terms, pattern, b"abc", 15) is cut_of(terms, pattern, b"xy zab", 15)
    assert cut_of(terms, pattern, b"abc", 15) is not cut_of(terms, pattern, b"ab", 15)
    short = "([a-z]{2,9} ){5}"
    assert cut_of(terms, short, b"", 12) is cut_of(terms, short, b"ab ", 12)
    assert cut_of(terms, short, b"", 13) is not cut_of(terms, short, b"ab ", 13)


def test_terms_that_are_written_alike_are_one() -> None:
    terms = Terms(1_000, 10_000)
    a, b = (terms.characters(((ord(it),) * 2,)) for it in "ab")
    assert terms.then(terms.then(a, b), a) is terms.then(a, terms.then(b, a))
    assert terms.either([a, b, a]) is terms.either([terms.either([b, a]), terms.nothing])
    assert terms.then(a, terms.nothing) is terms.then(terms.nothing, a) is terms.nothing
    assert terms.then(terms.empty, a) is terms.then(a, terms.empty) is terms.repeat(a, 1, 1) is a
    assert (
        terms.repeat(terms.nothing, 0, None) is terms.repeat(a, 0, 0) is terms.repeat(terms.empty, 3, 9) is terms.empty
    )
    assert terms.repeat(terms.nothing, 1, None) is terms.either([]) is terms.nothing
    assert terms.repeat(terms.repeat(a, 0, 1), 3, 5) is terms.repeat(terms.repeat(a, 0, 1), 0, 5)
    assert terms.then(a, terms.repeat(b, 3, None)).least == 4


def test_no_more_terms_are_held_and_looked_at_than_may_be() -> None:
    terms = Terms(100, 10_000)
    with pytest.raises(Unclear):
        read_pattern("".join(f"(a.{{{count}}}|b)" for count in range(20, 60)), terms)
    assert terms.count == 100
    for pattern, text in [
        ("(a?b?){200}x{3}", b"ab"),
        ("a?" * 300, b"a"),
        (".*" * 200, b"a"),
        ("(a|b)*a(a|b){99}", b"a"),
    ]:
        terms = Terms(10**6, 10**6)
        rest = read_pattern(pattern, terms).term
        terms.work = 100
        with pytest.raises(Unclear):
            for _ in range(200):
                terms.cut(rest, 64)
                for byte in text:
                    rest = terms.after(rest, byte)


@pytest.mark.parametrize(
    ("begun", "rest"),
    [
        (b"\xc1", None), (b"\xc2", 1), (b"\xe0\x9f", None), (b"\xe0\xa0", 1), (b"\xed\x9f", 1), (b"\xed\xa0", None),
        (b"\xf0\x8f", None), (b"\xf0\x90", 2), (b"\xf4\x8f", 2), (b"\xf4\x90", None), (b"\xf5", None), (b"\x80", None),
        (b"\xe2\x41", None), (b"\xff", None), (b"\xe2\x82\xac", 0),
    ],
)  # fmt: skip
def test_half_characters_are_those_of_utf_8(begun: bytes, rest: int | None) -> None:
    terms = Terms(100, 10_000)
    term = terms.characters(all_but(()))
    for byte in begun:
        term = terms.after(term, byte)
    assert (None if term is terms.nothing else term.least) == rest


def test_ranges_have_no_surrogates_and_are_joined() -> None:
    assert ranges_of([(5, 9), (1, 3), (4, 4), (8, 12)]) == ((1, 12),)
    assert all_but(()) == ((0, 0xD7FF), (0xE000, 0x10FFFF))
    assert all_but(((0, 0xD7FF),)) == ((0xE000, 0x10FFFF),)
    assert all_but(all_but(((7, 9),))) == ((7, 9),)
    assert ranges_of([(0xD800, 0xDFFF)]) == ()


def test_a_term_with_many_parts_counts_as_several() -> None:
    """Their memory goes with their parts: half of all texts of a and b so far are in what may follow here."""
    terms = Terms(10**6, 10**9)
    term, before = read_pattern("(a|b)*a(a|b){400}", terms).term, 0
    for _ in range(300):
        before = terms.count
        term = terms.after(term, ord("a"))
    assert term.kind == "either" and len(term.parts) > 250
    assert terms.count - before > len(term.parts) // 10
    terms = Terms(200, 10**9)
    single = [terms.characters(((code, code),)) for code in range(60)]
    with pytest.raises(Unclear):  # after fewer than 60 of them
        for count in range(2, 60):
            terms.either(single[:count])
