"""Replies of a model that knows nothing: tokens drawn at random from a grammar's masks, with an end in mind."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import numpy as np

from loramux_server.base.tokenizer import BaseTokenizer
from loramux_server.grammar.grammars import Grammars
from support.tiny_models import tiny_tokenizer
from support.tokenizer_families import family

CLOSING = (b"}", b"]", b'"')  # what brings JSON to its end outside of a string, in this order


@cache
def bytes_tokenizer() -> BaseTokenizer:
    """One token a byte, and 257 ends a reply."""
    return BaseTokenizer(tiny_tokenizer(), None, 320)


@cache
def family_tokenizer(name: str) -> BaseTokenizer:
    tokenizer: Any = family(name)
    return BaseTokenizer(tokenizer, None, len(tokenizer) + 5)


@cache
def grammars_of(name: str = "") -> Grammars:
    """Of a family, or of single bytes; nobody may close it."""
    return Grammars(family_tokenizer(name) if name else bytes_tokenizer(), num_workers=1)


def tokens_in(mask: np.ndarray) -> np.ndarray:
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))


class Walk:
    """A reply that a grammar lets come.

    Attributes:
        tokens: that were chosen, an end token left out.
        text: of them.
        ended: it came to an end within its tokens.
    """

    def __init__(
        self, tokenizer: BaseTokenizer, grammar: Any, seed: int, *, max_tokens: int = 300, calm: int = 40
    ) -> None:
        """`calm`: tokens after which every choice is made in a hurry; before, ever more of them are."""
        rng = random.Random(seed)
        self.tokens: list[int] = []
        self.ended = False
        in_string = _StringState()
        while not self.ended and len(self.tokens) < max_tokens:
            allowed = tokens_in(grammar.mask())
            closing = (b'"',) if in_string else CLOSING
            token = _choice(tokenizer, allowed, rng, closing, hurry=len(self.tokens) / calm)
            grammar.advance(token)
            self.ended = bool(grammar.ended)
            if token not in tokenizer.stop_ids:
                self.tokens.append(token)
                in_string.add(tokenizer.token_bytes(token))
        self.text = b"".join(tokenizer.token_bytes(token) for token in self.tokens).decode(errors="replace")


class _StringState:
    """Whether JSON so far ends within a string."""

    def __init__(self) -> None:
        self._inside = self._escaped = False

    def __bool__(self) -> bool:
        return self._inside

    def add(self, text: bytes) -> None:
        for byte in text:
            if self._escaped:
                self._escaped = False
            elif byte == ord("\\"):
                self._escaped = self._inside
            elif byte == ord('"'):
                self._inside = not self._inside


def _choice(
    tokenizer: BaseTokenizer, allowed: np.ndarray, rng: random.Random, closing: tuple[bytes, ...], *, hurry: float
) -> int:
    ends = [token for token in tokenizer.stop_ids if token in allowed]
    if ends and (len(ends) == len(allowed) or rng.random() < max(0.3, hurry)):
        return ends[0]
    others = [int(token) for token in rng.choices(allowed, k=24) if token not in tokenizer.stop_ids]
    drawn = others or [int(token) for token in allowed if token not in tokenizer.stop_ids][:1]
    if rng.random() >= hurry:
        return drawn[0]
    known = _of_one_byte(tokenizer)
    for text in closing:
        if text in known and known[text] in allowed:
            return known[text]
    shown = [int(token) for token in allowed] if len(allowed) < 400 else drawn
    for text in closing:
        for token in shown:
            if tokenizer.token_bytes(token).lstrip().startswith(text):
                return token
    return drawn[0]


@cache
def _of_one_byte(tokenizer: BaseTokenizer) -> dict[bytes, int]:
    texts = {tokenizer.token_bytes(token): token for token in range(tokenizer.vocab_size)}
    return {text: texts[text] for text in CLOSING if text in texts}
