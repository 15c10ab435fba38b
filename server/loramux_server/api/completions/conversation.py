"""Messages of a request in the form that chat templates know, whatever older and newer clients call things."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from loramux_adapters.artifact.reading.strict_json import StrictJSONError, parse_object, quoted
from loramux_server.api.completions.request.chat import ChatMessage
from loramux_server.api.completions.request.tools import CallMade
from loramux_server.api.http.json_object import MAX_NESTING, refuse_crowded
from loramux_server.errors import RequestError

_ROLES = {"developer": "system", "function": "tool"}  # newer and older names


def as_turns(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """`tools.history` brings them into the form of one template.

    Raises RequestError: arguments of an earlier call hold more than any request needs.
    """
    turns: list[dict[str, Any]] = []
    last = ""  # the id of the last call, for answers that name none
    for message in messages:
        turn: dict[str, Any] = {"role": _ROLES.get(message.role, message.role), "content": message.content}
        if message.thought is not None:
            turn["reasoning_content"] = message.thought
        if message.calls:  # a template may ask whether the field is there at all
            turn["tool_calls"] = []
            for index, call in enumerate(message.calls):
                last = call.id or f"call_{len(turns)}_{index}"
                turn["tool_calls"].append(_call(call, last))
        if turn["role"] == "tool":
            turn["tool_call_id"] = message.tool_call_id or last
            if message.name is not None:
                turn["name"] = message.name
        turns.append(turn)
    return turns


def _call(call: CallMade, call_id: str) -> dict[str, Any]:
    arguments = call.function.arguments
    written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    raw = written.encode()
    refuse_crowded(raw)
    try:
        parse_object(raw, limit=len(raw), depth=MAX_NESTING)
    except StrictJSONError as error:  # a model wrote it, and shall see it again; but nothing here shall go that deep
        if _nesting(written) > MAX_NESTING:
            raise RequestError(
                f"the arguments of an earlier call of {quoted(call.function.name)} nest deeper than {MAX_NESTING}",
                param="messages",
                code="invalid_value",
            ) from error
    return {"id": call_id, "type": "function", "function": {"name": call.function.name, "arguments": written}}


def _nesting(text: str) -> int:
    """At least how deep its lists and objects lie in one another; brackets in its strings count too."""
    depth = most = 0
    for character in text:
        if character in "[{":
            depth += 1
            most = max(most, depth)
        elif character in "]}":
            depth -= 1
    return most
