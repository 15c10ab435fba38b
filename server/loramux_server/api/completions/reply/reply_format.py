"""What replies of all routes have in common."""

from __future__ import annotations

import json
import logging
import math
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from loramux_adapters.errors import AdapterError
from loramux_server.api.completions.request.generation import GenerationRequest
from loramux_server.api.completions.running.choice import Choice, Piece, TokenEntry
from loramux_server.api.completions.running.generation import Generation
from loramux_server.api.http.dependencies import TokenizerLike
from loramux_server.api.http.errors import Answer, answer_to
from loramux_server.api.http.json_reply import json_in_pieces
from loramux_server.api.http.streaming import DONE, event
from loramux_server.api.http.worker_threads import run_in_thread
from loramux_server.engine.scheduling.sequence import FinishReason, TokenLogprob
from loramux_server.errors import LoramuxError
from loramux_server.tools.calls import CallPart

LEAST_LOGPROB = -9999.0  # JSON has no infinity; OpenAI writes this
_SMALL = 64 * 2**10  # characters of a reply that is put together on the event loop: a thread would take longer
ENTRY_CHARACTERS = 1024  # about, of one token's log probabilities
_DEPTH_OF_ENTRIES = 5  # reply, choices, choice, logprobs, list of entries

Json = dict[str, Any]

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class WholeChoice:
    """A choice put together from its pieces. `calls` are the pieces of its calls."""

    text: str = ""
    reasoning: str = ""
    calls: list[CallPart] = field(default_factory=list)
    entries: list[TokenEntry] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish: FinishReason | None = None
    stop_reason: str | int | None = None

    @property
    def characters(self) -> int:
        """Of all that it says, thinks and calls."""
        return len(self.text) + len(self.reasoning) + sum(len(call.arguments) for call in self.calls)

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.reasoning += piece.reasoning
        self.calls += piece.calls
        self.entries += piece.entries
        self.token_ids += piece.token_ids
        self.finish, self.stop_reason = piece.finish, piece.stop_reason


