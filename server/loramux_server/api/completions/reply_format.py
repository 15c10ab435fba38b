"""A generation's pieces -> the bytes of its reply, in OpenAI's JSON: one object, or a stream of events."""

from __future__ import annotations

import json
import logging
import math
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

from loramux_adapters.errors import AdapterError
from loramux_server.api.completions.generation import Generation, Piece, TokenEntry
from loramux_server.api.http.dependencies import TokenizerLike
from loramux_server.api.http.errors import answer_to
from loramux_server.api.http.json_reply import json_in_pieces
from loramux_server.api.http.streaming import DONE, event
from loramux_server.api.http.worker_threads import run_in_thread
from loramux_server.engine.scheduling.sequence import FinishReason
from loramux_server.errors import LoramuxError

LEAST_LOGPROB = -9999.0  # JSON has no infinity; OpenAI writes this
_SMALL = 64 * 2**10  # characters of a reply that is put together on the event loop: a thread would take longer
_ENTRY_CHARACTERS = 1024  # about, of one token's log probabilities
_DEPTH_OF_ENTRIES = 5  # reply, choices, choice, logprobs, list of entries

Json = dict[str, Any]

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class WholeChoice:
    """A choice put together from its pieces."""

    text: str = ""
    entries: list[TokenEntry] = field(default_factory=list)
    finish: FinishReason | None = None

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.entries += piece.entries
        self.finish = piece.finish


class ReplyFormat(ABC):
    """The format of one reply. `include_usage`: chunks carry `usage`, null in all but an extra last one."""

    chunk_object: str
    whole_object: str

    def __init__(self, model: str, tokenizer: TokenizerLike, *, logprobs: bool, include_usage: bool) -> None:
        self._include_usage = include_usage
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._head: Json = {"id": f"{self.id_prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    async def whole(self, generation: Generation) -> bytes:
        """The reply as one JSON object, once the generation has ended. Raises what the generation raises."""
        choices = [WholeChoice() for _ in generation.choices]
        async for piece in generation.pieces:
            choices[piece.index].add(piece)
        if sum(len(choice.text) + _ENTRY_CHARACTERS * len(choice.entries) for choice in choices) <= _SMALL:
            return json.dumps(self._whole_reply(generation, choices)).encode()
        return await run_in_thread(
            lambda: json_in_pieces(self._whole_reply(generation, choices), depth=_DEPTH_OF_ENTRIES)
        )

    async def events(self, generation: Generation, first: Piece, request_id: str) -> AsyncGenerator[bytes, None]:
        """The reply as server-sent events; `first` is its first piece, already taken from the generation.

        An error becomes the last event: the status has been sent by then.
        """
        opened: set[int] = set()
        try:
            piece: Piece | None = first
            while piece is not None:
                if piece.index not in opened:
                    opened.add(piece.index)
                    if (opening := self._opening_chunk(piece.index)) is not None:
                        yield event(json.dumps(opening))
                if piece.text or piece.entries:
                    yield event(json.dumps(self._text_chunk(piece)))
                if piece.finish is not None:
                    yield event(json.dumps(self._finish_chunk(piece.index, piece.finish)))
                piece = await anext(generation.pieces, None)
            if self._include_usage:
                yield event(json.dumps(self._usage_chunk(generation)))
            yield DONE
        except Exception as error:  # the client is told in the stream, and the operator in the log
            answer = answer_to(error)
            if answer.status >= 500:
                is_ours = isinstance(error, LoramuxError | AdapterError)  # its message says it all
                logger.error("stream of request %s failed: %s", request_id, error, exc_info=None if is_ours else error)
            yield event(json.dumps(answer.body))

    @property
    @abstractmethod
    def id_prefix(self) -> str: ...

    @abstractmethod
    def _opening_chunk(self, index: int) -> Json | None:
        """The chunk before a choice's first text, where there is one."""

    @abstractmethod
    def _text_part(self, text: str) -> Json:
        """The part of a chunk's choice that carries text."""

    @abstractmethod
    def _finish_part(self) -> Json:
        """The same for the chunk that only tells the finish reason."""

    @abstractmethod
    def _whole_part(self, text: str) -> Json:
        """The part of a whole reply's choice that carries text."""

    @abstractmethod
    def _logprobs_of(self, entries: Sequence[TokenEntry]) -> Json: ...

    def _text_chunk(self, piece: Piece) -> Json:
        return self._chunk(piece.index, self._text_part(piece.text), piece.entries)

    def _finish_chunk(self, index: int, finish: FinishReason) -> Json:
        return self._chunk(index, self._finish_part(), (), finish.value)

    def _usage_chunk(self, generation: Generation) -> Json:
        """The last chunk of a stream with `include_usage`; it also tells how long the request waited."""
        times = {
            "queue_ms": _milliseconds(generation.queue_seconds),
            "ttft_ms": _milliseconds(generation.first_token_seconds),
        }
        return self._head | {"object": self.chunk_object, "choices": [], "usage": _usage(generation), "loramux": times}

    def _whole_reply(self, generation: Generation, choices: Sequence[WholeChoice]) -> Json:
        return self._head | {
            "object": self.whole_object,
            "choices": [
                {"index": index}
                | self._whole_part(choice.text)
                | {
                    "logprobs": self._logprobs_of(choice.entries) if self._logprobs else None,
                    "finish_reason": choice.finish.value if choice.finish is not None else None,
                }
                for index, choice in enumerate(choices)
            ],
            "usage": _usage(generation),
        }

    def _chunk(self, index: int, part: Json, entries: Sequence[TokenEntry], finish: str | None = None) -> Json:
        logprobs = self._logprobs_of(entries) if self._logprobs and entries else None
        choice = {"index": index} | part | {"logprobs": logprobs, "finish_reason": finish}
        chunk = self._head | {"object": self.chunk_object, "choices": [choice]}
        return chunk | {"usage": None} if self._include_usage else chunk


class ChatFormat(ReplyFormat):
    id_prefix = "chatcmpl"
    chunk_object = "chat.completion.chunk"
    whole_object = "chat.completion"

    def _opening_chunk(self, index: int) -> Json | None:
        return self._chunk(index, {"delta": {"role": "assistant", "content": ""}}, ())

    def _text_part(self, text: str) -> Json:
        return {"delta": {"content": text}}

    def _finish_part(self) -> Json:
        return {"delta": {}}

    def _whole_part(self, text: str) -> Json:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _logprobs_of(self, entries: Sequence[TokenEntry]) -> Json:
        content = []
        for entry in entries:
            token = self._token(entry.logprob.token_id, entry.logprob.logprob)
            content.append(token | {"top_logprobs": [self._token(*pair) for pair in entry.logprob.top]})
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float) -> Json:
        raw = self._tokenizer.token_bytes(token_id)
        return {"token": token_text(raw), "logprob": _finite(logprob), "bytes": list(raw)}


