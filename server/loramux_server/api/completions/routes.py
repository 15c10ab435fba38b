"""POST /v1/chat/completions and /v1/completions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fastapi import Request, Response

from loramux_adapters.errors import AdapterError
from loramux_server.api.completions.generation import Generation
from loramux_server.api.completions.prepare import Preparation
from loramux_server.api.completions.reply_format import (
    ChatFormat,
    CompletionFormat,
    ReplyFormat,
    time_headers,
)
from loramux_server.api.completions.schemas import GenerationRequest, parse_chat, parse_completion
from loramux_server.api.http.body import read_json
from loramux_server.api.http.dependencies import Dependencies
from loramux_server.api.http.json_object import parsed_off_loop
from loramux_server.api.http.middleware import request_id_of
from loramux_server.api.http.streaming import SSE_HEADERS, Stream, until_gone
from loramux_server.errors import LoramuxError

VERSION = "x-loramux-adapter-version"
Asked = tuple[Generation, ReplyFormat, bool]
"""What a request asks for, and whether as a stream. Its body need not be kept while it waits."""


class CompletionRoutes:
    def __init__(self, deps: Dependencies) -> None:
        self._deps = deps
        self._preparation = Preparation(deps)

    async def chat(self, request: Request) -> Response:
        return await self._reply(request, *await self._chat(request))

    async def completion(self, request: Request) -> Response:
        return await self._reply(request, *await self._completion(request))

    async def _chat(self, request: Request) -> Asked:
        with self._refusals_counted():
            body = await parsed_off_loop(parse_chat, await self._read(request))
            leases = await self._preparation.leases(body)
        generation = await self._preparation.chat(body, leases)
        return generation, self._format(ChatFormat, body), bool(body.stream)

    async def _completion(self, request: Request) -> Asked:
        with self._refusals_counted():
            body = await parsed_off_loop(parse_completion, await self._read(request))
            leases = await self._preparation.leases(body)
        generation = await self._preparation.completion(body, leases)
        return generation, self._format(CompletionFormat, body), bool(body.stream)

    async def _read(self, request: Request) -> bytes:
        limits = self._deps.limits
        return await read_json(request, limit=limits.body_bytes, pace=limits.pace)

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
        self, request: Request, generation: Generation, reply_format: ReplyFormat, is_streamed: bool
    ) -> Response:
        """Whole or streamed. The first piece is awaited either way, so that what fails before it has a real status."""
        headers = {VERSION: generation.leases.version}
        handed_over = False
        try:
            if not is_streamed:
                content = await until_gone(request.receive, reply_format.whole(generation))
                return Response(content, headers=headers | time_headers(generation), media_type="application/json")
            first = await until_gone(request.receive, anext(generation.pieces))
            events = reply_format.events(generation, first, request_id_of(request.scope))
            handed_over = True
            return Stream(events, generation.aclose, SSE_HEADERS | headers)
        finally:
            if not handed_over:
                await generation.aclose()
