"""Replies of /v1/responses: one object, or a stream of numbered events."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Any

from loramux_server.api.completions.reply.reply_format import ENTRY_CHARACTERS, failed_stream
from loramux_server.api.completions.running.choice import Piece
from loramux_server.api.completions.running.generation import Generation
from loramux_server.api.http.dependencies import TokenizerLike
from loramux_server.api.http.json_reply import json_in_pieces
from loramux_server.api.http.worker_threads import run_in_thread
from loramux_server.api.responses.reply import Growing
from loramux_server.api.responses.request import ResponsesRequest
from loramux_server.engine.scheduling.sequence import FinishReason

_SMALL = 64 * 2**10  # characters of a reply that is put together on the event loop: a thread would take longer
_DEPTH_OF_PARTS = 7  # response, output, item, content, part, log probabilities, each


class ResponsesFormat:
    """The format of one reply."""

    def __init__(self, body: ResponsesRequest, tokenizer: TokenizerLike) -> None:
        self._response = Growing(body, tokenizer)
        self._sent = 0

    async def whole(self, generation: Generation) -> bytes:
        """The reply as one JSON object, once the generation has ended. Raises what the generation raises."""
        characters, finish = 0, None
        async for piece in generation.pieces:
            for told in self._response.add(piece):
                characters += len(told.get("delta", "")) + ENTRY_CHARACTERS * len(told.get("logprobs", ()))
            finish = piece.finish
        response = self._response.snapshot(_status(finish), generation)
        if characters <= _SMALL:
            return json.dumps(response).encode()
        return await run_in_thread(lambda: json_in_pieces(response, depth=_DEPTH_OF_PARTS))

    async def events(self, generation: Generation, first: Piece, request_id: str) -> AsyncGenerator[bytes, None]:
        """The reply as server-sent events; `first` is its first piece, already taken from the generation.

        An error becomes the last events: the status has been sent by then.
        """
        finish = None
        try:
            for kind in ("response.created", "response.in_progress"):
                yield self._event({"type": kind, "response": self._response.snapshot("in_progress")})
            piece: Piece | None = first
            while piece is not None:
                for told in self._response.add(piece):
                    yield self._event(told)
                finish = piece.finish
                piece = await anext(generation.pieces, None)
            status = _status(finish)
            yield self._event({"type": f"response.{status}", "response": self._response.snapshot(status, generation)})
        except Exception as error:  # the client is told in the stream, and the operator in the log
            told = failed_stream(error, request_id).error
            yield self._event({"type": "error"} | {name: told[name] for name in ("code", "message", "param")})
            failed = {"code": "server_error", "message": told["message"]}
            yield self._event({"type": "response.failed", "response": self._response.snapshot("failed", error=failed)})

    def _event(self, told: dict[str, Any]) -> bytes:
        number, self._sent = self._sent, self._sent + 1
        return f"event: {told['type']}\ndata: {json.dumps(told | {'sequence_number': number})}\n\n".encode()


def _status(finish: FinishReason | None) -> str:
    return "incomplete" if finish is FinishReason.LENGTH else "completed"
