"""POST /v1/responses."""

from __future__ import annotations

from fastapi import Request, Response

from loramux_server.api.completions.prepare import Preparation, refusals_counted
from loramux_server.api.completions.reply.sending import send
from loramux_server.api.completions.running.generation import Generation
from loramux_server.api.http.auth import Access, access, caller_of
from loramux_server.api.http.body import read_json
from loramux_server.api.http.dependencies import Dependencies
from loramux_server.api.http.json_object import parsed_off_loop
from loramux_server.api.responses.events import ResponsesFormat
from loramux_server.api.responses.request import parse_response
from loramux_server.api.responses.translate import as_chat, told_here
from loramux_server.errors import RequestError


class ResponseRoutes:
    def __init__(self, deps: Dependencies) -> None:
        self._deps = deps
        self._preparation = Preparation(deps)

    @access(Access.INFER)
    async def create(self, request: Request) -> Response:
        generation, reply, streamed = await self._asked(request)
        return await send(request, generation, reply, streamed=streamed)

    async def _asked(self, request: Request) -> tuple[Generation, ResponsesFormat, bool]:
        """What a request asks for, and whether as a stream. Its body need not be kept while it waits."""
        limits = self._deps.limits
        with refusals_counted(self._deps.metrics):
            body = await parsed_off_loop(
                parse_response, await read_json(request, limit=limits.body_bytes, pace=limits.pace)
            )
            chat = as_chat(body)
            leases = await self._preparation.leases(caller_of(request), chat.model, chat.adapters)
        try:
            generation = await self._preparation.chat(chat, leases)
        except RequestError as error:
            raise told_here(error) from error
        return generation, ResponsesFormat(body, self._preparation.tokenizer(leases)), bool(body.stream)
