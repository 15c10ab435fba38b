"""POST /tokenize and /detokenize, as vLLM has them: what a prompt is to the base, and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

from fastapi import Request, Response

from loramux_server.access.rates import Seat
from loramux_server.api.completions.prepare import Preparation, requested_adapters
from loramux_server.api.completions.reply.reply_format import token_text
from loramux_server.api.completions.request.tokens import (
    TokenizeChatRequest,
    TokenizePromptRequest,
    parse_detokenize,
    parse_tokenize,
)
from loramux_server.api.completions.running.leases import AdapterLeases
from loramux_server.api.completions.sampling import check_token_ids
from loramux_server.api.http.auth import Access, access, caller_of
from loramux_server.api.http.body import read_json
from loramux_server.api.http.dependencies import Dependencies
from loramux_server.api.http.json_object import parsed_off_loop
from loramux_server.api.http.json_reply import json_in_pieces
from loramux_server.api.http.worker_threads import run_in_thread


class TokenRoutes:
    def __init__(self, deps: Dependencies) -> None:
        self._deps = deps
        self._preparation = Preparation(deps)

    @access(Access.INFER)
    async def tokenize(self, request: Request) -> Response:
        """Of a text or a conversation, which may be longer than the context."""
        body = await parsed_off_loop(parse_tokenize, await self._read(request))
        return await self._answered(request, body.model, lambda leases: self._tokenized(body, leases))

    @access(Access.INFER)
    async def detokenize(self, request: Request) -> Response:
        body = await parsed_off_loop(parse_detokenize, await self._read(request))
        return await self._answered(request, body.model, lambda leases: {"prompt": self._text(body.tokens, leases)})

    async def _answered(
        self, request: Request, model: str | None, made: Callable[[AdapterLeases], dict[str, object]]
    ) -> Response:
        """What `made` returns, which is called in a worker thread; an adapter that is asked for must be there."""
        base_name = self._deps.base.name
        targets = requested_adapters(model or base_name, None, base_name)
        await self._deps.fetched(targets)
        store = self._deps.visible(caller_of(request))
        known = self._deps.tokenizer.vocab_size
        leases = await AdapterLeases.acquire(store, targets, known, listed=False, seat=Seat.free())
        try:
            content = await run_in_thread(lambda: json_in_pieces(made(leases), depth=2))
        finally:
            await leases.release()
        return Response(content, media_type="application/json")

    async def _read(self, request: Request) -> bytes:
        limits = self._deps.limits
        return await read_json(request, limit=limits.body_bytes, pace=limits.pace)

    def _tokenized(self, body: TokenizeChatRequest | TokenizePromptRequest, leases: AdapterLeases) -> dict[str, object]:
        tokenizer = self._preparation.tokenizer(leases)
        if isinstance(body, TokenizeChatRequest):
            tokens = self._preparation.encoded_chat(body, leases, tokenizer).tokens
        else:
            tokens = self._preparation.encoded(body.prompt, tokenizer, around=body.add_special_tokens is not False)
        token_bytes = tokenizer.token_bytes
        return {
            "count": len(tokens),
            "max_model_len": leases.defaults.context(self._deps.base.context),
            "tokens": tokens,
            "token_strs": [token_text(token_bytes(token)) for token in tokens] if body.return_token_strs else None,
        }

    def _text(self, tokens: list[int], leases: AdapterLeases) -> str:
        """Special tokens are written out, though they never show in a reply."""
        tokenizer = self._preparation.tokenizer(leases)
        check_token_ids(tokens, "tokens", tokenizer)

        def text_of(is_special: bool, run: Sequence[int]) -> str:
            if is_special:
                return b"".join(map(tokenizer.token_bytes, run)).decode("utf-8", "replace")
            return tokenizer.decode(run)

        runs = groupby(tokens, lambda token: token in tokenizer.special_ids)
        return "".join(text_of(is_special, list(run)) for is_special, run in runs)
