"""The engine as the API sees it: an asyncio facade over the engine thread."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from loramux_server.engine.engine import Engine, EngineStats
from loramux_server.engine.scheduling.sequence import FinishReason, Sequence, TokenOutput

__all__ = ["EngineClient", "EngineStats"]

logger = logging.getLogger(__name__)


class _Outputs:
    """What has come for one sequence and is not taken yet; one taker.

    As `asyncio.Queue`, but that takes 3 KiB, and one of these is there for every request that waits.
    """

    __slots__ = ("_items", "_waiting")

    def __init__(self) -> None:
        self._items: list[TokenOutput] = []
        self._waiting: asyncio.Future[None] | None = None

    def put(self, output: TokenOutput) -> None:
        self._items.append(output)
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def get(self) -> TokenOutput:
        while not self._items:
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting
        return self._items.pop(0)


class EngineClient:
    """One per engine. Owner: the event loop; `alive`, `ready`, `residency` and `stats` may be used by any thread."""

    def __init__(self, engine: Engine, in_host: Callable[[str], bool]) -> None:
        """`in_host`: thread-safe, True if a version is in host memory now; must not count as a use of it."""
        self._engine = engine
        self._in_host = in_host
        self._loop: asyncio.AbstractEventLoop | None = None
        self._cut = 0  # sequences that ended without their reply since the drain began
        self._streams: dict[str, _Outputs] = {}

    async def start(self) -> None:
        """Starts the engine and returns when it is warm; its outputs come to the loop that runs this.

        Raises:
            EngineDead: the warm-up failed; the log says why.
        """
        self._loop = asyncio.get_running_loop()
        self._engine.start(self._deliver)
        await asyncio.to_thread(self._engine.wait_until_warm)

    def submit(self, *sequences: Sequence) -> list[AsyncGenerator[TokenOutput, None]]:
        """Hands over all of them, which run on the same adapters, or raises and hands over none.

        Returns the outputs of each; the last one, and only that, has a finish reason. Closing or cancelling an iterator
        that has begun aborts its sequence; one that never begins needs an `abort`.
        Raises RequestError, ServerBusy, ServerDraining or EngineDead.
        """
        self._engine.submit(*sequences)
        streams = {sequence.id: _Outputs() for sequence in sequences}
        self._streams |= streams  # in time: deliveries reach the loop after this returns
        return [self._outputs(sequence_id, stream) for sequence_id, stream in streams.items()]

    async def generate(self, sequence: Sequence) -> AsyncGenerator[TokenOutput, None]:
        """`submit` for one, at the first `__anext__`."""
        (outputs,) = self.submit(sequence)
        async with aclosing(outputs):
            async for output in outputs:
                yield output

    def abort(self, sequence_id: str) -> None:
        """Ends a sequence within one step; its iterator gets a last output with reason ABORT."""
        self._engine.abort(sequence_id)

    @property
    def alive(self) -> bool:
        """The engine thread runs, and its step is not older than the watchdog allows."""
        return self._engine.alive

    @property
    def ready(self) -> bool:
        """Alive, warmed up and not draining."""
        return self._engine.ready

    @property
    def running(self) -> int:
        """Sequences that have not ended."""
        return len(self._streams)

    async def drain(self, timeout: float) -> int:
        """Refuses new work, lets the rest finish for up to `timeout` seconds, aborts what is left, stops the engine.

        Returns how many sequences did not get to their end.
        """
        self._cut = 0
        await asyncio.to_thread(self._engine.drain, timeout)
        error = TokenOutput(finish_reason=FinishReason.ERROR, error="the engine did not stop in time")
        self._dispatch([(sequence_id, error) for sequence_id in self._streams])  # ignored by those that ended
        return self._cut

    def residency(self, version: str) -> str:
        """The fastest memory that holds the version now: "device", "host" or "disk"."""
        if version in self._engine.stats.resident:
            return "device"
        return "host" if self._in_host(version) else "disk"

    def stats(self) -> EngineStats:
        """Counts of the last step."""
        return self._engine.stats

    async def _outputs(self, sequence_id: str, stream: _Outputs) -> AsyncGenerator[TokenOutput, None]:
        ended = False
        try:
            while not ended:
                output = await stream.get()
                ended = output.finish_reason is not None
                yield output
        finally:
            if not ended:
                self._streams.pop(sequence_id, None)
                self._engine.abort(sequence_id)

    def _deliver(self, outputs: list[tuple[str, TokenOutput]]) -> None:
        """Engine thread: everything a step produced crosses to the loop in one call."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self._dispatch, outputs)
        except RuntimeError:
            logger.warning("the event loop is closed; %d outputs are dropped", len(outputs))

    def _dispatch(self, outputs: list[tuple[str, TokenOutput]]) -> None:
        for sequence_id, output in outputs:
            ends = output.finish_reason is not None
            stream = self._streams.pop(sequence_id, None) if ends else self._streams.get(sequence_id)
            if stream is not None:  # None: its iterator was closed
                stream.put(output)
                self._cut += output.finish_reason in (FinishReason.ABORT, FinishReason.ERROR)
