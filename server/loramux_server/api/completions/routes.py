"""POST /v1/chat/completions and /v1/completions."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager

from fastapi import Request, Response

from loramux_adapters.errors import AdapterError
from loramux_server.api.completions.generation import Generation, Piece
from loramux_server.api.completions.prepare import Preparation
from loramux_server.api.completions.reply_format import (
    ChatFormat,
    CompletionFormat,
    ReplyFormat,
    WholeChoice,
    time_headers,
)
from loramux_server.api.completions.schemas import GenerationRequest, parse_chat, parse_completion
from loramux_server.api.http.body import read_json
from loramux_server.api.http.dependencies import Dependencies
from loramux_server.api.http.errors import answer_to
from loramux_server.api.http.middleware import request_id_of
from loramux_server.api.http.streaming import DONE, SSE_HEADERS, Stream, event, until_gone
from loramux_server.errors import LoramuxError

VERSION = "x-loramux-adapter-version"

logger = logging.getLogger(__name__)


class CompletionRoutes:
    def __init__(self, deps: Dependencies) -> None:
        self._deps = deps
        self._preparation = Preparation(deps)

    async def chat(self, request: Request) -> Response:
        with self._refusals_counted():
            body = parse_chat(await self._read(request))
            leases = await self._preparation.leases(body)
        generation = await self._preparation.chat(body, leases)
        return await self._reply(request, body, generation, self._format(ChatFormat, body))

    async def completion(self, request: Request) -> Response:
        with self._refusals_counted():
            body = parse_completion(await self._read(request))
            leases = await self._preparation.leases(body)
        generation = await self._preparation.completion(body, leases)
        return await self._reply(request, body, generation, self._format(CompletionFormat, body))

    async def _read(self, request: Request) -> bytes:
        limits = self._deps.limits
        return await read_json(request, limit=limits.body_bytes, stall_seconds=limits.stall_seconds)

    def _format(self, kind: type[ReplyFormat], body: GenerationRequest) -> ReplyFormat:
        return kind(
            body.model,
            self._deps.tokenizer,
            logprobs=body.alternatives is not None,
            include_usage=body.include_usage,
        )

    @contextmanager
    def _refusals_counted(self) -> Iterator[None]:
        try:
            yield
        except (LoramuxError, AdapterError):
            self._deps.metrics.request_refused()
            raise

    async def _reply(
        self, request: Request, body: GenerationRequest, generation: Generation, reply_format: ReplyFormat
    ) -> Response:
        """Whole or streamed. The first piece is awaited either way, so that what fails before it has a real status."""
        headers = {VERSION: generation.leases.version}
        handed_over = False
        try:
            if not body.stream:
                choices = await until_gone(request.receive, _collect(generation))
                content = json.dumps(reply_format.whole_reply(generation, choices)).encode()
                return Response(content, headers=headers | time_headers(generation), media_type="application/json")
            first = await until_gone(request.receive, _first(generation))
            events = _events(generation, reply_format, first, request_id_of(request.scope))
            handed_over = True
            return Stream(events, generation.aclose, SSE_HEADERS | headers)
        finally:
            if not handed_over:
                await generation.aclose()


async def _collect(generation: Generation) -> list[WholeChoice]:
    choices = [WholeChoice() for _ in generation.choices]
    async for piece in generation.pieces:
        choices[piece.index].add(piece)
    return choices


async def _first(generation: Generation) -> Piece:
    return await anext(generation.pieces)


async def _events(
    generation: Generation, reply_format: ReplyFormat, first: Piece, request_id: str
) -> AsyncGenerator[bytes, None]:
    """The whole stream, its first piece given. An error becomes the last event: the status is sent already."""
    opened: set[int] = set()
    try:
        piece: Piece | None = first
        while piece is not None:
            if piece.index not in opened:
                opened.add(piece.index)
                if (opening := reply_format.opening_chunk(piece.index)) is not None:
                    yield event(json.dumps(opening))
            if piece.text or piece.entries:
                yield event(json.dumps(reply_format.text_chunk(piece)))
            if piece.finish is not None:
                yield event(json.dumps(reply_format.finish_chunk(piece.index, piece.finish)))
            piece = await anext(generation.pieces, None)
        if reply_format.include_usage:
            yield event(json.dumps(reply_format.usage_chunk(generation)))
        yield DONE
    except Exception as error:  # the client is told in the stream, and the operator in the log
        answer = answer_to(error)
        if answer.status >= 500:
            is_ours = isinstance(error, LoramuxError | AdapterError)  # its message says it all
            logger.error("stream of request %s failed: %s", request_id, error, exc_info=None if is_ours else error)
        yield event(json.dumps(answer.body))
