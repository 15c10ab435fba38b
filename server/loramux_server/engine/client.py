"""The engine as the API sees it: an asyncio facade over the engine thread."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable

from loramux_server.engine.engine import Engine, EngineStats
from loramux_server.engine.sequence import FinishReason, Sequence, TokenOutput

__all__ = ["EngineClient", "EngineStats"]

logger = logging.getLogger(__name__)


class EngineClient:
    """One per engine. Owner: the event loop; `alive`, `ready`, `residency` and `stats` may be used by any thread."""

    def __init__(self, engine: Engine, in_host: Callable[[str], bool]) -> None:
        """`in_host`: thread-safe, True if a version is in host memory now; must not count as a use of it."""
        self._engine = engine
        self._in_host = in_host
        self._loop: asyncio.AbstractEventLoop | None = None
        self._streams: dict[str, asyncio.Queue[TokenOutput]] = {}
        self._cut = 0  # sequences that ended without their reply since the drain began

    async def start(self) -> None:
        """Starts the engine and returns when it is warm; its outputs come to the loop that runs this.

        Raises:
            EngineDead: the warm-up failed; the log says why.
        """
        self._loop = asyncio.get_running_loop()
        self._engine.start(self._deliver)
        await asyncio.to_thread(self._engine.wait_until_warm)

    async def generate(self, sequence: Sequence) -> AsyncGenerator[TokenOutput, None]:
        """The sequence's outputs; the last one, and only that, has a finish reason.

        The first `__anext__` submits it and may raise RequestError, ServerBusy, ServerDraining or EngineDead. Closing
        or cancelling the iterator aborts the sequence.
        """
        self._engine.submit(sequence)
        outputs = self._streams[sequence.id] = asyncio.Queue()  # in time: deliveries reach the loop after this returns
        ended = False
        try:
            while not ended:
                output = await outputs.get()
                ended = output.finish_reason is not None
                yield output
        finally:
            del self._streams[sequence.id]
            if not ended:
                self._engine.abort(sequence.id)

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

    def _deliver(self, outputs: list[tuple[str, TokenOutput]]) -> None:
        """Engine thread: everything a step produced crosses to the loop in one call."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self._dispatch, outputs)
        except RuntimeError:
            logger.warning("the event loop is closed; %d outputs are dropped", len(outputs))

    def _dispatch(self, outputs: list[tuple[str, TokenOutput]]) -> None:
        for sequence_id, output in outputs:
            stream = self._streams.get(sequence_id)
            if stream is not None:  # None: its iterator was closed
                stream.put_nowait(output)
                self._cut += output.finish_reason in (FinishReason.ABORT, FinishReason.ERROR)
