"""The base's tokenizer as the API uses it: plain ids and text, safe from several threads at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loramux_adapters.chat.encoder import TextEncoder
from loramux_adapters.errors import TemplateFailed, TokenizerMissing
from loramux_server.errors import BaseModelError, RequestError


class BaseTokenizer:
    """Wraps transformers' tokenizer; encodes and decodes through its Rust backend, which keeps no state.

    Attributes:
        encoder: what turns text into ids.
    """

    def __init__(
        self, tokenizer: Any, generation_config: Any, vocab_size: int, *, special_in_messages: bool = False
    ) -> None:
        """
        Args:
            generation_config: names further end tokens.
            vocab_size: the number of embeddings.
            special_in_messages: let what messages say become special tokens.
        Raises:
            BaseModelError: the base has no fast tokenizer.
        """
        self.stop_ids = stop_ids_of(tokenizer, generation_config)
        try:
            self.encoder = TextEncoder(tokenizer, self.stop_ids, special_in_messages=special_in_messages)
        except TokenizerMissing as error:
            raise BaseModelError(str(error)) from error
        self._backend = self.encoder.tokens.tokenizer
        self.vocab_size = vocab_size
        self.special_ids = frozenset(int(token) for token in tokenizer.all_special_ids)
        decoder = self._backend.decoder
        described = b"" if decoder is None else decoder.__getstate__()
        self._byte_of = _byte_alphabet() if b"ByteLevel" in described else None
        self.longest_token = max((len(token) for token in self._backend.get_vocab()), default=1)
        self._added = {token_id: str(token) for token_id, token in tokenizer.added_tokens_decoder.items()}

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """A prompt's ids, with the special tokens that the base expects around it.

        `special`: text that reads like a special token becomes one; otherwise no text does.
        Raises:
            RequestError: the text holds a token that the base has no embedding for.
        """
        return self._embedded(self.encoder.encode(text, special=special), "prompt")

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        template_kwargs: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """The base's own chat template over the messages, or `chat_template` in its place.

        What messages and arguments say never becomes a special token, unless the server was told to let it.
        Raises:
            RequestError: there is no template, or it refuses these messages, or they hold a token that the base has no
                embedding for.
        """
        try:
            template = self.encoder.template(chat_template)
            if template is None:
                raise RequestError(
                    "this base has no chat template, so it cannot chat; use /v1/completions", param="messages"
                )
            ids = template.ids(template.text(messages, template_kwargs, generate=add_generation_prompt))
        except TemplateFailed as error:
            whose = "base" if chat_template is None else "adapter"
            raise RequestError(
                f"the {whose}'s chat template refuses these messages: {error}", param="messages"
            ) from error
        return self._embedded(ids, "messages")

    def _embedded(self, ids: list[int], param: str) -> list[int]:
        """These ids. Some tokenizers know tokens that the checkpoint has no row of numbers for."""
        beyond = next((token for token in ids if token >= self.vocab_size), None)
        if beyond is not None:
            raise RequestError(
                f"'{param}': {self._backend.id_to_token(beyond)!r} is token {beyond} of the base's tokenizer, and the "
                f"base has embeddings for 0 to {self.vocab_size - 1} only; leave it out",
                param=param,
                code="invalid_value",
            )
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


def stop_ids_of(tokenizer: Any, generation_config: Any) -> frozenset[int]:
    """Ids that end a reply: the tokenizer's end token, and those that `generation_config` names."""
    ends = getattr(generation_config, "eos_token_id", None)
    ends = ends if isinstance(ends, list) else [ends]
    own_end = getattr(tokenizer, "eos_token_id", None)
    return frozenset(int(token) for token in [*ends, own_end] if token is not None)


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level BPE: printable Latin-1 stands for itself, the rest for code points from 256 up.

    Source: the GPT-2 byte encoder, as in the Hugging Face tokenizers documentation of `ByteLevel`.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}
