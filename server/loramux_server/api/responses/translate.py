"""A request for a response -> the chat request that says the same."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from loramux_server.api.completions.request.chat import ChatRequest, chat_request
from loramux_server.api.responses.request import (
    CallOutput,
    FunctionTool,
    InputCall,
    InputMessage,
    Item,
    NamedSchemaFormat,
    ResponsesRequest,
    TextConfig,
)
from loramux_server.errors import RequestError

_SAME = ("model", "adapters", "temperature", "top_p", "top_k", "min_p", "seed", "parallel_tool_calls", "stream")
_NAMES = {  # of chat completions -> here; the first that fits the beginning of a parameter's name
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}


def as_chat(body: ResponsesRequest) -> ChatRequest:
    """Raises RequestError, in the terms of a request for a response."""
    sent = body.model_dump(include=set(_SAME), exclude_none=True)
    fields: dict[str, Any] = sent | {"messages": [*_messages(body)]}
    if body.tools is not None:
        fields["tools"] = [{"type": "function", "function": _function(tool)} for tool in body.tools]
    if body.tool_choice is not None:
        fields["tool_choice"] = body.tool_choice.chat
    if body.max_output_tokens is not None:
        fields["max_completion_tokens"] = body.max_output_tokens
    if body.tells_logprobs:
        fields |= {"logprobs": True, "top_logprobs": body.top_logprobs or 0}
    if body.text is not None and (shape := _response_format(body.text)) is not None:
        fields["response_format"] = shape
    if body.reasoning is not None and body.reasoning.effort is not None:
        fields["reasoning_effort"] = body.reasoning.effort
    if body.chat_template_kwargs is not None:
        fields["chat_template_kwargs"] = body.chat_template_kwargs
    try:
        return chat_request(fields)
    except RequestError as error:
        raise told_here(error) from error


def told_here(error: RequestError) -> RequestError:
    """The same error, with the names that parameters have here."""
    param = error.param
    if param is None:
        return error
    chat, _, place = param.partition(".")
    here = _NAMES.get(chat, chat)
    if chat == "tools":
        here = param.replace(".function.", ".")
    message = str(error).replace(f"'{param}'", f"'{here}'").replace(f"'{chat}'", f"'{_NAMES.get(chat, chat)}'")
    return RequestError(message, param=here, code=error.code)


def _function(tool: FunctionTool) -> dict[str, Any]:
    return tool.model_dump(include={"name", "description", "parameters", "strict"}, exclude_none=True)


def _response_format(text: TextConfig) -> dict[str, Any] | None:
    form = text.format
    if form is None or form.type == "text":
        return None
    if not isinstance(form, NamedSchemaFormat):
        return {"type": form.type}
    schema = {"name": form.name, "schema": form.schema_, "description": form.description, "strict": form.strict}
    return {"type": "json_schema", "json_schema": {name: value for name, value in schema.items() if value is not None}}


def _messages(body: ResponsesRequest) -> Iterator[dict[str, Any]]:
    """Instructions stand first, in one message with what else the system says there: many templates take but one."""
    turns = [*_turns(body.input)]
    if body.instructions:
        texts = [body.instructions]
        if turns and turns[0]["role"] in ("system", "developer"):
            texts.append(turns.pop(0)["content"])
        yield {"role": "system", "content": "\n\n".join(texts)}
    yield from turns


def _turns(items: Sequence[Item]) -> Iterator[dict[str, Any]]:
    """What the assistant said, thought and called one after the other is one message of a chat."""
    turn: dict[str, Any] | None = None  # of the assistant, which may go on
    for item in items:
        if isinstance(item, CallOutput) or (isinstance(item, InputMessage) and item.role != "assistant"):
            if turn is not None:
                yield turn
            turn = None
        if isinstance(item, CallOutput):
            yield {"role": "tool", "tool_call_id": item.call_id, "content": item.output}
        elif isinstance(item, InputMessage) and item.role != "assistant":
            yield {"role": item.role, "content": item.content}
        elif isinstance(item, InputMessage):
            if turn is not None and ("content" in turn or "tool_calls" in turn):
                yield turn
                turn = None
            turn = {**(turn or {"role": "assistant"}), "content": item.content}
        elif isinstance(item, InputCall):
            turn = turn or {"role": "assistant"}
            function = {"name": item.name, "arguments": item.arguments}
            turn.setdefault("tool_calls", []).append({"id": item.call_id, "type": "function", "function": function})
        else:
            if turn is not None and ("content" in turn or "tool_calls" in turn):
                yield turn
                turn = None
            if thought := "".join(_thoughts(item.content or ())):
                turn = {"role": "assistant", "reasoning_content": thought}
    if turn is not None and len(turn) > 1:
        yield turn


def _thoughts(parts: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    for part in parts:
        if part.get("type") == "reasoning_text" and isinstance(part.get("text"), str):
            yield part["text"]
