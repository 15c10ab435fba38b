"""What llguidance believes a token says is what a client reads, in every family of tokenizers."""

from __future__ import annotations

import numpy as np
import pytest

from loramux_server.base.tokenizer import BaseTokenizer
from loramux_server.errors import RequestError
from loramux_server.grammar.shape import Shape
from loramux_server.grammar.vocabulary import TokenTexts, Vocabulary
from support.grammar_walks import Walk, bytes_tokenizer, family_tokenizer, grammars_of, tokens_in
from support.tiny_models import tiny_tokenizer
from support.tokenizer_families import NAMES

JOINED = [name for name in NAMES if name not in ("WordPiece", "word level")]


@pytest.mark.parametrize("name", [*JOINED, ""])
def test_tokens_have_the_bytes_that_the_detokenizer_gives(name: str) -> None:
    tokenizer = family_tokenizer(name) if name else bytes_tokenizer()
    vocabulary = Vocabulary(tokenizer)

    assert vocabulary.size == tokenizer.vocab_size
    for token in range(vocabulary.size):
        text = vocabulary.text(token)
        if text and tokenizer.decode([token]) and text[:1] != b"\xff":
            assert vocabulary.tokenizer.decode_bytes([token]) == text
            assert not vocabulary.tokenizer.is_special_token(token)
            assert tokenizer.decode([token]) in (
                text.decode(errors="replace"),
                text.decode(errors="replace").lstrip(" "),
            )


@pytest.mark.parametrize("name", JOINED)
def test_any_text_lets_every_token_with_a_text_come_and_no_other(name: str) -> None:
    tokenizer = family_tokenizer(name)
    grammar = grammars_of(name).of(Shape("regex", r"(?s:.*)"), "guided_regex")
    allowed = set(tokens_in(grammar.mask()).tolist())

    assert tokenizer.stop_ids <= allowed
    for token in allowed - tokenizer.stop_ids:
        assert tokenizer.token_bytes(token)
    assert not allowed & set(range(tokenizer.vocab_size - 5, tokenizer.vocab_size))  # embeddings without a token
    for token in set(range(tokenizer.vocab_size)) - allowed:
        if tokenizer.decode([token]):  # it is no special one, then it continues a character that nothing began
            with pytest.raises(UnicodeDecodeError):
                tokenizer.token_bytes(token).decode()


@pytest.mark.parametrize("name", JOINED)
def test_a_choice_can_be_written_in_the_tokens_of_every_family(name: str) -> None:
    texts = ["yes", "yes, now", "no\n", "{a}"]
    for seed in range(4):
        walk = Walk(family_tokenizer(name), grammars_of(name).of(Shape("choice", texts), "guided_choice"), seed)

        assert walk.ended
        assert walk.text in texts


@pytest.mark.parametrize("name", ["WordPiece", "word level"])
def test_a_base_whose_tokens_are_not_joined_is_refused(name: str) -> None:
    with pytest.raises(RequestError, match="tokenizer does not write text"):
        grammars_of(name).of(Shape("json_object"), "response_format")


def test_every_end_token_may_end_a_reply() -> None:
    class Generation:
        eos_token_id = [256, 257]

    tokenizer = BaseTokenizer(tiny_tokenizer(), Generation(), 320)
    vocabulary = Vocabulary(tokenizer)

    assert vocabulary.stop_ids == {256, 257}
    assert set(vocabulary.tokenizer.eos_tokens) == {256, 257}


def test_a_base_without_an_end_token_has_masks_without_one() -> None:
    whole = tiny_tokenizer()
    whole.eos_token = None
    tokenizer = BaseTokenizer(whole, None, 300)
    vocabulary = Vocabulary(tokenizer)
    everything = np.full_like(vocabulary.empty_mask(), 0xFFFFFFFF)

    assert vocabulary.stop_ids == frozenset()
    assert tokens_in(vocabulary.choosable(everything)).max() == 257


def test_a_tokenizer_may_know_more_tokens_than_the_base() -> None:
    vocabulary = Vocabulary(BaseTokenizer(tiny_tokenizer(), None, 200))
    everything = np.full_like(vocabulary.empty_mask(), 0xFFFFFFFF)

    assert tokens_in(vocabulary.choosable(everything)).max() == 199
    assert vocabulary.choosable(everything).shape == (7,)


def test_the_longest_token_that_has_certain_bytes_side_by_side_is_found() -> None:
    texts = TokenTexts([b"abc", b"", b"ab", b"aab", b"b", b"\xff\x00"])
    beside = [0] * 256
    beside[ord("a")] = 1 << ord("b")
    a_and_b = 1 << ord("a") | 1 << ord("b")
    assert texts.longest(a_and_b, beside) == 2
    assert texts.longest(1 << ord("b"), beside) == 1
    assert texts.longest(1 << ord("c"), beside) == 0
    beside[ord("b")] = 1 << ord("c")
    assert texts.longest(a_and_b, beside) == 3
    beside[0xFF] = 1
    assert texts.longest(1 << 0xFF, beside) == 2
    assert TokenTexts([]).longest(1, beside) == 0
