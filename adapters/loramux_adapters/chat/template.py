"""One chat template, compiled: messages in, text out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from jinja2 import Template, nodes
from jinja2.exceptions import TemplateError, TemplateSyntaxError

from loramux_adapters.chat.own_text import ROLES, Counted, OwnText
from loramux_adapters.chat.sandbox import Refused, Sandbox
from loramux_adapters.chat.special_tokens import SpecialTokens
from loramux_adapters.errors import TemplateFailed, TemplateRefuses

MAX_SOURCE = 64 * 2**10  # characters; the longest that is known has 20,000
MAX_NODES = 6000  # of its syntax tree, which Python compiles in one go; the largest that is known has 1,400
GIVEN = frozenset(("messages", "add_generation_prompt"))  # names that no argument may have
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one field, as in transformers
_FILE = "<template>"  # as jinja calls what it compiles

Conversation = Sequence[Mapping[str, Any]]


class CompiledTemplate:
    """Any number of threads may render it."""

    def __init__(self, source: str, tokens: SpecialTokens | None = None) -> None:
        """With `tokens` the text that it writes has marks in it for the template's own special tokens.

        Raises TemplateFailed: it is too long, or not a template.
        """
        if len(source) > MAX_SOURCE:
            raise TemplateFailed(f"it has more than {MAX_SOURCE} characters")
        self._environment = _Environment(tokens)
        self._tokens = tokens
        try:
            tree: Any = self._environment.parse(source)
            if sum(1 for _ in tree.find_all(nodes.Node)) > MAX_NODES:
                raise TemplateFailed("it is too large a program for a chat template")
            if tokens is not None:
                tree = OwnText(tokens.marks, tokens.marked).visit(tree)
            self._template: Template = self._environment.from_string(Counted().visit(tree))
        except TemplateSyntaxError as error:
            raise TemplateFailed(str(error.message), error.lineno) from error
        except RecursionError as error:
            raise TemplateFailed("it is nested too deeply") from error
        except (TemplateError, SyntaxError, ValueError, MemoryError) as error:
            raise TemplateFailed(str(error)) from error

    def render(
        self, messages: Conversation, variables: Mapping[str, Any], arguments: Mapping[str, Any], *, generate: bool
    ) -> str:
        """
        Args:
            variables: the base's special tokens, by the names that templates know them by.
            arguments: what the client adds; never special, whatever it says.
            generate: end where the assistant's turn begins.
        Raises:
            TemplateRefuses: it does not take these messages.
            TemplateFailed: it goes wrong, does what it may not, or would not end soon.
        """
        mark = self._tokens.marked if self._tokens is not None else str
        given = {name: _marked(value, mark) for name, value in variables.items()} | dict(arguments)
        self._environment.refill()
        try:
            return self._template.render(
                given
                | {
                    "messages": [_with_reasoning(message) for message in messages],
                    "tools": given.get("tools"),
                    "documents": given.get("documents"),
                    "add_generation_prompt": generate,
                }
            )
        except RecursionError as error:
            raise TemplateFailed("it calls itself without an end", _line_of(error.__traceback__)) from error
        except Refused as error:
            raise TemplateRefuses(self._plain(error)) from error
        except Exception as error:  # whatever operation of the template's went wrong
            raise TemplateFailed(self._plain(error), _line_of(error.__traceback__)) from error

    def _plain(self, error: Exception) -> str:
        message = str(error) or type(error).__name__
        return message if self._tokens is None else self._tokens.plain(message)


class _Environment(Sandbox):
    """With what `own_text` puts into a tree."""

    def __init__(self, tokens: SpecialTokens | None) -> None:
        super().__init__()
        self._tokens = tokens

    def role_token(self, head: str, role: Any, tail: str) -> str:
        """Semantics: head + role + tail, which are a token for the roles there are."""
        text = f"{head}{role}{tail}"
        assert self._tokens is not None
        return self._tokens.marks.get(text, text) if role in ROLES else text


def _marked(value: Any, mark: Any) -> Any:
    if isinstance(value, str):
        return mark(value)
    return [_marked(item, mark) for item in value] if isinstance(value, list | tuple) else value


def _with_reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
    """What the assistant thought is found under the names that templates look for."""
    said = next((message[key] for key in _REASONING if message.get(key) is not None), None)
    return dict(message) if said is None else {"thinking": said, **message, "reasoning_content": said}


def _line_of(traceback: TracebackType | None) -> int | None:
    """The template's line that is to blame; jinja puts its own lines into tracebacks."""
    line = None
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == _FILE:
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return line


def same_template(one: str | None, other: str | None) -> bool:
    """Whether two templates write the same: jinja drops one line feed at the end, and takes all line ends for one."""
    return normal(one) == normal(other)


def normal(source: str | None) -> str | None:
    """The template as it counts; None for one without text."""
    if source is None:
        return None
    return re.sub(r"\r\n?", "\n", source).removesuffix("\n") or None
