"""POST /v1/embeddings."""

from __future__ import annotations

import asyncio
import base64
import time
import uuid
from collections.abc import Iterator
from contextlib import aclosing

import numpy as np
import numpy.typing as npt
from fastapi import Request, Response

from loramux_adapters.errors import AdapterError
from loramux_server.access.rates import rate_headers
from loramux_server.api.completions.prepare import CONTEXT_EXCEEDED, Preparation
from loramux_server.api.completions.running.generation import give_back
from loramux_server.api.completions.running.leases import AdapterLeases
from loramux_server.api.embeddings.request import EmbeddingRequest, parse_embedding
from loramux_server.api.http.auth import Access, access, caller_of
from loramux_server.api.http.body import read_json
from loramux_server.api.http.dependencies import Dependencies
from loramux_server.api.http.errors import RequestTimedOut
from loramux_server.api.http.json_object import parsed_off_loop
from loramux_server.api.http.json_reply import json_in_pieces
from loramux_server.api.http.streaming import cancel, until_gone
from loramux_server.api.http.worker_threads import run_in_thread
from loramux_server.engine.scheduling.sequence import FinishReason, SamplingParams, Sequence
from loramux_server.errors import LoramuxError, RequestError, SequenceFailed

VERSION = "x-loramux-adapter-version"
_AT_ONCE = 8  # inputs of one request that are in the engine: the others wait here, not in front of everybody
_DEPTH = 3  # reply, data, one of it

Vector = npt.NDArray[np.float32]


class EmbeddingRoutes:
    def __init__(self, deps: Dependencies) -> None:
        self._deps = deps
        self._preparation = Preparation(deps)

    @access(Access.INFER)
    async def embed(self, request: Request) -> Response:
        """What the base with the adapter reads of each input: its last token's state, or the mean over all."""
        limits = self._deps.limits
        try:
            raw = await read_json(request, limit=limits.body_bytes, pace=limits.pace)
            body = await parsed_off_loop(parse_embedding, raw)
            leases = await self._preparation.leases(caller_of(request), body.model, body.adapters)
        except (LoramuxError, AdapterError):
            self._deps.metrics.request_refused()
            raise
        started, outcome = time.monotonic(), "abort"
        try:
            prompts = await run_in_thread(lambda: [self._encoded(prompt, leases) for prompt in body.input])
            await leases.seat.read(sum(map(len, prompts)))
            vectors = await until_gone(request.receive, self._vectors(body, prompts, leases, started))
            outcome = "length"
        except Exception as error:
            outcome = "rejected" if isinstance(error, RequestError) else "error"
            if isinstance(error, SequenceFailed):
                await leases.require_sound()
            raise
        finally:
            await give_back(self._deps.metrics, leases, outcome, started)
        tokens = sum(map(len, prompts))
        content = await run_in_thread(lambda: _reply(vectors, body, tokens))
        headers = {VERSION: leases.version} | rate_headers(await leases.seat.remaining())
        return Response(content, headers=headers, media_type="application/json")

    def _encoded(self, prompt: str | list[int], leases: AdapterLeases) -> list[int]:
        """In a worker thread. Raises RequestError."""
        own = leases.defaults
        tokens = self._preparation.encoded(prompt, self._preparation.tokenizer(leases), "input")
        base = self._deps.base.context
        context = own.context(base)
        if not tokens:
            raise RequestError("'input': no tokens are left of it", param="input", code="invalid_value")
        if len(tokens) > context:
            raise RequestError(
                f"{own.whose_context(base)} holds {context} tokens and an input has {len(tokens)}; shorten it",
                param="input",
                code=CONTEXT_EXCEEDED,
            )
        return tokens

    async def _vectors(
        self, body: EmbeddingRequest, prompts: list[list[int]], leases: AdapterLeases, started: float
    ) -> list[Vector]:
        """One for each prompt, [hidden], of length 1 unless the request says otherwise; a few are in work at a time."""
        params = SamplingParams(max_tokens=0, pooling=body.pooling or "last")
        identity, uses = uuid.uuid4().hex, leases.uses()
        found: list[Vector | None] = [None] * len(prompts)
        left = iter(enumerate(prompts))

        async def work() -> None:
            for index, prompt in left:
                sequence = Sequence(
                    f"{identity}-{index}",
                    prompt,
                    params,
                    uses,
                    adapter=leases.adapter,
                    tenant=leases.seat.tenant,
                    weight=leases.seat.limits.weight,
                    priority=leases.seat.limits.priority,
                    cache_group=leases.cache_group(),
                )
                pooled = await self._pooled(sequence)
                found[index] = (_normalized(pooled) if body.normalize is not False else pooled).astype(np.float32)

        seconds = self._deps.limits.request_seconds
        tasks = [asyncio.create_task(work()) for _ in range(min(_AT_ONCE, len(prompts)))]
        try:
            async with asyncio.timeout_at(None if seconds is None else started + seconds):
                await asyncio.gather(*tasks)
        except TimeoutError:
            raise RequestTimedOut(seconds or 0.0) from None
        finally:
            await cancel(*tasks)
        return [vector for vector in found if vector is not None]

    async def _pooled(self, sequence: Sequence) -> npt.NDArray[np.float64]:
        """Raises SequenceFailed, ServerBusy, ServerDraining, EngineDead, RequestError."""
        (outputs,) = self._deps.engine.submit(sequence)
        over = False
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    over = output.finish_reason is not None
                    if output.finish_reason is FinishReason.ERROR:
                        raise SequenceFailed(output.error or "the engine failed on this request")
                    if output.pooled is not None:
                        return output.pooled
            raise SequenceFailed("the server ended this request before its reply was complete")
        finally:
            if not over:
                self._deps.engine.abort(sequence.id)


def _normalized(vector: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Of length 1, but for nothing at all, which stays so."""
    length = float(np.sqrt(np.dot(vector, vector)))
    return vector / length if length > 0 else vector


def _reply(vectors: list[Vector], body: EmbeddingRequest, tokens: int) -> bytes:
    """In a worker thread: millions of numbers. `tokens`: of all inputs together."""
    reply = {
        "object": "list",
        "data": list(_told(vectors, body)),
        "model": body.model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
    return json_in_pieces(reply, depth=_DEPTH)


def _told(vectors: list[Vector], body: EmbeddingRequest) -> Iterator[dict[str, object]]:
    """As JSON takes them: numbers, or the bytes of little-endian fp32 in base64."""
    for index, vector in enumerate(vectors):
        content: object = vector.tolist()
        if body.encoding_format == "base64":
            content = base64.b64encode(vector.astype("<f4").tobytes()).decode()
        yield {"object": "embedding", "index": index, "embedding": content}
