"""A generation's pieces -> a response's items: messages, reasoning and calls, whole or as they grow."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from loramux_server.api.completions.running.choice import Piece
from loramux_server.api.completions.running.generation import Generation
from loramux_server.api.http.dependencies import TokenizerLike
from loramux_server.api.responses.logprobs import SaidTokens, in_events
from loramux_server.api.responses.request import FunctionTool, ResponsesRequest
from loramux_server.engine.scheduling.sequence import FinishReason
from loramux_server.tools.calls import CallPart

Json = dict[str, Any]


class Growing:
    """A response as far as it is there. Each method gives the events that tell what it changes.

    Items come one after the other: what was thought, what is said, and calls, in the order in which they were written.
    """

    def __init__(self, body: ResponsesRequest, tokenizer: TokenizerLike) -> None:
        self._head = _described(body)
        self._tokens = SaidTokens(tokenizer) if body.tells_logprobs else None
        self._items: list[Json] = []
        self._open: Json | None = None  # the last item, while it grows
        self._text = ""  # of it
        self._logprobs: list[Json] = []  # of its tokens, where they are asked for

    def add(self, piece: Piece) -> Iterator[Json]:
        logprobs = [] if self._tokens is None else self._tokens.of(piece)
        if piece.reasoning:
            yield from self._grow("reasoning", piece.reasoning)
        if piece.text:
            yield from self._grow("message", piece.text, logprobs)
        for call in piece.calls:
            if call.name is not None:
                yield from self._close("completed")
                yield from self._begin(_new_call(call))
            if call.arguments:
                self._text += call.arguments
                yield self._event("response.function_call_arguments.delta", delta=call.arguments)
        if piece.finish is not None:
            if not self._items:  # a reply of nothing
                yield from self._begin(_new_item("message"))
            yield from self._close("incomplete" if piece.finish is FinishReason.LENGTH else "completed")

    def snapshot(self, status: str, generation: Generation | None = None, error: Json | None = None) -> Json:
        """The response as it is now; with its usage where the generation has ended."""
        incomplete = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return self._head | {
            "status": status,
            "error": error,
            "incomplete_details": incomplete,
            "output": self._items if self._open is None else self._items[:-1],
            "usage": None if generation is None else _usage(generation),
            "completed_at": int(time.time()) if status == "completed" else None,
        }

    def _grow(self, kind: str, text: str, logprobs: Sequence[Json] = ()) -> Iterator[Json]:
        if self._open is None or self._open["type"] != kind:
            yield from self._close("completed")
            yield from self._begin(_new_item(kind))
        self._text += text
        self._logprobs += logprobs
        if kind == "message":
            told = in_events(logprobs)
            yield self._event("response.output_text.delta", content_index=0, delta=text, logprobs=told)
        else:
            yield self._event("response.reasoning_text.delta", content_index=0, delta=text)

    def _begin(self, item: Json) -> Iterator[Json]:
        self._open, self._text, self._logprobs = item, "", []
        self._items.append(item)
        yield {"type": "response.output_item.added", "output_index": len(self._items) - 1, "item": dict(item)}
        if item["type"] != "function_call":
            yield self._event("response.content_part.added", content_index=0, part=_part(item["type"], "", []))

    def _close(self, status: str) -> Iterator[Json]:
        item, text = self._open, self._text
        if item is None:
            return
        if item["type"] == "function_call":
            item["arguments"] = text
            yield self._event("response.function_call_arguments.done", arguments=text)
        else:
            part = _part(item["type"], text, self._logprobs)
            item["content"] = [part]
            if item["type"] == "message":
                told = in_events(self._logprobs)
                yield self._event("response.output_text.done", content_index=0, text=text, logprobs=told)
            else:
                yield self._event("response.reasoning_text.done", content_index=0, text=text)
            yield self._event("response.content_part.done", content_index=0, part=part)
        item["status"] = status
        self._open = None
        yield {"type": "response.output_item.done", "output_index": len(self._items) - 1, "item": item}

    def _event(self, kind: str, **more: Any) -> Json:
        """About the last item."""
        return {"type": kind, "item_id": self._items[-1]["id"], "output_index": len(self._items) - 1} | more


def _new_item(kind: str) -> Json:
    if kind == "reasoning":
        return {"id": _id("rs"), "type": "reasoning", "summary": [], "content": [], "status": "in_progress"}
    return {"id": _id("msg"), "type": "message", "role": "assistant", "content": [], "status": "in_progress"}


def _new_call(call: CallPart) -> Json:
    made = {"id": _id("fc"), "type": "function_call", "call_id": call.id, "name": call.name}
    return made | {"arguments": "", "status": "in_progress"}


def _part(kind: str, text: str, logprobs: list[Json]) -> Json:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


def _described(body: ResponsesRequest) -> Json:
    """What a response repeats of its request, with the defaults in place of what was not said."""
    form = None if body.text is None else body.text.format
    return {
        "id": _id("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "background": False,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "metadata": body.metadata or {},
        "model": body.model,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": None if body.reasoning is None else body.reasoning.effort, "summary": None},
        "service_tier": "default",
        "store": False,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {"format": {"type": "text"} if form is None else form.model_dump(by_alias=True, exclude_none=True)},
        "tool_choice": "auto" if body.tool_choice is None else body.tool_choice.sent,
        "tools": [_tool(tool) for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "user": None,
    }


def _tool(tool: FunctionTool) -> Json:
    return tool.model_dump() | {"strict": bool(tool.strict)}


def _usage(generation: Generation) -> Json:
    prompt, reply, cached = generation.prompt_tokens, generation.completion_tokens, generation.cached_tokens
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": prompt - cached},
        "output_tokens": reply,
        "output_tokens_details": {"reasoning_tokens": generation.reasoning_tokens or 0},
        "total_tokens": prompt + reply,
    }
