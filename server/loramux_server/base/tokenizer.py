"""The base's tokenizer as the API uses it: plain ids and text, safe from several threads at once."""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from loramux_adapters.artifact.own_tokens import OwnTokens
from loramux_adapters.chat.compare import add_tokens
from loramux_adapters.chat.encoder import ChatTemplate, TextEncoder
from loramux_adapters.errors import TemplateFailed, TokenizerMissing
from loramux_server.base.infill import Infill, infill_of
from loramux_server.errors import BaseModelError, RequestError
from loramux_server.tools.calls import AddedTokens
from loramux_server.tools.conventions import Conventions, conventions_of

_KEPT = 64  # conventions of templates
_EXTENDED = 8  # tokenizers with tokens of adapters; one takes 10 to 100 MB

_MARK = "\u263a"  # no word begins with it


class BaseTokenizer:
    """Wraps transformers' tokenizer; encodes and decodes through its Rust backend, which keeps no state.

    Attributes:
        encoder: what turns text into ids.
        source: transformers' tokenizer.
        infill: how the base fills in what stands between two texts; None if it has no tokens for that.
    """

    def __init__(
        self,
        tokenizer: Any,
        generation_config: Any,
        vocab_size: int,
        *,
        special_in_messages: bool = False,
        further_special: Iterable[int] = (),
        further_ends: Iterable[int] = (),
    ) -> None:
        """
        Args:
            generation_config: names further end tokens.
            vocab_size: the number of embeddings.
            special_in_messages: let what messages say become special tokens.
            further_special, further_ends: ids beside those that the tokenizer names so.
        Raises:
            BaseModelError: the base has no fast tokenizer.
        """
        self.stop_ids = stop_ids_of(tokenizer, generation_config) | frozenset(further_ends)
        try:
            self.encoder = TextEncoder(tokenizer, self.stop_ids, special_in_messages=special_in_messages)
        except TokenizerMissing as error:
            raise BaseModelError(str(error)) from error
        self._backend = self.encoder.tokens.tokenizer
        self.vocab_size = vocab_size
        self.special_ids = frozenset(int(token) for token in tokenizer.all_special_ids) | frozenset(further_special)
        self.source = tokenizer
        self._given = generation_config, special_in_messages
        self._extended: OrderedDict[OwnTokens, BaseTokenizer] = OrderedDict()
        self._extending = threading.Lock()
        decoder = self._backend.decoder
        described = b"" if decoder is None else decoder.__getstate__()
        self._byte_of = _byte_alphabet() if b"ByteLevel" in described else None
        self.longest_token = max((len(token) for token in self._backend.get_vocab()), default=1)
        self._added = {token_id: str(token) for token_id, token in tokenizer.added_tokens_decoder.items()}
        hidden = frozenset(text for token_id, text in self._added.items() if token_id in self.special_ids)
        added = AddedTokens({text: token_id for token_id, text in self._added.items()}, hidden)
        variables = dict(tokenizer.special_tokens_map)
        self._conventions = lru_cache(_KEPT)(lambda source: conventions_of(source, variables, added))
        self.infill: Infill | None = infill_of(self._embedded_id)
        self._mark = self._ids(_MARK)
        self._pads = self._behind_mark("a") != self._ids("a")

    def with_tokens(self, own: OwnTokens | None) -> BaseTokenizer:
        """This tokenizer with what a version adds to it; itself if that is nothing.

        The first time for some tokens takes up to a second; the last few are kept.
        """
        if own is None:
            return self
        with self._extending:
            found = self._extended.get(own) or self._extend(own)
            self._extended[own] = found
            self._extended.move_to_end(own)
            while len(self._extended) > _EXTENDED:
                self._extended.popitem(last=False)
            return found

    def _extend(self, own: OwnTokens) -> BaseTokenizer:
        generation_config, special_in_messages = self._given
        tokenizer = copy.deepcopy(self.source)
        add_tokens(tokenizer.backend_tokenizer, own.tokens)
        for name, text in own.ends:
            setattr(tokenizer, name, text)
        return BaseTokenizer(
            tokenizer,
            generation_config,
            max(self.vocab_size, own.size),
            special_in_messages=special_in_messages,
            further_special=self.special_ids | {token.id for token in own.tokens if token.special},
            further_ends=self.stop_ids,
        )

    def encode(self, text: str, *, special: bool = True, around: bool = True) -> list[int]:
        """A prompt's ids.

        `special`: text that reads like a special token becomes one; otherwise no text does.
        `around`: with the special tokens that the base expects around a prompt.
        Raises:
            RequestError: the text holds a token that the base has no embedding for.
        """
        return self._embedded(self.encoder.encode(text, special=special, around=around), "prompt")

    def encode_piece(self, text: str, *, special: bool = True) -> list[int]:
        """The ids of a text that follows another: no special tokens around it, no space put in front of it.

        Raises:
            RequestError: the text holds a token that the base has no embedding for.
        """
        ids = self._behind_mark(text, special) if self._pads else self._ids(text, special)
        return self._embedded(ids, "suffix")

    def _behind_mark(self, text: str, special: bool = True) -> list[int]:
        """What a tokenizer puts in front of a text stands in front of the mark then; unless it joined the two."""
        ids = self._ids(_MARK + text, special)
        count = len(self._mark)
        return ids[count:] if ids[:count] == self._mark else self._ids(text, special)

    def _ids(self, text: str, special: bool = True) -> list[int]:
        return self.encoder.encode(text, special=special, around=False)

    def _embedded_id(self, text: str) -> int | None:
        token: int | None = self._backend.token_to_id(text)
        return token if token is not None and token < self.vocab_size else None

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        template_kwargs: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> list[int]:
        """The base's own chat template over the messages, or `chat_template` in its place.

        What messages and arguments say never becomes a special token, unless the server was told to let it.

        Args:
            template_kwargs: further variables; `tools` are told to the template by that name.
            continue_final_message: the prompt ends where the text of the last message does.
        Raises:
            RequestError: there is no template, or it refuses these messages, or they hold a token that the base has no
                embedding for.
        """
        try:
            template = self._template(chat_template)
            text = template.text(
                messages, template_kwargs, generate=add_generation_prompt, open_last=continue_final_message
            )
            ids = template.ids(text)
        except TemplateFailed as error:
            whose = "base" if chat_template is None else "adapter"
            raise RequestError(
                f"the {whose}'s chat template refuses these messages: {error}", param="messages"
            ) from error
        return self._embedded(ids, "messages")

    def conventions(self, chat_template: str | None = None) -> Conventions:
        """How the base's chat template has calls and thoughts written, or `chat_template`. Found once for each.

        Raises:
            RequestError: there is no template, or it cannot be used.
        """
        try:
            return self._conventions(self._template(chat_template).source)
        except TemplateFailed as error:
            raise RequestError(f"the chat template cannot be used: {error}", param="messages") from error

    def _template(self, source: str | None) -> ChatTemplate:
        """Raises RequestError, TemplateFailed."""
        template = self.encoder.template(source)
        if template is None:
            raise RequestError(
                "this base has no chat template, so it cannot chat; use /v1/completions", param="messages"
            )
        return template

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

    def decode(self, token_ids: Sequence[int], *, special: bool = False) -> str:
        """Text of these ids, without clean-up of spaces; special tokens are left out unless `special` is true."""
        text: str = self._backend.decode(list(token_ids), skip_special_tokens=not special)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that this id stands for; part of a character for some."""
        if token_id in self._added:
            added = self._added[token_id]
            return (added if self._byte_of is not None else added.replace("\u2581", " ")).encode()
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
