"""POST /v1/chat/completions and /v1/completions."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager

from fastapi import Request, Response

from loramux_adapters.errors import AdapterError
from loramux_server.api.completions.generation import Piece, Run
from loramux_server.api.completions.prepare import Admission
from loramux_server.api.completions.reply_format import ChatWire, CompletionWire, WholeChoice, Wire, time_headers
from loramux_server.api.completions.schemas import GenerationRequest, parse_chat, parse_completion
from loramux_server.api.http.body import read_json
from loramux_server.api.http.dependencies import Deps
from loramux_server.api.http.errors import answer_to
from loramux_server.api.http.middleware import request_id_of
from loramux_server.api.http.streaming import DONE, SSE_HEADERS, Stream, event
from loramux_server.api.http.worker_threads import until_gone
from loramux_server.errors import LoramuxError

VERSION = "x-loramux-adapter-version"

logger = logging.getLogger(__name__)


class Generation:
    def __init__(self, deps: Deps) -> None:
        self._deps = deps
        self._admission = Admission(deps)

    async def chat(self, request: Request) -> Response:
        with self._refusals_counted():
            body = parse_chat(await self._read(request))
            leases = await self._admission.leases(body)
        run = await self._admission.chat(body, leases)
        return await self._reply(request, body, run, self._wire(ChatWire, body))

    async def completion(self, request: Request) -> Response:
        with self._refusals_counted():
            body = parse_completion(await self._read(request))
            leases = await self._admission.leases(body)
        run = await self._admission.completion(body, leases)
        return await self._reply(request, body, run, self._wire(CompletionWire, body))

    async def _read(self, request: Request) -> bytes:
        limits = self._deps.limits
        return await read_json(request, limit=limits.body_bytes, stall_seconds=limits.stall_seconds)

    def _wire(self, kind: type[Wire], body: GenerationRequest) -> Wire:
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

    async def _reply(self, request: Request, body: GenerationRequest, run: Run, wire: Wire) -> Response:
        """Whole or streamed. The first piece is awaited either way, so that what fails before it has a real status."""
        headers = {VERSION: run.leases.version}
        handed_over = False
        try:
            if not body.stream:
                choices = await until_gone(request.receive, _collect(run))
                content = json.dumps(wire.whole(run, choices)).encode()
                return Response(content, headers=headers | time_headers(run), media_type="application/json")
            first = await until_gone(request.receive, _first(run))
            events = _events(run, wire, first, request_id_of(request.scope))
            handed_over = True
            return Stream(events, run.aclose, SSE_HEADERS | headers)
        finally:
            if not handed_over:
                await run.aclose()


async def _collect(run: Run) -> list[WholeChoice]:
    choices = [WholeChoice() for _ in run.choices]
    async for piece in run.pieces:
        choices[piece.index].add(piece)
    return choices


async def _first(run: Run) -> Piece:
    return await anext(run.pieces)


async def _events(run: Run, wire: Wire, first: Piece, request_id: str) -> AsyncGenerator[bytes, None]:
    """The whole stream, its first piece given. An error becomes the last event: the status is sent already."""
    opened: set[int] = set()
    try:
        piece: Piece | None = first
        while piece is not None:
            if piece.index not in opened:
                opened.add(piece.index)
                if (opening := wire.opening(piece.index)) is not None:
                    yield event(json.dumps(opening))
            if piece.text or piece.entries:
                yield event(json.dumps(wire.text(piece)))
            if piece.finish is not None:
                yield event(json.dumps(wire.ending(piece.index, piece.finish)))
            piece = await anext(run.pieces, None)
        if wire.include_usage:
            yield event(json.dumps(wire.usage(run)))
        yield DONE
    except Exception as error:  # the client is told in the stream, and the operator in the log
        answer = answer_to(error)
        if answer.status >= 500:
            is_ours = isinstance(error, LoramuxError | AdapterError)  # its message says it all
            logger.error("stream of request %s failed: %s", request_id, error, exc_info=None if is_ours else error)
        yield event(json.dumps(answer.body))