class ReplyFormat(ABC):
    """The format of one reply: what the request asked to be told.

    Attributes:
        prompt_in_choice: what is told of a prompt stands beside its reply; otherwise once, beside all of them.
    """

    chunk_object: str
    whole_object: str
    prompt_in_choice: bool

    def __init__(self, body: GenerationRequest, tokenizer: TokenizerLike) -> None:
        self._include_usage = body.include_usage
        self._continuous_usage = body.continuous_usage
        self._tokenizer = tokenizer
        self._logprobs = body.alternatives is not None
        self._prompt_logprobs = body.prompt_logprobs
        self._token_ids = bool(body.return_token_ids)
        self._tokens_as_ids = bool(body.return_tokens_as_token_ids)
        self._called: set[int] = set()  # choices that have begun a call
        self._head: Json = {
            "id": f"{self.id_prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": body.model,
        }

    async def whole(self, generation: Generation) -> bytes:
        """The reply as one JSON object, once the generation has ended. Raises what the generation raises."""
        choices = [WholeChoice() for _ in generation.choices]
        async for piece in generation.pieces:
            choices[piece.index].add(piece)
        entries = sum(len(choice.entries) for choice in choices)
        if self._prompt_logprobs is not None:
            entries += sum(len(choice.prompt_logprobs) for choice in generation.choices)
        if sum(choice.characters for choice in choices) + ENTRY_CHARACTERS * entries <= _SMALL:
            return json.dumps(self._whole_reply(generation, choices)).encode()
        return await run_in_thread(
            lambda: json_in_pieces(self._whole_reply(generation, choices), depth=_DEPTH_OF_ENTRIES)
        )

    async def events(self, generation: Generation, first: Piece, request_id: str) -> AsyncGenerator[bytes, None]:
        """The reply as server-sent events; `first` is its first piece, already taken from the generation.

        An error becomes the last event: the status has been sent by then.
        """
        opened: set[int] = set()
        counts: dict[int, int] = {}  # of tokens, by choice
        try:
            piece: Piece | None = first
            while piece is not None:
                chunks = self._chunks(piece, opens=piece.index not in opened)
                if chunks and piece.index not in opened:
                    opened.add(piece.index)
                    self._tell_prompt(chunks[0], chunks[0]["choices"][0], generation.choices[piece.index])
                counts[piece.index] = piece.completion_tokens
                for chunk in chunks:
                    if self._continuous_usage:
                        chunk["usage"] = _usage(generation, sum(counts.values()))
                    yield event(json.dumps(chunk))
                piece = await anext(generation.pieces, None)
            if self._include_usage:
                yield event(json.dumps(self._usage_chunk(generation)))
            yield DONE
        except Exception as error:  # the client is told in the stream, and the operator in the log
            yield event(json.dumps(failed_stream(error, request_id).body))

    @property
    @abstractmethod
    def id_prefix(self) -> str: ...

    def _opening_part(self, piece: Piece) -> Json | None:
        """The part of the chunk that stands before a choice's first one, where there is one, and it is time for it."""
        return None

    @abstractmethod
    def _parts(self, piece: Piece) -> Iterator[Json]:
        """The parts of chunks' choices that carry what a piece brings; of none if it brings nothing."""

    @abstractmethod
    def _finish_part(self) -> Json:
        """The same for the chunk that only tells the finish reason."""

    @abstractmethod
    def _whole_part(self, choice: WholeChoice) -> Json:
        """The part of a whole reply's choice that carries what it says."""

    def _finish_reason(self, finish: FinishReason, *, calls: bool) -> str:
        """`calls`: the choice makes some."""
        return finish.value

    @abstractmethod
    def _logprobs_of(self, entries: Sequence[TokenEntry]) -> Json: ...

    def _chunks(self, piece: Piece, *, opens: bool) -> list[Json]:
        """What is sent of a piece; `opens`: nothing of its choice has been sent before."""
        chunks: list[Json] = []
        if opens and (opening := self._opening_part(piece)) is not None:
            chunks.append(self._chunk(piece.index, opening, ()))
        entries, token_ids = piece.entries, self._ids_part(piece.token_ids)
        for part in self._parts(piece):
            chunks.append(self._chunk(piece.index, part | token_ids, entries))
            entries, token_ids = (), {}
        if piece.calls:
            self._called.add(piece.index)
        if piece.finish is not None:
            chunks.append(self._finish_chunk(piece, piece.finish))
        return chunks

    def _has_beside(self, piece: Piece) -> bool:
        """Whether a piece brings what is told beside its text, though it may have none."""
        return bool(piece.entries or (self._token_ids and piece.token_ids))

    def _finish_chunk(self, piece: Piece, finish: FinishReason) -> Json:
        reason = self._finish_reason(finish, calls=piece.index in self._called)
        chunk = self._chunk(piece.index, self._finish_part(), (), reason)
        chunk["choices"][0]["stop_reason"] = piece.stop_reason
        return chunk

    def _ids_part(self, token_ids: Sequence[int]) -> Json:
        return {"token_ids": [*token_ids]} if self._token_ids else {}

    def _tell_prompt(self, reply: Json, part: Json, choice: Choice) -> None:
        """Adds what was asked for of a prompt to a reply or its choice, or to the first chunk of either."""
        place = part if self.prompt_in_choice else reply
        if self._token_ids:
            place["prompt_token_ids"] = choice.sequence.prompt
        if self._prompt_logprobs is not None:
            place["prompt_logprobs"] = [None, *map(self._alternatives_of, choice.prompt_logprobs)]

    def _alternatives_of(self, found: TokenLogprob) -> Json:
        """A token of the prompt and the likeliest in its place, as vLLM tells them; an unknown rank is null."""
        top = found.top[: self._prompt_logprobs]
        ranks = {token: rank for rank, (token, _) in enumerate(top, start=1)}
        own_rank = 1 if found.is_greedy else ranks.get(found.token_id)
        told = {found.token_id: (found.logprob, own_rank)} | {
            token: (logprob, ranks[token]) for token, logprob in top if token != found.token_id
        }
        return {
            str(token): {
                "logprob": finite(logprob),
                "rank": rank,
                "decoded_token": token_text(self._tokenizer.token_bytes(token)),
            }
            for token, (logprob, rank) in told.items()
        }

    def _name(self, token_id: int) -> str:
        """A token in lists of log probabilities."""
        return f"token_id:{token_id}" if self._tokens_as_ids else token_text(self._tokenizer.token_bytes(token_id))

    def _usage_chunk(self, generation: Generation) -> Json:
        """The last chunk of a stream with `include_usage`; it also tells how long the request waited."""
        times = {
            "queue_ms": _milliseconds(generation.queue_seconds),
            "ttft_ms": _milliseconds(generation.first_token_seconds),
        }
        return self._head | {"object": self.chunk_object, "choices": [], "usage": _usage(generation), "loramux": times}

    def _whole_reply(self, generation: Generation, choices: Sequence[WholeChoice]) -> Json:
        reply: Json = self._head | {"object": self.whole_object, "choices": [], "usage": _usage(generation)}
        for index, kept in enumerate(generation.best):
            choice = choices[kept.index]
            part: Json = {"index": index} | self._whole_part(choice)
            part |= {
                "logprobs": self._logprobs_of(choice.entries) if self._logprobs else None,
                "finish_reason": choice.finish and self._finish_reason(choice.finish, calls=bool(choice.calls)),
                "stop_reason": choice.stop_reason,
            }
            part |= self._ids_part(choice.token_ids)
            self._tell_prompt(reply, part, kept)
            reply["choices"].append(part)
        return reply

    def _chunk(self, index: int, part: Json, entries: Sequence[TokenEntry], finish: str | None = None) -> Json:
        logprobs = self._logprobs_of(entries) if self._logprobs and entries else None
        choice = {"index": index} | part | {"logprobs": logprobs, "finish_reason": finish}
        chunk = self._head | {"object": self.chunk_object, "choices": [choice]}
        return chunk | {"usage": None} if self._include_usage else chunk


def failed_stream(error: Exception, request_id: str) -> Answer:
    """What a stream that fails tells its client. What went wrong here is logged."""
    answer = answer_to(error)
    if answer.status >= 500:
        is_ours = isinstance(error, LoramuxError | AdapterError)  # its message says it all
        logger.error("stream of request %s failed: %s", request_id, error, exc_info=None if is_ours else error)
    return answer


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


def token_told(tokenizer: TokenizerLike, token_id: int, logprob: float) -> Json:
    """A token and its log probability, as chats and responses have it."""
    raw = tokenizer.token_bytes(token_id)
    return {"token": token_text(raw), "logprob": finite(logprob), "bytes": list(raw)}


def finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LEAST_LOGPROB


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 3)


def _usage(generation: Generation, completion: int | None = None) -> Json:
    """`completion`: tokens of replies, if only those that have been told by now count."""
    prompt = generation.prompt_tokens
    completion = generation.completion_tokens if completion is None else completion
    reasoning = generation.reasoning_tokens
    details = {} if reasoning is None else {"completion_tokens_details": {"reasoning_tokens": reasoning}}
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": generation.cached_tokens},
    } | details
