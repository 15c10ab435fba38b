"""What a chat template does with tools, found by having it write a call and looking at what stands there."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from loramux_adapters.chat.sandbox import MAX_SECONDS
from loramux_adapters.chat.template import CompiledTemplate, Conversation
from loramux_adapters.errors import TemplateFailed
from loramux_server.tools.calls import AddedTokens, Tool
from loramux_server.tools.formats import CallFormat
from loramux_server.tools.own_words import described_tool
from loramux_server.tools.reasoning import Reasoning, reasoning_of

_TOOL = Tool("probe_tool", "A trial.", {"type": "object", "properties": {"probe_key": {"type": "string"}}})
_VALUE = 'it\'s "x"'  # Python and JSON write it differently
_ARGUMENTS = {"probe_key": _VALUE, "probe_flag": True}
_ASKED, _ANSWERED, _TOLD = "probe question", "probe answer", "probe system"
_IDS = ("call_0123456789abcdef01234567", "a1B2c3D4e")
_LONGEST = 20_000  # characters that a template may make of one short call
_NAMES_OF_TOOLS = ("tools", "xml_tools")  # of a template's argument


@dataclass(frozen=True, slots=True)
class Conventions:
    """
    Attributes:
        format: how calls are written in replies.
        tools_argument: the template's argument that describes tools; None: it has none, and the system text does.
        writes_calls: it writes the calls of earlier turns; otherwise they go into the content.
        takes_results: it knows messages of the role "tool"; otherwise a user says them.
        takes_system: it writes a system message.
        arguments: of earlier calls are an "object", or a "string" where the template puts them as they are.
        single_calls: it takes no turn with more than one call.
        short_ids: ids of calls must be 9 letters and digits.
        reasoning: the tags around thinking; None: it knows none.
    """

    format: CallFormat
    tools_argument: str | None = None
    writes_calls: bool = False
    takes_results: bool = False
    takes_system: bool = True
    arguments: Literal["object", "string"] = "object"
    single_calls: bool = False
    short_ids: bool = False
    reasoning: Reasoning | None = None

    @property
    def shown(self) -> frozenset[str]:
        """Special tokens' texts that a reader needs, and a detokenizer would leave out."""
        return self.format.shown | (frozenset(self.reasoning or ()) & self.format.added.hidden)


def conventions_of(
    source: str | None, variables: Mapping[str, Any] | None = None, added: AddedTokens | None = None
) -> Conventions:
    """Renders a few short conversations; costs milliseconds, so keep the result beside the template.

    Args:
        source: of the chat template; None where there is none.
        variables: the base's special tokens, by the names that templates know them by.
        added: the tokenizer's added tokens.
    Raises:
        TemplateFailed: it is no template, or takes too long.
    """
    added = added or AddedTokens()
    if source is None:
        return Conventions(CallFormat("json", added))
    trial = _Trial(source, variables or {})
    reasoning = reasoning_of(source)
    basics = Conventions(
        CallFormat("json", added),
        takes_system=_TOLD in trial.text([_message("system", _TOLD), _message("user", _ASKED)]),
        reasoning=reasoning,
    )
    argument = trial.tools_argument()
    if argument is None:
        return basics
    written = trial.call(argument)
    if written is None:
        name = _described(trial.difference(argument), argument, added)
        return Conventions(
            CallFormat(name, added),
            argument,
            takes_results=trial.takes_results(),
            takes_system=basics.takes_system,
            short_ids=name.startswith("mistral"),
            reasoning=reasoning,
        )
    name_of_format = _written(written.text, added)
    if name_of_format is None:  # nobody here can read how this template has calls written
        return basics
    return Conventions(
        CallFormat(name_of_format, added),
        argument,
        writes_calls=True,
        takes_results=written.result,
        takes_system=basics.takes_system,
        arguments=written.arguments,
        single_calls=not trial.takes_two_calls(argument, written),
        short_ids=written.short_ids,
        reasoning=reasoning,
    )


@dataclass(frozen=True, slots=True)
class _Written:
    """What a template made of a call: the text behind the question and before the call's result."""

    text: str
    arguments: Literal["object", "string"]
    short_ids: bool
    result: bool


