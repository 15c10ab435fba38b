"""POST /v1/chat/completions and /v1/completions."""

from __future__ import annotations

from fastapi import Request, Response

from loramux_server.api.completions.prepare import Preparation, refusals_counted
from loramux_server.api.completions.reply.chat_format import ChatFormat
from loramux_server.api.completions.reply.completion_format import CompletionFormat
from loramux_server.api.completions.reply.reply_format import ReplyFormat
from loramux_server.api.completions.reply.sending import send
from loramux_server.api.completions.request.chat import parse_chat
from loramux_server.api.completions.request.completion import parse_completion
from loramux_server.api.completions.running.generation import Generation
from loramux_server.api.http.auth import Access, access, caller_of
from loramux_server.api.http.body import read_json
from loramux_server.api.http.dependencies import Dependencies
from loramux_server.api.http.json_object import parsed_off_loop

Asked = tuple[Generation, ReplyFormat, bool]
"""What a request asks for, and whether as a stream. Its body need not be kept while it waits."""


class CompletionRoutes:
    def __init__(self, deps: Dependencies) -> None:
        self._deps = deps
        self._preparation = Preparation(deps)

    @access(Access.INFER)
    async def chat(self, request: Request) -> Response:
        generation, reply, streamed = await self._chat(request)
        return await send(request, generation, reply, streamed=streamed)

    @access(Access.INFER)
    async def completion(self, request: Request) -> Response:
        generation, reply, streamed = await self._completion(request)
        return await send(request, generation, reply, streamed=streamed)

    async def _chat(self, request: Request) -> Asked:
        with refusals_counted(self._deps.metrics):
            body = await parsed_off_loop(parse_chat, await self._read(request))
            leases = await self._preparation.leases(caller_of(request), body.model, body.adapters)
        generation = await self._preparation.chat(body, leases)
        return generation, ChatFormat(body, self._preparation.tokenizer(leases)), bool(body.stream)

    async def _completion(self, request: Request) -> Asked:
        with refusals_counted(self._deps.metrics):
            body = await parsed_off_loop(parse_completion, await self._read(request))
            leases = await self._preparation.leases(caller_of(request), body.model, body.adapters)
        generation = await self._preparation.completion(body, leases)
        return generation, CompletionFormat(body, self._preparation.tokenizer(leases)), bool(body.stream)

    async def _read(self, request: Request) -> bytes:
        limits = self._deps.limits
        return await read_json(request, limit=limits.body_bytes, pace=limits.pace)
