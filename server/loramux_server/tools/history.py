"""A conversation with tools as a chat template takes it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from loramux_server.tools.calls import Tool, WrittenCall
from loramux_server.tools.conventions import Conventions
from loramux_server.tools.formats import SHORT_ID
from loramux_server.tools.own_words import described_tool, result_text, system_text

Message = Mapping[str, Any]


def for_template(
    conventions: Conventions, messages: Sequence[Message], tools: Sequence[Tool] = ()
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The messages, and the template's arguments that describe the tools.

    Args:
        messages: as OpenAI has them: `tool_calls` of an assistant's with `id` and `function` (`name`, `arguments` as
            JSON text), `tool_call_id` of a tool's. Contents are texts, or None where there are calls.
    """
    names = {
        str(call.get("id")): str(call["function"]["name"])
        for message in messages
        for call in message.get("tool_calls") or ()
    }
    turns = _single_calls(messages) if conventions.single_calls else messages
    told = [_told(conventions, message, names) for message in turns]
    if not conventions.takes_results:
        told = _joined(told)
    if not tools:
        return told, {}
    if conventions.tools_argument is not None:
        return told, {conventions.tools_argument: [described_tool(tool) for tool in tools]}
    return _with_system(told, system_text(tools), takes_system=conventions.takes_system), {}


def short_id(identity: str) -> str:
    """An id of 9 letters and digits, always the same for the same id."""
    if len(identity) == SHORT_ID and identity.isascii() and identity.isalnum():
        return identity
    return hashlib.sha256(identity.encode()).hexdigest()[:SHORT_ID]


def _single_calls(messages: Sequence[Message]) -> list[Message]:
    """Each call in a turn of its own, its result behind it."""
    turns: list[Message] = []
    results: dict[str, Message] = {}
    for place, message in enumerate(messages):
        calls = message.get("tool_calls") or ()
        if message["role"] == "tool" and message.get("tool_call_id") in results:
            del results[message["tool_call_id"]]
            continue
        if len(calls) < 2:
            turns.append(message)
            continue
        behind = takewhile(lambda each: each["role"] == "tool", messages[place + 1 :])
        results = {str(each.get("tool_call_id")): each for each in behind}
        for number, call in enumerate(calls):
            turns.append({**message, "content": None if number else message.get("content"), "tool_calls": [call]})
            if str(call.get("id")) in results:
                turns.append(results[str(call["id"])])
        wanted = {str(call.get("id")) for call in calls}
        results = {identity: each for identity, each in results.items() if identity in wanted}
    return turns


def _told(conventions: Conventions, message: Message, names: Mapping[str, str]) -> dict[str, Any]:
    """One message as the template takes it."""
    told = dict(message)
    if message["role"] == "tool":
        identity = str(message.get("tool_call_id") or "")
        name = str(message.get("name") or names.get(identity, ""))
        if not conventions.takes_results:
            return {"role": "user", "content": result_text(name, message.get("content") or ""), "result": True}
        told["tool_call_id"] = short_id(identity) if conventions.short_ids else identity
        if name:
            told["name"] = name
        return told
    calls = told.pop("tool_calls", None)
    if not calls:
        return told
    told["content"] = content = message.get("content") or ""
    if conventions.writes_calls:
        told["tool_calls"] = [_call(conventions, call) for call in calls]
    else:
        written = [WrittenCall(call["function"]["name"], call["function"].get("arguments") or "{}") for call in calls]
        told["content"] = (f"{content}\n" if content else "") + conventions.format.write(written)
    return told


def _call(conventions: Conventions, call: Mapping[str, Any]) -> dict[str, Any]:
    identity = str(call.get("id") or "")
    function = call["function"]
    arguments: Any = function.get("arguments") or "{}"
    if conventions.arguments == "object":
        try:
            parsed = json.loads(arguments)
        except ValueError:
            parsed = None
        # what is no object stays as it was written: the template has to say it somehow
        arguments = parsed if isinstance(parsed, dict) else arguments
    return {
        "id": short_id(identity) if conventions.short_ids else identity,
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }


def _joined(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results, and what a user says behind them, in one message: many templates want turns to alternate."""
    joined: list[dict[str, Any]] = []
    after_result = False
    for message in messages:
        result = message.pop("result", False)
        if after_result and message["role"] == "user" and isinstance(message.get("content"), str):
            joined[-1] = {**joined[-1], "content": f"{joined[-1]['content']}\n\n{message['content']}"}
        else:
            joined.append(message)
        after_result = result
    return joined


def _with_system(messages: list[dict[str, Any]], text: str, *, takes_system: bool) -> list[dict[str, Any]]:
    """The text before what the system, or else the first user, says."""
    if messages and messages[0]["role"] in ("system", "developer") and isinstance(messages[0].get("content"), str):
        return [{**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}, *messages[1:]]
    if takes_system:
        return [{"role": "system", "content": text}, *messages]
    for place, message in enumerate(messages):
        if message["role"] == "user" and isinstance(message.get("content"), str):
            return [
                *messages[:place],
                {**message, "content": f"{text}\n\n{message['content']}"},
                *messages[place + 1 :],
            ]
    return [{"role": "user", "content": text}, *messages]