class _Trial:
    """One template, tried out."""

    def __init__(self, source: str, variables: Mapping[str, Any]) -> None:
        self._template = CompiledTemplate(source)
        self._variables = variables
        self._deadline = time.thread_time() + MAX_SECONDS

    def text(self, messages: Conversation, arguments: Mapping[str, Any] | None = None) -> str:
        """What it writes; nothing if it refuses. Raises TemplateFailed if all of it together takes too long."""
        if time.thread_time() > self._deadline:
            raise TemplateFailed(f"a few short conversations with tools take longer than {MAX_SECONDS:g} seconds")
        try:
            return self._template.render(messages, self._variables, arguments or {}, generate=True)
        except TemplateFailed:
            return ""

    def takes_results(self) -> bool:
        messages = [_message("user", _ASKED), _message("assistant", "hello"), _message("tool", _ANSWERED)]
        return _ANSWERED in self.text(messages)

    def tools_argument(self) -> str | None:
        question = [_message("user", _ASKED)]
        for name in _NAMES_OF_TOOLS:
            if _TOOL.name in self.text(question, {name: [described_tool(_TOOL)]}):
                return name
        return None

    def difference(self, argument: str) -> str:
        """What tools add to a conversation."""
        question = [_message("user", _ASKED)]
        told = self.text(question, {argument: [described_tool(_TOOL)]})
        usual = set(self.text(question).splitlines())
        return "\n".join(line for line in told.splitlines() if line not in usual)

    def call(self, argument: str) -> _Written | None:
        """How it writes a call; None if it leaves it out. The way that needs least of the caller is taken."""
        fallback: _Written | None = None
        for short, result, kind in _ways():
            text = self._called(argument, 1, short, result, kind)
            behind = text.rpartition(_ASKED)[2]
            if result and _ANSWERED not in behind:
                continue
            behind = behind.partition(_ANSWERED)[0][:_LONGEST]
            if _TOOL.name in behind:
                written = _Written(behind, kind, bool(short), result)
                if _says(behind, _ARGUMENTS):
                    return written
                fallback = fallback or written
        return fallback

    def takes_two_calls(self, argument: str, way: _Written) -> bool:
        """Whether it writes both calls of one turn."""
        one, two = (
            self._called(argument, times, int(way.short_ids), way.result, way.arguments).rpartition(_ASKED)[2]
            for times in (1, 2)
        )
        return two.count("probe_key") == 2 * one.count("probe_key")

    def _called(self, argument: str, times: int, short: int, result: bool, kind: Literal["object", "string"]) -> str:
        """A conversation with this many calls in one turn."""
        function = {"name": _TOOL.name, "arguments": _ARGUMENTS if kind == "object" else json.dumps(_ARGUMENTS)}
        called = {"id": _IDS[short], "type": "function", "function": function}
        messages: list[dict[str, Any]] = [
            _message("user", _ASKED),
            {"role": "assistant", "content": "", "tool_calls": [called] * times},
        ]
        if result:
            answer = {"role": "tool", "tool_call_id": _IDS[short], "name": _TOOL.name, "content": _ANSWERED}
            messages += [answer] * times
        return self.text(messages, {argument: [described_tool(_TOOL)]})


def _ways() -> Iterator[tuple[int, bool, Literal["object", "string"]]]:
    kinds: tuple[Literal["object", "string"], ...] = ("object", "string")
    for result in (True, False):
        for short in (0, 1):
            for kind in kinds:
                yield short, result, kind


def _message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def _says(text: str, arguments: Mapping[str, Any]) -> bool:
    """Whether these arguments stand in a text as a JSON object, or each between tags."""
    if f"<parameter=probe_key>\n{_VALUE}\n</parameter>" in text:
        return True
    decoder = json.JSONDecoder()
    for at in (at for at, character in enumerate(text) if character == "{"):
        try:
            value, _ = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            continue
        if value == arguments:
            return True
    return False


def _written(text: str, added: AddedTokens) -> str | None:
    """The format of a call that a template wrote; None: none of ours."""
    before, _, behind = text.partition(_TOOL.name)
    if "[TOOL_CALLS]" in before:
        if before.rpartition("[TOOL_CALLS]")[2].lstrip().startswith("["):
            return "mistral"
        return "mistral_args" if "[ARGS]" in behind else "mistral_named"
    if "<tool_call>" in before:
        opened = before.rpartition("<tool_call>")[2].lstrip()
        if opened.startswith("<function="):
            return "qwen3_coder"
        return "hermes" if opened.startswith(("{", "[")) else None
    if "<|tool_call|>" in before:
        return "granite"
    if not before.rstrip().endswith(('"name": "', '"name":"')):
        return None
    if "<|python_tag|>" in before or '"parameters"' in behind:
        return "llama3"
    return "json"


def _described(text: str, argument: str, added: AddedTokens) -> str:
    """The format that a template describes, where it writes no calls, or that of the tokenizer's tokens."""
    if argument == "xml_tools":
        return "smollm3"
    described = (
        ("<function=", "qwen3_coder"),
        ("<tool_call>", "hermes"),
        ("<|tool_call|>", "granite"),
        ("[AVAILABLE_TOOLS]", "mistral"),
        ('"parameters": dictionary', "llama3"),
    )
    tokens = (("<|tool_call|>", "granite"), ("<tool_call>", "hermes"), ("[TOOL_CALLS]", "mistral"))
    found = [name for mark, name in described if mark in text] + [name for mark, name in tokens if mark in added.ids]
    return (*found, "json")[0]
