"""How bases are asked to fill in, and the ids of the two texts around the gap."""

from __future__ import annotations

from copy import deepcopy
from types import SimpleNamespace

import pytest
from tokenizers import AddedToken

from loramux_server.base.infill import infill_of
from loramux_server.base.tokenizer import BaseTokenizer
from support.tokenizer_families import NAMES, family

NO_CONFIG = SimpleNamespace(eos_token_id=None)


def tokenizer_of(name: str, vocab_size: int | None = None) -> BaseTokenizer:
    tokenizer = family(name)
    return BaseTokenizer(tokenizer, NO_CONFIG, vocab_size or len(tokenizer))


@pytest.mark.parametrize(
    ("tokens", "expected", "ends"),
    [
        (["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|file_sep|>"], [0, 77, 1, 88, 2], {3}),
        (["<fim_middle>", "<fim_suffix>", "<fim_prefix>", "<fim_pad>"], [2, 77, 1, 88, 0], {3}),
        (["<fim-prefix>", "<fim-suffix>", "<fim-middle>"], [0, 77, 1, 88, 2], set()),
        (["<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"], [0, 77, 1, 88, 2], set()),
        (["▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"], [0, 77, 1, 88, 2], {3}),
        (["[SUFFIX]", "[PREFIX]", "[MIDDLE]"], [0, 88, 1, 77], set()),
        (["<[fim-suffix]>", "<[fim-prefix]>", "<[fim-middle]>"], [0, 88, 1, 77, 2], set()),
    ],
)
def test_a_family_is_known_by_its_tokens(tokens: list[str], expected: list[int], ends: set[int]) -> None:
    infill = infill_of(dict(zip(tokens, range(9), strict=False)).get)
    assert infill is not None and infill.prompt([77], [88]) == expected
    assert infill.end_ids == ends


def test_a_base_without_these_tokens_does_not_fill_in() -> None:
    assert infill_of({"<|fim_prefix|>": 0, "<|fim_suffix|>": 1}.get) is None
    assert tokenizer_of("Llama 2").infill is None


def test_tokens_without_an_embedding_do_not_count() -> None:
    own = deepcopy(family("byte-level BPE"))
    size = len(own)
    own.add_tokens([AddedToken(f"<|fim_{part}|>", special=True) for part in ("prefix", "suffix", "middle")])
    assert BaseTokenizer(own, NO_CONFIG, size + 3).infill is not None
    assert BaseTokenizer(own, NO_CONFIG, size + 2).infill is None


@pytest.mark.parametrize("name", sorted({*NAMES} - {"WordPiece", "word level", "unigram"}))
@pytest.mark.parametrize("text", ["return x", " return x", "\n    return x", "'s holiday", "x"])
def test_a_text_that_follows_another_has_no_space_in_front_and_nothing_around(name: str, text: str) -> None:
    """Tokenizers that do not tell spaces at a text's border are left out."""
    tokenizer = tokenizer_of(name)
    front, ids = tokenizer.encode("x", around=False), tokenizer.encode_piece(text)
    assert tokenizer.decode(front + ids) == tokenizer.decode(front) + text
    assert not set(ids) & tokenizer.special_ids
