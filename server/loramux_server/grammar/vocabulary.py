"""The base's tokens as llguidance sees them: which bytes each one stands for, and which end a reply."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from loramux_server.errors import RequestError

if TYPE_CHECKING:
    import llguidance

    from loramux_server.base.tokenizer import BaseTokenizer

_NO_TEXT = b"\xff"  # no text has this byte, and llguidance marks special tokens with it
_PROBE = '{"name": "x y",\n "values": [1, 2.5, null]}'


class _Tokens:
    """What llguidance asks of a tokenizer. How it cuts a text is never asked: no text is forced."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokens: list[bytes], special: list[int], end: int, encode: Callable[[str], list[int]]) -> None:
        self.tokens = tokens
        self.special_token_ids = special
        self.eos_token_id = end
        self._encode = encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)


class TokenTexts:
    """The bytes of tokens, for questions about all of them at once. Immutable."""

    def __init__(self, texts: Iterable[bytes]) -> None:
        kept = [text for text in texts if text]
        self._lengths = np.array([len(text) for text in kept], dtype=np.int64)
        self._starts = np.cumsum(self._lengths) - self._lengths
        self._bytes = np.frombuffer(b"".join(kept), dtype=np.uint8)
        self._pairs = self._bytes.astype(np.uint16)  # each byte with the one before it, 256 of which count one
        self._pairs[1:] += self._bytes[:-1].astype(np.uint16) << 8

    def longest(self, inside: int, beside: Sequence[int]) -> int:
        """Bytes of the longest one that has bytes of `inside` alone, each followed by one that is beside it; 0: none.

        Args:
            inside: bit i for byte i.
            beside: for each byte, those that may follow it, in the same way.
        """
        follows = _bits_of(b"".join(each.to_bytes(32, "little") for each in beside))[self._pairs]
        follows[self._starts] = _bits_of(inside.to_bytes(32, "little"))[self._bytes[self._starts]]
        whole = np.logical_and.reduceat(follows, self._starts) if len(self._starts) else np.zeros(0, dtype=np.bool_)
        return int(self._lengths[whole].max(initial=0))


def _bits_of(packed: bytes) -> npt.NDArray[np.bool_]:
    return np.unpackbits(np.frombuffer(packed, dtype=np.uint8), bitorder="little").astype(np.bool_)


class Vocabulary:
    """Immutable. Building it takes a third of a second for 50,000 tokens.

    A token is special to a grammar where a client does not see its text: a grammar names it as `<its text>`, and no
    text or pattern matches it. Every other token is its bytes, also one that was added to the vocabulary.

    Attributes:
        tokenizer: llguidance's. It has one token more than the base where none of the base's ends a reply.
        size: the number of embeddings.
        stop_ids: tokens that end a reply.
        texts: of all tokens.
    """

    def __init__(self, tokenizer: BaseTokenizer) -> None:
        """Raises RequestError: this base's tokens make no text by being joined, so that no grammar can follow them."""
        import llguidance  # not above: a server that is never asked for a shape does without it

        self.size = tokenizer.vocab_size
        self.stop_ids = frozenset(token for token in tokenizer.stop_ids if token < self.size)
        self._bytes_of = [tokenizer.token_bytes(token) for token in range(self.size)]
        self.texts = TokenTexts(self._bytes_of)
        if not self._joined(tokenizer):
            raise RequestError(
                "this base's tokenizer does not write text as its tokens' bytes, one after the other, so a reply "
                "cannot be held to a schema, a pattern, a choice or a grammar",
                code="unsupported_value",
            )
        tokens = list(self._bytes_of)
        silent = {token for token, text in enumerate(tokens) if not text or text[:1] == _NO_TEXT}
        for token in silent:  # a name that no grammar says
            tokens[token] = b"<[no text %d]>" % token
        ends = sorted(self.stop_ids)
        if not ends:  # llguidance needs one; no mask shows it
            ends = [len(tokens)]
            tokens.append(b"<[no end]>")
        unseen = {token for token in _unseen(tokenizer) if token < self.size}
        special = sorted(unseen | silent | set(ends))
        wrapped: Any = _Tokens(tokens, special, ends[0], lambda text: tokenizer.encoder.encode(text, special=False))
        self.tokenizer: llguidance.LLTokenizer = llguidance.LLTokenizer(wrapped, eos_token=ends)
        self._num_words = -(-self.size // 32)
        self._choosable = self._mask_of([*(set(range(self.size)) - silent), *self.stop_ids])
        self._stops = self._mask_of(self.stop_ids)

    def _joined(self, tokenizer: BaseTokenizer) -> bool:
        around = _unseen(tokenizer)  # such as a token that begins every prompt
        ids = [token for token in tokenizer.encoder.encode(_PROBE, special=False) if token not in around]
        return b"".join(tokenizer.token_bytes(token) for token in ids).strip() == _PROBE.encode()

    def text(self, token: int) -> bytes:
        """The bytes of this token, as a client sees them; nothing for one that ends a reply."""
        return b"" if token in self.stop_ids else self._bytes_of[token]

    def empty_mask(self) -> npt.NDArray[np.uint32]:
        """Room for llguidance's mask, which may be longer than the base's."""
        return np.zeros(-(-self.tokenizer.vocab_size // 32), dtype=np.uint32)

    def choosable(self, mask: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
        """[ceil(size / 32)]: of llguidance's mask, the tokens that have a text or end a reply, and an embedding."""
        return mask[: self._num_words] & self._choosable

    def without_ends(self, mask: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
        """Of a `choosable` mask, the tokens that do not end the reply."""
        return mask & ~self._stops

    def _mask_of(self, tokens: Iterable[int]) -> npt.NDArray[np.uint32]:
        bits = np.zeros(self._num_words * 32, dtype=np.uint8)
        bits[list(tokens)] = 1
        return np.packbits(bits, bitorder="little").view(np.uint32)


def _unseen(tokenizer: BaseTokenizer) -> frozenset[int]:
    """Tokens that are left out of what a client reads."""
    added = tokenizer.encoder.tokens.tokenizer.get_added_tokens_decoder()
    return tokenizer.special_ids | {token for token, each in added.items() if each.special}
