"""The formats in which models call tools, as their chat templates write them."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from loramux_server.grammar.shape import Shape
from loramux_server.tools.calls import AddedTokens, Tool, WrittenCall
from loramux_server.tools.lark import Form, Thought, lark_of
from loramux_server.tools.reader import Marks, TextReader
from loramux_server.tools.reasoning import Reasoning

_ALPHANUMERIC = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
SHORT_ID = 9  # characters of a call's id in Mistral's templates, letters and digits


class _Style(NamedTuple):
    """One way of writing calls: what a model may write, and what a grammar has it write."""

    form: Form
    opens: dict[str, str]
    bare: bool = False
    between: str = ""


_TAGGED = {"<tool_call>": "</tool_call>"}
_HERMES = Form('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>", between="\n")
_STYLES = {
    "hermes": _Style(_HERMES, _TAGGED),
    "smollm3": _Style(_HERMES, _TAGGED),
    "qwen3_coder": _Style(
        Form("<tool_call>\n<function=", ">\n", "</function>\n</tool_call>", between="\n", tags=True), _TAGGED
    ),
    "llama3": _Style(
        Form('{"name": "', '", "parameters": ', "}", between="; "), {"<|python_tag|>": ""}, bare=True, between=";"
    ),
    "mistral": _Style(
        Form('{"name": "', '", "arguments": ', "}", before="[TOOL_CALLS] [", between=", ", behind="]"),
        {"[TOOL_CALLS]": ""},
    ),
    "mistral_args": _Style(Form("[TOOL_CALLS]", "[ARGS]", ""), {"[TOOL_CALLS]": ""}),
    "mistral_named": _Style(Form("[TOOL_CALLS]", "", ""), {"[TOOL_CALLS]": ""}),
    "granite": _Style(
        Form('{"name": "', '", "arguments": ', "}", before="<|tool_call|>[", between=", ", behind="]"),
        {"<|tool_call|>": "", **_TAGGED},
    ),
    "json": _Style(
        Form('{"name": "', '", "arguments": ', "}", between="\n"),
        {"```json": "```", "<toolcall>": "</toolcall>", **_TAGGED},
        bare=True,
        between=",;",
    ),
}


@dataclass(frozen=True, slots=True)
class CallFormat:
    """How calls are written in a reply.

    Attributes:
        name: "hermes", "qwen3_coder", "llama3", "mistral" (a list), "mistral_args" and "mistral_named" (a name before
            the arguments), "granite", "smollm3" or "json".
        added: the tokenizer's added tokens.
    """

    name: str
    added: AddedTokens = AddedTokens()

    @property
    def shown(self) -> frozenset[str]:
        """Special tokens' texts that a reader needs: a detokenizer would leave them out."""
        style = _STYLES[self.name]
        texts = {*style.opens, *style.opens.values()}
        if self.short_ids:
            texts |= {"[ARGS]", "[CALL_ID]"}
        return frozenset(texts & self.added.hidden)

    @property
    def short_ids(self) -> bool:
        """Whether ids of calls are 9 letters and digits."""
        return self.name.startswith("mistral")

    def reader(
        self,
        tools: Sequence[Tool],
        *,
        parallel: bool = True,
        demanded: bool = False,
        reasoning: Reasoning | None = None,
        opened: bool = False,
        new_id: Callable[[], str] | None = None,
    ) -> TextReader:
        """A reader of one reply. Without tools it reads nothing but thinking.

        Args:
            parallel: give all calls, not only the first.
            demanded: the reply is bound to calls (`shape`): nothing of one that was cut is content.
            opened: the prompt ends inside the thinking (`Reasoning.opened_by`).
            new_id: makes the id of a call; random without it.
        """
        style = _STYLES[self.name]
        hidden = self.shown | (frozenset(reasoning or ()) & self.added.hidden)
        marks = Marks(style.opens, style.bare, style.between, hidden)
        made = new_id or (_short_id if self.short_ids else _long_id)
        return TextReader(marks, tools, made, parallel=parallel, demanded=demanded, reasoning=reasoning, opened=opened)

    def shape(
        self,
        tools: Sequence[Tool],
        *,
        named: str | None = None,
        parallel: bool = True,
        reasoning: Reasoning | None = None,
        opened: bool = False,
    ) -> Shape:
        """The grammar of a reply that is one or more calls of any of the tools, and nothing else.

        Args:
            named: call this tool, once.
            parallel: more than one call may come.
            opened: the prompt ends inside the thinking, so that the reply first ends that.
        """
        chosen = [tool for tool in tools if named is None or tool.name == named]
        thought = Thought(reasoning.start, reasoning.end) if opened and reasoning is not None else None
        form = _STYLES[self.name].form
        return Shape("lark", lark_of(form, chosen, self.added, several=parallel and named is None, thought=thought))

    def write(self, calls: Sequence[WrittenCall]) -> str:
        """Calls of an earlier turn, for a template that does not write them."""
        form = _STYLES[self.name].form
        return form.before + form.between.join(_written(form, call) for call in calls) + form.behind


def _written(form: Form, call: WrittenCall) -> str:
    arguments = call.arguments
    if form.tags:
        try:
            values = json.loads(arguments)
        except ValueError:
            values = {}
        arguments = "".join(
            f"<parameter={key}>\n{value if isinstance(value, str) else json.dumps(value)}\n</parameter>\n"
            for key, value in (values.items() if isinstance(values, dict) else ())
        )
    return f"{form.opening}{call.name}{form.naming}{arguments}{form.closing}"


def _long_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def _short_id() -> str:
    return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(SHORT_ID))
