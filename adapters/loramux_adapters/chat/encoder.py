"""What of a base turns messages and text into tokens: its tokenizer, its chat template, and which text is special."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from loramux_adapters.chat.sandbox import MAX_SECONDS
from loramux_adapters.chat.special_tokens import SpecialTokens, fast_tokenizer
from loramux_adapters.chat.template import GIVEN, CompiledTemplate, Conversation, normal
from loramux_adapters.errors import TemplateFailed, TokenizerMissing

_KEPT = 64  # compiled templates


class TextEncoder:
    """Any number of threads may call its methods.

    Attributes:
        tokens: the tokenizer, and what is special to it.
        base_template: the base's own chat template; None if it has none.
    """

    def __init__(self, tokenizer: Any, end_ids: Iterable[int] = (), *, special_in_messages: bool = False) -> None:
        """
        Args:
            tokenizer: transformers' own.
            end_ids: further tokens that end a reply, beside the tokenizer's.
            special_in_messages: let what users say become special tokens, as most servers do.
        Raises:
            TokenizerMissing: the base has no fast tokenizer.
        """
        backend = fast_tokenizer(tokenizer)
        if backend is None:
            raise TokenizerMissing("the base has no fast tokenizer (tokenizer.json)")
        eos = tokenizer.eos_token_id
        self.tokens = SpecialTokens(backend, [*end_ids, *([] if eos is None else [eos])])
        self._variables: dict[str, Any] = dict(tokenizer.special_tokens_map)
        self._special_in_messages = special_in_messages
        template = tokenizer.chat_template
        self.base_template = normal(template.get("default") if isinstance(template, Mapping) else template)
        self._compiled = lru_cache(_KEPT)(self._compile)

    def encode(self, text: str, *, special: bool = True, around: bool = True) -> list[int]:
        """A prompt's ids.

        `special`: text that reads like a special token becomes one; otherwise no text does.
        `around`: with the special tokens that the base expects around a prompt.
        """
        tokens = self.tokens
        return tokens.encode(text, around=around) if special else tokens.encode_marked(text, around=around)

    def template(self, source: str | None = None) -> ChatTemplate | None:
        """This chat template, or the base's; None if neither is there. Raises TemplateFailed."""
        source = normal(source) or self.base_template
        return None if source is None else self._compiled(source)

    def _compile(self, source: str) -> ChatTemplate:
        return ChatTemplate(source, self.tokens, self._variables, special_in_messages=self._special_in_messages)


