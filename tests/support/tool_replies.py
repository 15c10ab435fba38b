"""Replies with calls in every format, and how a reader's parts are put together."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from typing import Any

from loramux_server.tools.calls import AddedTokens, Tool
from loramux_server.tools.formats import CallFormat
from loramux_server.tools.reasoning import Reasoning

TOOLS = (
    Tool("weather", "", {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}),
    Tool("time"),
    Tool("weather.now"),
)
THINK = Reasoning("<think>", "</think>")
FORMATS = (
    "hermes",
    "qwen3_coder",
    "llama3",
    "mistral",
    "mistral_args",
    "mistral_named",
    "granite",
    "smollm3",
    "json",
)


class Read:
    """All that a reader gave."""

    def __init__(self) -> None:
        self.content = self.reasoning = ""
        self.calls: list[tuple[str, str, str]] = []  # id, name, arguments

    def __eq__(self, other: object) -> bool:
        return vars(self) == vars(other)

    def __repr__(self) -> str:
        return repr(vars(self))


def read(name: str, pieces: Iterable[str], *, added: AddedTokens | None = None, **options: Any) -> Read:
    ids = itertools.count()
    tools = options.pop("tools", TOOLS)
    reader = CallFormat(name, added or AddedTokens()).reader(tools, new_id=lambda: f"id{next(ids)}", **options)
    got = Read()
    for part in (*map(reader.add, pieces), reader.end()):
        got.content += part.content
        got.reasoning += part.reasoning
        for call in part.calls:
            if call.index == len(got.calls):
                assert call.id is not None and call.name is not None
                got.calls.append((call.id, call.name, ""))
            else:
                assert call.id is None and call.name is None
            old = got.calls[call.index]
            got.calls[call.index] = (*old[:2], old[2] + call.arguments)
    assert reader.num_calls == len(got.calls)
    return got


def calls(got: Read) -> list[tuple[str, Any]]:
    return [(name, json.loads(arguments)) for _, name, arguments in got.calls]


PARIS = {"city": "Paris"}
WEATHER = '{"name": "weather", "arguments": {"city": "Paris"}}'

WRITTEN = {
    "hermes": f'<tool_call>\n{WEATHER}\n</tool_call>\n<tool_call>\n{{"name": "time", "arguments": {{}}}}\n</tool_call>',
    "qwen3_coder": "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>"
    "\n<tool_call>\n<function=time>\n</function>\n</tool_call>",
    "llama3": '{"name": "weather", "parameters": {"city": "Paris"}}; {"name": "time", "parameters": {}}',
    "mistral": f'[TOOL_CALLS] [{WEATHER}, {{"name": "time", "arguments": {{}}}}]',
    "mistral_args": '[TOOL_CALLS]weather[ARGS]{"city": "Paris"}[TOOL_CALLS]time[CALL_ID]a1b2c3d4e[ARGS]{}',
    "mistral_named": '[TOOL_CALLS]weather{"city": "Paris"}[TOOL_CALLS]time{}',
    "granite": f'<|tool_call|>[{WEATHER}, {{"name": "time", "arguments": {{}}}}]',
    "json": f'{WEATHER}\n{{"name": "time", "arguments": {{}}}}',
}
WRITTEN["smollm3"] = WRITTEN["hermes"]


NO_CALLS = [
    "no call at all",
    "a < b and a <tool and <tool_cal",
    "<tool_call>",
    "<tool_call>\nnot JSON\n</tool_call>",
    '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',
    '<tool_call>{"arguments": {"name": "time"}}</tool_call>',
    '<tool_call>{"name": "weather", "arguments": [1]}</tool_call>',
    '<tool_call>{"name": "weather", "arguments": 5}</tool_call>',
    '<tool_call>{"name": 5, "arguments": {}}</tool_call>',
    '<tool_call>{"name": "weather", "arguments"',
    '<tool_call>{"name": "weather" "arguments": {}}</tool_call>',
    '<tool_call>{"arguments": {"a": [}, "name": "weather"}</tool_call>',
    '<tool_call>{"arguments": "no object", "name": "weather"}</tool_call>',
    "<tool_call>[]</tool_call>",
    "<tool_call>[5]</tool_call>",
    "<tool_call>{5}</tool_call>",
    '<tool_call>{"na\\xme": 5}</tool_call>',
    '<tool_call>{"name" 5}</tool_call>',
    '<tool_call>{"arguments": nil, "name": "time"}</tool_call>',
    '<tool_call>{"arguments": "\\x", "name": "time"}</tool_call>',
    '<tool_call>{"arguments": {}}</tool_call>',
    '<tool_call>{"' + "long" * 500 + '": 5}</tool_call>',
    "<tool_call>5</tool_call>",
    '<tool_call>"time"</tool_call>',
    "<tool_call>unknown{}</tool_call>",
    "<tool_call>time[ARG]{}</tool_call>",
    "<tool_call>time[B]{}</tool_call>",
    "<tool_call>time[ARGS]5</tool_call>",
    "<tool_call>time[CALL_ID]" + "a" * 300 + "</tool_call>",
    "<tool_call>time\n5</tool_call>",
    "<tool_call>" + "t" * 300 + "</tool_call>",
    "<tool_call><function=" + "t" * 300 + "></function>",
    "<tool_call><function=unknown>\n</function></tool_call>",
    "</tool_call>",
    '{"name": "weather", "arguments": {}}',
    "  leading and trailing \n",
    "\n",
    "",
]
