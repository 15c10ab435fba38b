"""Replies of /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from loramux_server.api.completions.reply.reply_format import Json, ReplyFormat, WholeChoice, token_told
from loramux_server.api.completions.request.chat import ChatRequest
from loramux_server.api.completions.request.tools import Calling
from loramux_server.api.completions.running.choice import Piece, TokenEntry
from loramux_server.api.http.dependencies import TokenizerLike
from loramux_server.engine.scheduling.sequence import FinishReason
from loramux_server.tools.calls import CallPart


class ChatFormat(ReplyFormat):
    id_prefix = "chatcmpl"
    chunk_object = "chat.completion.chunk"
    whole_object = "chat.completion"
    prompt_in_choice = False

    def __init__(self, body: ChatRequest, tokenizer: TokenizerLike) -> None:
        super().__init__(body, tokenizer)
        self._calling = body.calling
        self._shows_reasoning = body.include_reasoning is not False

    def _opening_part(self, piece: Piece) -> Json | None:
        """With tools it waits for what comes first: a reply that only calls has null for its content."""
        delta: Json = {"role": "assistant", "content": ""}
        if self._calling is not None and not piece.text:
            brings = piece.calls or piece.reasoning or self._has_beside(piece)
            if not brings and piece.finish is None:
                return None
            delta["content"] = None if brings else ""
        return {"delta": delta}

    def _parts(self, piece: Piece) -> Iterator[Json]:
        deltas: list[Json] = []
        if piece.reasoning and self._shows_reasoning:
            deltas.append({"reasoning_content": piece.reasoning})
        if piece.text:
            deltas.append({"content": piece.text})
        for call in piece.calls:
            deltas += _call_deltas(call, self._calling)
        if not deltas and self._has_beside(piece):  # of text that is read further before it is told
            deltas.append({"content": ""} if self._calling is None else {})
        for delta in deltas:
            yield {"delta": delta}

    def _finish_part(self) -> Json:
        return {"delta": {}}

    def _finish_reason(self, finish: FinishReason, *, calls: bool) -> str:
        """As OpenAI tells it: a call that was asked for by name is no reason to end."""
        calling = self._calling
        if finish is not FinishReason.STOP or not calls or calling is None or calling.named is not None:
            return finish.value
        return "function_call" if calling.as_functions else "tool_calls"

    def _whole_part(self, choice: WholeChoice) -> Json:
        message: Json = {"role": "assistant", "content": choice.text, "refusal": None}
        if choice.reasoning and self._shows_reasoning:
            message["reasoning_content"] = choice.reasoning
        if calls := whole_calls(choice.calls):
            message["content"] = choice.text or None
            if self._calling is not None and self._calling.as_functions:
                message["function_call"] = calls[0]["function"]
            else:
                message["tool_calls"] = calls
        return {"message": message}

    def _logprobs_of(self, entries: Sequence[TokenEntry]) -> Json:
        content = []
        for entry in entries:
            token = self._token(entry.logprob.token_id, entry.logprob.logprob)
            content.append(token | {"top_logprobs": [self._token(*pair) for pair in entry.logprob.top]})
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float) -> Json:
        return token_told(self._tokenizer, token_id, logprob) | {"token": self._name(token_id)}


def _call_deltas(call: CallPart, calling: Calling | None) -> Iterator[Json]:
    """One that begins the call, with its name and no arguments, where this is its first piece; then the arguments."""
    as_function = calling is not None and calling.as_functions
    if call.name is not None:
        function = {"name": call.name, "arguments": ""}
        head = {"index": call.index, "id": call.id, "type": "function", "function": function}
        yield {"function_call": function} if as_function else {"tool_calls": [head]}
    if call.arguments:
        more = {"arguments": call.arguments}
        yield {"function_call": more} if as_function else {"tool_calls": [{"index": call.index, "function": more}]}


def whole_calls(parts: Iterable[CallPart]) -> list[Json]:
    """The calls that these pieces make together, as a whole message has them."""
    calls: dict[int, Json] = {}
    for part in parts:
        if part.index not in calls:
            function: Json = {"name": part.name, "arguments": ""}
            calls[part.index] = {"id": part.id, "type": "function", "function": function}
        calls[part.index]["function"]["arguments"] += part.arguments
    return list(calls.values())