class ChatTemplate:
    """A chat template with a tokenizer behind it. Its text holds marks where the template says a special token.

    Attributes:
        source: of the template.
    """

    def __init__(
        self, source: str, tokens: SpecialTokens, variables: Mapping[str, Any], *, special_in_messages: bool
    ) -> None:
        """Raises TemplateFailed."""
        self.source = source
        self._tokens = tokens
        self._variables = variables
        self._allowed = special_in_messages
        self._marks = not special_in_messages
        if self._marks:
            self._compiled = CompiledTemplate(source, tokens)
            self._marks = self._marks_all()
        if not self._marks:
            self._compiled = CompiledTemplate(source)

    def text(
        self,
        messages: Conversation,
        arguments: Mapping[str, Any] | None = None,
        *,
        generate: bool = True,
        open_last: bool = False,
    ) -> str:
        """The conversation as the model reads it; for `ids`, `offsets` and `plain` alone.

        `open_last`: up to the end of the last message's content, as transformers has it: without white space at that
        end if the template takes it off.
        Raises TemplateFailed: the template refuses it, or would not end.
        """
        arguments = arguments or {}
        for name in arguments:
            if name in GIVEN or name in self._variables:
                raise TemplateFailed(f"{name!r} is given by the server and cannot be a template argument")
        if not (self._allowed or self._marks) and any(
            self._tokens.may_read_as_token(said) for said in _texts([*messages, arguments])
        ):
            raise TemplateFailed(
                "it puts its special tokens together from pieces, so they cannot be told from those that these "
                "messages seem to hold; take them out"
            )
        if not open_last:
            return self._compiled.render(messages, self._variables, arguments, generate=generate)
        *before, last = messages
        end = _unguessable()
        marked = {**last, "content": f"{last['content']}{end} "}  # the space tells whether the template takes it off
        text = self._compiled.render([*before, marked], self._variables, arguments, generate=False)
        said, found, behind = text.rpartition(end)
        if not found:
            raise TemplateFailed("it does not write the last message as it is, so that cannot be continued")
        return said if behind.startswith(" ") else said.rstrip()

    def ids(self, text: str) -> list[int]:
        """The tokens of a text, or of a piece of one."""
        if self._marks:
            return self._tokens.encode_marked(text, around=False)
        return self._tokens.encode(text, around=False)

    def offsets(self, text: str) -> Sequence[tuple[int, int]]:
        """Where each of its tokens stands."""
        return self._tokens.offsets(text, marked=self._marks, around=False)

    def plain(self, text: str) -> str:
        """The text as people read it."""
        return self._tokens.plain(text) if self._marks else text

    def own(self, token: str) -> str:
        """How a special token of the template's own stands in its text."""
        return self._tokens.marked(token) if self._marks else token

    def _marks_all(self) -> bool:
        """Whether the marks give the tokens that the template's text gives, where nobody says anything special.

        Raises TemplateFailed if all these conversations together take longer than one may.
        """
        deadline = time.thread_time() + MAX_SECONDS
        trials: list[tuple[Conversation, Mapping[str, Any]]] = [(messages, {}) for messages in trial_conversations()]
        for messages, arguments in [*trials, *_trials_with_tools()]:
            for generate in (True, False):
                if time.thread_time() > deadline:
                    raise TemplateFailed(f"a few short conversations take longer than {MAX_SECONDS:g} seconds")
                try:
                    text = self._compiled.render(messages, self._variables, arguments, generate=generate)
                except TemplateFailed:
                    continue
                there = self._tokens.encode(self._tokens.plain(text), around=False)
                if self._tokens.encode_marked(text, around=False) != there:
                    return False
        return True


def _unguessable() -> str:
    """A text that nobody says, of private characters: no template takes one for white space or a letter."""
    return "".join(chr(0x100000 + secrets.randbelow(0xFFFE)) for _ in range(8))


def trial_conversations() -> list[list[dict[str, str]]]:
    """What a template should be able to write, the most basic first. Nobody can know what is said."""
    asked, answered, told, used = (f"said {secrets.token_hex(4)} here" for _ in range(4))
    user, assistant = {"role": "user", "content": asked}, {"role": "assistant", "content": answered}
    system, tool = {"role": "system", "content": told}, {"role": "tool", "content": used}
    return [[user], [user, assistant, user], [system, user], [user, assistant], [user, assistant, tool]]


def _trials_with_tools() -> Iterator[tuple[Conversation, Mapping[str, Any]]]:
    """Conversations with a call of a tool, in the two forms that templates take its arguments in."""
    name, asked, answered = (f"x{secrets.token_hex(4)}" for _ in range(3))
    described = {"name": name, "description": asked, "parameters": {"type": "object", "properties": {}}}
    tools = [{"type": "function", "function": described}]
    user, number = {"role": "user", "content": asked}, "a1B2c3D4e"  # some templates want 9 letters and digits
    forms: tuple[dict[str, Any] | str, ...] = ({}, "{}")
    for given in forms:
        call = {"id": number, "type": "function", "function": {"name": name, "arguments": given}}
        assistant = {"role": "assistant", "content": "", "tool_calls": [call]}
        tool = {"role": "tool", "tool_call_id": number, "name": name, "content": answered}
        yield [user, assistant, tool], {"tools": tools, "xml_tools": tools}


def _texts(value: Any) -> Iterator[str]:
    """Every text in it, names of fields too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key)
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)