class CompletionFormat(ReplyFormat):
    id_prefix = "cmpl"
    chunk_object = "text_completion"
    whole_object = "text_completion"

    def _opening_chunk(self, index: int) -> Json | None:
        return None

    def _text_part(self, text: str) -> Json:
        return {"text": text}

    def _finish_part(self) -> Json:
        return {"text": ""}

    def _whole_part(self, text: str) -> Json:
        return {"text": text}

    def _logprobs_of(self, entries: Sequence[TokenEntry]) -> Json:
        """Offsets count from the beginning of the reply. The chosen token is always among the top ones."""
        tops = []
        for entry in entries:
            pairs = [*entry.logprob.top, (entry.logprob.token_id, entry.logprob.logprob)]
            tops.append({self._text_of(token_id): _finite(logprob) for token_id, logprob in pairs})
        return {
            "tokens": [self._text_of(entry.logprob.token_id) for entry in entries],
            "token_logprobs": [_finite(entry.logprob.logprob) for entry in entries],
            "top_logprobs": tops,
            "text_offset": [entry.offset for entry in entries],
        }

    def _text_of(self, token_id: int) -> str:
        return token_text(self._tokenizer.token_bytes(token_id))


def time_headers(generation: Generation) -> dict[str, str]:
    """How long the request waited, for a reply that is not streamed."""
    times = {"x-loramux-queue-ms": generation.queue_seconds, "x-loramux-ttft-ms": generation.first_token_seconds}
    return {name: str(_milliseconds(seconds)) for name, seconds in times.items() if seconds is not None}


def token_text(raw: bytes) -> str:
    """A token's text; part of a character is written the way OpenAI does."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LEAST_LOGPROB


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 3)


def _usage(generation: Generation) -> Json:
    prompt, completion = generation.prompt_tokens, generation.completion_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": generation.cached_tokens},
    }
