"""One generation request while it runs: the adapters it leases, its sequences in the engine, and their text.

`Generation.pieces` brings the reply bit by bit; `Generation.aclose` gives everything back, however it ended.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from functools import partial

from loramux_server.api.completions.running.choice import Choice, Piece
from loramux_server.api.completions.running.leases import AdapterLeases
from loramux_server.api.http.dependencies import EngineLike
from loramux_server.api.http.errors import RequestTimedOut
from loramux_server.api.http.streaming import cancel
from loramux_server.engine.scheduling.sequence import FinishReason, TokenOutput
from loramux_server.errors import LoramuxError, ReplyImpossible, RequestError, SequenceFailed, ServerBusy
from loramux_server.metrics.metrics import Metrics

_COUNTED = 16  # tokens of a reply that are counted for its tenant at a time


class Generation:
    """Owns the leases and the sequences of one request. `aclose` gives everything back, however it ended."""

    def __init__(
        self,
        engine: EngineLike,
        metrics: Metrics,
        leases: AdapterLeases,
        choices: list[Choice],
        *,
        started: float,
        timeout: float | None,
        kept: int | None = None,
    ) -> None:
        """`started` is on the monotonic clock; `timeout`, in seconds, counts from there.

        `kept`: of the choices that share a prompt, the client gets so many, the best; None is all.
        """
        self.choices = choices
        self.leases = leases
        self._engine = engine
        self._metrics = metrics
        self._kept = kept
        self._started = started
        self._timeout = timeout
        self._outcome = "abort"  # stays so if the client leaves and nobody asks for the rest
        self._closed = False
        self.pieces = self._generate()

    @property
    def prompt_tokens(self) -> int:
        """Each prompt counts once, however many replies it has."""
        return sum(len(choice.sequence.prompt) for choice in self._firsts)

    @property
    def cached_tokens(self) -> int:
        """Of `prompt_tokens`, those that the prefix cache held before the request came."""
        return sum(choice.cached_tokens for choice in self._firsts)

    @property
    def _firsts(self) -> list[Choice]:
        """One choice for each prompt."""
        return [choice for choice in self.choices if choice.sequence.shares_prompt_with is None]

    @property
    def best(self) -> list[Choice]:
        """The choices that the client gets, once all have ended: of each prompt the best, which comes first."""
        if self._kept is None:
            return self.choices
        groups: dict[str, list[Choice]] = {}
        for choice in self.choices:
            groups.setdefault(choice.sequence.shares_prompt_with or choice.sequence.id, []).append(choice)
        ranked = [sorted(group, key=lambda choice: choice.score, reverse=True) for group in groups.values()]
        return [choice for group in ranked for choice in group[: self._kept]]

    @property
    def completion_tokens(self) -> int:
        return sum(choice.completion_tokens for choice in self.choices)

    @property
    def reasoning_tokens(self) -> int | None:
        """Of `completion_tokens`, those that were thought; None where nothing tells them apart."""
        counts = [choice.reasoning_tokens for choice in self.choices if choice.reasoning_tokens is not None]
        return sum(counts) if counts else None

    @property
    def queue_seconds(self) -> float | None:
        """How long the choice that started first had waited; None before any has."""
        return min((c.queue_seconds for c in self.choices if c.queue_seconds is not None), default=None)

    @property
    def first_token_seconds(self) -> float | None:
        return min((c.first_token_seconds for c in self.choices if c.first_token_seconds is not None), default=None)

    async def aclose(self) -> None:
        """Abort what still runs, release the leases, count the outcome. Once; further calls do nothing."""
        if self._closed:
            return
        self._closed = True
        try:
            await self.pieces.aclose()
        finally:
            await give_back(self._metrics, self.leases, self._outcome, self._started)

    async def _generate(self) -> AsyncGenerator[Piece, None]:
        """All sequences are taken, or the request is refused before any has begun."""
        came = False
        try:
            taken = self._engine.submit(*(choice.sequence for choice in self.choices))
            follows = [partial(self._follow, *one) for one in zip(self.choices, taken, strict=True)]
            try:
                async with aclosing(_merged(follows) if len(follows) > 1 else follows[0]()) as pieces:
                    async for piece in pieces:
                        came = True
                        yield piece
            finally:  # no sequence is left in the engine, not even one that nobody followed
                for choice in self.choices:
                    if not choice.over:
                        self._engine.abort(choice.sequence.id)
        except (RequestError, ServerBusy):
            self._outcome = "error" if came else "rejected"
            raise
        except ReplyImpossible:
            self._outcome = "error"
            raise
        except SequenceFailed:
            self._outcome = "error"
            await self.leases.require_sound()
            raise
        except Exception:
            self._outcome = "error"
            raise
        finished = {choice.finish for choice in self.choices}
        self._outcome = "length" if FinishReason.LENGTH in finished else "stop"

    async def _follow(self, choice: Choice, outputs: AsyncGenerator[TokenOutput, None]) -> AsyncGenerator[Piece, None]:
        """The pieces of one choice."""
        seat, uncounted = self.leases.seat, 0
        try:
            while choice.finish is None:
                try:
                    async with asyncio.timeout_at(None if self._timeout is None else self._started + self._timeout):
                        output = await anext(outputs)
                except StopAsyncIteration:
                    choice.over = True
                    raise SequenceFailed("the engine ended this request without a result") from None
                except TimeoutError:
                    raise RequestTimedOut(self._timeout or 0.0) from None
                except LoramuxError:
                    choice.over = True
                    raise
                uncounted += output.token_id is not None
                if uncounted >= _COUNTED:
                    uncounted = await seat.write(uncounted)
                yield choice.feed(output)
        finally:
            await seat.write(uncounted)
            if not choice.over:
                choice.over = True
                self._engine.abort(choice.sequence.id)
            await outputs.aclose()


async def give_back(metrics: Metrics, leases: AdapterLeases, outcome: str, started: float) -> None:
    """Ends a request that holds leases: counts its outcome and releases them."""
    metrics.request_finished(leases.adapter, outcome, time.monotonic() - started)
    await leases.release()


Follow = Callable[[], AsyncGenerator[Piece, None]]


async def _merged(sources: Sequence[Follow]) -> AsyncGenerator[Piece, None]:
    """Pieces of all sources as they come. The first error ends everything."""
    queue: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()

    async def pump(source: Follow) -> None:
        try:
            async with aclosing(source()) as pieces:
                async for piece in pieces:
                    queue.put_nowait(piece)
            queue.put_nowait(None)
        except Exception as error:  # handed to the consumer, which raises it
            queue.put_nowait(error)

    tasks = [asyncio.create_task(pump(source)) for source in sources]
    try:
        running = len(tasks)
        while running:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        await cancel(*tasks)
