"""Patterns for tests, and llguidance's word on what may follow in them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np

from loramux_server.grammar.limits import GrammarLimits
from loramux_server.grammar.shape import Shape
from loramux_server.grammar.shared_masks import Mask
from loramux_server.grammar.source import source_of
from loramux_server.grammar.vocabulary import TokenTexts, Vocabulary, _Tokens
from support.grammar_walks import tokens_in

WRITTEN = [
    r"([a-z]{2,9} ){500}",
    r"^[a-z ]*$",
    r"[^\n]+",
    r".*",
    r"a.{3,}b?",
    r"(\w+ )*\w+\.",
    r"\d{3}-\d{4}",
    r"(?:[A-Z][a-z]+ ){3,}",
    r"(?P<year>\d{4})-(?<month>0[1-9]|1[0-2])",
    r"[\w.+-]+@[\w-]+\.[a-z]{2,}",
    r"[a-z-9]+[-a][a-]",
    r"[^\s\d]{2,5}\S?",
    r"[^\W\d]+\D",
    r"[é-ü]+ ?[日本語]{1,3}",
    r"[^é]+[\x5d\]]",
    r"[😀-😎]{2}.",
    r"(a|ab|abc)*d",
    r"(a*)*b",
    r"(a|b|)(c?)+",
    r"((a{3}){4}){5}",
    r"(|a)(|b)",
    r"x{0,3}y{2,}z{2}",
    r"\$\{\w+\}\n\t\\\/",
    r"[]a]+",
    r"[a&&b]+",
    r"[[:alpha:]]+",
    r"a{,3}",
    r"a+?b??",
    r"(.+?\n){3}.{2,5}?x",
    r"(?i)abc",
    r"\x41+",
    r"\p{L}+",
    "a/b\"'",
    "\n+ ",
    "",
]


def random_pattern(rng: random.Random, depth: int = 3) -> str:
    """Of the characters a, b, space, é and 語, with whatever operators are read."""
    kind = rng.random()
    if depth == 0 or kind < 0.25:
        return rng.choice(["a", "b", " ", "é", "語", ".", "[ab]", "[^a]", "[^b é]", r"\w", r"\s", "[a-é]", r"[^\d ]"])
    if kind < 0.55:
        return "".join(random_pattern(rng, depth - 1) for _ in range(rng.randint(2, 3)))
    if kind < 0.7:
        return "(" + "|".join(random_pattern(rng, depth - 1) for _ in range(rng.randint(2, 3))) + ")"
    count = rng.choice(["*", "+", "?", "{2}", "{3,}", "{0,4}", "{2,7}", "{40}", "{9,60}"])
    return f"({random_pattern(rng, depth - 1)}){count}"


def vocabulary_of_many_texts() -> Vocabulary:
    """Every text of up to four of a few characters and three of their bytes: tokens that see far ahead."""
    tokens = [b"\xff<end>"]
    for length in range(1, 5):
        some = [b"a", b"b", b" ", *([b"c", b"\xc3", b"\xa9", b"\xe8\xaa", b"\x9e"] if length < 4 else [])]
        tokens += [b"".join(text) for text in itertools.product(some, repeat=length)]
    return _vocabulary_of(list(dict.fromkeys(tokens)))


def _vocabulary_of(tokens: list[bytes]) -> Vocabulary:
    """Without a tokenizer, which would have to be trained to these. The first one ends a reply."""
    import llguidance

    made = Vocabulary.__new__(Vocabulary)
    made.size, made.stop_ids = len(tokens), frozenset([0])
    made._bytes_of = tokens
    made.texts = TokenTexts(tokens[1:])
    wrapped: Any = _Tokens(tokens, [0], 0, lambda text: [])
    made.tokenizer = llguidance.LLTokenizer(wrapped, eos_token=[0])
    made._num_words = -(-made.size // 32)
    made._choosable, made._stops = made._mask_of(range(made.size)), made._mask_of([0])
    return made


def matcher_of(pattern: str, vocabulary: Vocabulary) -> Any:
    """llguidance's, at the start; it is in its error state where the pattern is wrong."""
    from llguidance import LLMatcher

    text = source_of(Shape("regex", pattern), "p", GrammarLimits()).text
    return LLMatcher(vocabulary.tokenizer, text, log_level=0)


def mask_of(matcher: Any, vocabulary: Vocabulary) -> Mask:
    """As a reply that knows no other is given it."""
    mask = vocabulary.empty_mask()
    matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
    assert not matcher.is_error(), matcher.get_error()
    mask, may_end = vocabulary.choosable(mask), bool(matcher.is_accepting())
    return Mask(mask if may_end else vocabulary.without_ends(mask), may_end)


def walk(pattern: str, vocabulary: Vocabulary, rng: random.Random, most: int) -> Iterator[tuple[int | None, Mask]]:
    """Tokens drawn at random, the first one None, each with llguidance's mask of what may follow it."""
    matcher, token = matcher_of(pattern, vocabulary), None
    for _ in range(most):
        mask = mask_of(matcher, vocabulary)
        yield token, mask
        allowed: np.ndarray = tokens_in(vocabulary.without_ends(mask.bits))
        if not len(allowed):
            return
        token = int(rng.choice(allowed))
        assert matcher.consume_token(token)
        if matcher.is_stopped():
            return
