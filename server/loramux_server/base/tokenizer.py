"""The base's tokenizer as the API uses it: plain ids and text, safe from several threads at once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from tokenizers import Tokenizer

from loramux_server.errors import BaseModelError, RequestError


class BaseTokenizer:
    """Wraps transformers' tokenizer; encodes and decodes through its Rust backend, which keeps no state."""

    def __init__(self, tokenizer: Any, generation_config: Any, vocab_size: int) -> None:
        """`generation_config` names further end tokens; `vocab_size` is the number of embeddings.

        Raises:
            BaseModelError: the base has no fast tokenizer.
        """
        self._tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise BaseModelError("the base has no fast tokenizer (tokenizer.json)")
        self._backend = Tokenizer.from_str(backend.to_str())  # a copy: what follows must not change the caller's
        self._backend.no_truncation()  # checkpoints saved after training often carry both
        self._backend.no_padding()
        self.vocab_size = vocab_size
        self.special_ids = frozenset(int(token) for token in tokenizer.all_special_ids)
        ends = getattr(generation_config, "eos_token_id", None)
        ends = ends if isinstance(ends, list) else [ends]
        self.stop_ids = frozenset(int(token) for token in [*ends, tokenizer.eos_token_id] if token is not None)
        self._byte_of = _byte_alphabet() if "ByteLevel" in json.dumps(json.loads(backend.to_str())["decoder"]) else None
        self.longest_token = max((len(token) for token in self._backend.get_vocab()), default=1)
        self._added = {token_id: str(token) for token_id, token in tokenizer.added_tokens_decoder.items()}

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """A prompt's ids, with the special tokens that the base expects around it."""
        return self._ids(text, special=True)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        template_kwargs: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """The base's own chat template over the messages, or `chat_template` in its place.

        The template runs in transformers' immutable sandbox.
        Raises:
            RequestError: the base has no template, or its template refuses these messages.
        """
        if not (chat_template or self._tokenizer.chat_template):
            raise RequestError(
                "this base has no chat template, so it cannot chat; use /v1/completions", param="messages"
            )
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **(template_kwargs or {}),
            )
        except TemplateError as error:
            raise RequestError(f"the base's chat template refuses these messages: {error}", param="messages") from error
        return self._ids(text, special=False)

    def _ids(self, text: str, *, special: bool) -> list[int]:
        # in a batch of one: `encode` would hold the interpreter's lock for seconds on a long text, and stop all streams
        ids: list[int] = self._backend.encode_batch([text], add_special_tokens=special)[0].ids
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of these ids, special tokens left out, without clean-up of spaces."""
        text: str = self._backend.decode(list(token_ids), skip_special_tokens=True)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that this id stands for; part of a character for some."""
        if token_id in self._added:
            return self._added[token_id].encode()
        token: str | None = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_of is not None:
            return bytes(self._byte_of[character] for character in token if character in self._byte_of)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return token.replace("\u2581", " ").encode()


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level BPE: printable Latin-1 stands for itself, the rest for code points from 256 up.

    Source: the GPT-2 byte encoder, as in the Hugging Face tokenizers documentation of `ByteLevel`.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}
