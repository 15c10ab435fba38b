"""A generation that has begun -> its response, whole or streamed."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from fastapi import Request, Response

from loramux_server.access.rates import rate_headers
from loramux_server.api.completions.reply.reply_format import time_headers
from loramux_server.api.completions.running.choice import Piece
from loramux_server.api.completions.running.generation import Generation
from loramux_server.api.http.middleware import request_id_of
from loramux_server.api.http.streaming import SSE_HEADERS, Stream, until_gone

VERSION = "x-loramux-adapter-version"


class WrittenReply(Protocol):
    """The format of one reply."""

    async def whole(self, generation: Generation) -> bytes:
        """The reply in one piece, once the generation has ended. Raises what the generation raises."""

    def events(self, generation: Generation, first: Piece, request_id: str) -> AsyncGenerator[bytes, None]:
        """The reply as it comes; `first` is its first piece, already taken. An error becomes the last event."""


async def send(request: Request, generation: Generation, reply: WrittenReply, *, streamed: bool) -> Response:
    """The first piece is awaited either way, so that what fails before it has a real status."""
    headers = {VERSION: generation.leases.version} | rate_headers(await generation.leases.seat.remaining())
    handed_over = False
    try:
        if not streamed:
            content = await until_gone(request.receive, reply.whole(generation))
            return Response(content, headers=headers | time_headers(generation), media_type="application/json")
        first = await until_gone(request.receive, anext(generation.pieces))
        events = reply.events(generation, first, request_id_of(request.scope))
        handed_over = True
        return Stream(events, generation.aclose, SSE_HEADERS | headers)
    finally:
        if not handed_over:
            await generation.aclose()
