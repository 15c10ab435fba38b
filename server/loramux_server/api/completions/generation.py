"""One generation request while it runs: the adapters it leases, its sequences in the engine, and their text.

`Generation.pieces` brings the reply bit by bit; `Generation.aclose` gives everything back, however it ended.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from loramux_adapters.errors import AdapterCorrupt, AdapterError
from loramux_server.api.http.dependencies import EngineLike, StoreLike
from loramux_server.api.http.errors import RequestTimedOut
from loramux_server.api.http.model_names import RequestedAdapter
from loramux_server.api.http.streaming import cancel
from loramux_server.api.http.worker_threads import run_in_thread, run_in_thread_or_undo
from loramux_server.base.detokenizer import Detokenizer
from loramux_server.engine.scheduling.sequence import AdapterUse, FinishReason, TokenLogprob, TokenOutput, composed
from loramux_server.engine.scheduling.sequence import Sequence as EngineSequence
from loramux_server.errors import LoramuxError, RequestError, SequenceFailed, ServerBusy
from loramux_server.metrics.metrics import Metrics

if TYPE_CHECKING:
    from loramux_adapters.store.store import Lease

BASE_VERSION = "base"  # what a reply without an adapter says of its version


@dataclass(frozen=True, slots=True)
class AdapterLeases:
    """References on adapter versions, in the request's order, each with the factor of its delta. Empty: the bare base.

    While they are held the versions stay usable, whatever is published or deleted meanwhile.

    Attributes:
        listed: the request named them one by one, in `adapters`; otherwise `model` named the only one.
        store: that they are of; None for the bare base.
    """

    leases: tuple[tuple[Lease, float], ...] = ()
    listed: bool = False
    store: StoreLike | None = None

    @classmethod
    async def acquire(cls, store: StoreLike, targets: tuple[RequestedAdapter, ...], *, listed: bool) -> AdapterLeases:
        """A reference on every target, or on none of them.

        Raises AdapterNotFound, BaseMismatch, StoreUnavailable.
        """

        def acquire_all() -> AdapterLeases:
            leases: list[tuple[Lease, float]] = []
            try:
                for target in targets:
                    leases.append((store.acquire(target.adapter, target.version_prefix), target.scale))
            except BaseException:
                for lease, _ in leases:
                    lease.release()
                raise
            return cls(tuple(leases), listed, store)

        return await run_in_thread_or_undo(cls._release, acquire_all) if targets else cls()

    async def release(self) -> None:
        """Gives all of them back, once."""
        if self.leases:
            await run_in_thread(self._release)

    async def require_sound(self) -> None:
        """Raises AdapterCorrupt if the store has found the files of one of them damaged since it was leased."""

        def look(store: StoreLike) -> None:
            for lease, _ in self.leases:
                try:
                    store.acquire(lease.name, lease.version).release()
                except AdapterCorrupt:
                    raise
                except AdapterError:
                    continue  # deleted or replaced meanwhile, which ends no request

        if self.store is not None:
            await run_in_thread(look, self.store)

    @property
    def adapter(self) -> str | None:
        """For logs and metrics: the name, several joined by "+" (which no name holds); None for the base."""
        return "+".join(lease.name for lease, _ in self.leases) or None

    @property
    def version(self) -> str:
        """For the client: the version that answers, or `name@version` of each that was listed."""
        if self.listed:
            return ",".join(f"{lease.name}@{lease.version}" for lease, _ in self.leases)
        return self.leases[0][0].version if self.leases else BASE_VERSION

    def uses(self) -> tuple[AdapterUse, ...]:
        """What the engine computes with."""
        return composed(AdapterUse(lease.version, lease.rank, lease.nbytes, scale) for lease, scale in self.leases)

    def _release(self) -> None:
        for lease, _ in self.leases:
            lease.release()


@dataclass(frozen=True, slots=True)
class TokenEntry:
    """Log probabilities of one token of the reply. `offset` is where its text begins, in characters of the reply."""

    offset: int
    logprob: TokenLogprob


@dataclass(frozen=True, slots=True)
class Piece:
    """What became certain of one choice. `finish` is set on a choice's last piece, and only there."""

    index: int
    text: str
    entries: Sequence[TokenEntry] = ()
    finish: FinishReason | None = None


class Choice:
    """One sequence's reply, token by token, turned into pieces of text.

    A piece has the log probabilities (`entries`) of the tokens whose text it carries.
    """

    def __init__(self, index: int, sequence: EngineSequence, detokenizer: Detokenizer) -> None:
        self.index = index
        self.sequence = sequence
        self.completion_tokens = 0
        self.finish: FinishReason | None = None
        self.over = False  # the engine has let go of the sequence, or was told to
        self.queue_seconds: float | None = None
        self.first_token_seconds: float | None = None
        self.cached_tokens = 0
        self._detokenizer = detokenizer
        self._entries: list[TokenEntry] = []

    def feed(self, output: TokenOutput) -> Piece:
        """Raises SequenceFailed: the engine gave the sequence up."""
        self.over = output.finish_reason is not None
        if output.finish_reason is FinishReason.ERROR:
            raise SequenceFailed(output.error or "the engine failed on this request")
        if output.finish_reason is FinishReason.ABORT:
            raise SequenceFailed("the server ended this request before its reply was complete")
        if output.first_token_seconds is not None:
            self.queue_seconds, self.first_token_seconds = output.queue_seconds, output.first_token_seconds
            self.cached_tokens = output.cached_tokens
        text = ""
        if output.token_id is not None and output.token_id not in self.sequence.params.stop_token_ids:
            self.completion_tokens += 1
            if output.logprob is not None:
                self._entries.append(TokenEntry(self._detokenizer.position, output.logprob))
            text = self._detokenizer.add(output.token_id)
        if output.finish_reason is not None:
            text += self._detokenizer.flush()
        self.finish = FinishReason.STOP if self._detokenizer.stopped else output.finish_reason
        return Piece(self.index, text, self._ready_entries(), self.finish)

    def _ready_entries(self) -> list[TokenEntry]:
        if self.finish is not None and not self._detokenizer.stopped:
            ready, self._entries = self._entries, []
            return ready
        out = self._detokenizer.position - self._detokenizer.held
        count = next((i for i, entry in enumerate(self._entries) if entry.offset >= out), len(self._entries))
        ready, self._entries = self._entries[:count], self._entries[count:]
        return ready


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
    ) -> None:
        """`started` is on the monotonic clock; `timeout`, in seconds, counts from there."""
        self.choices = choices
        self.leases = leases
        self._engine = engine
        self._metrics = metrics
        self._started = started
        self._timeout = timeout
        self._outcome = "abort"  # stays so if the client leaves and nobody asks for the rest
        self._closed = False
        self.pieces = self._generate()

    @property
    def prompt_tokens(self) -> int:
        return sum(len(choice.sequence.prompt) for choice in self.choices)

    @property
    def cached_tokens(self) -> int:
        """Of `prompt_tokens`, those that the prefix cache held."""
        return sum(choice.cached_tokens for choice in self.choices)

    @property
    def completion_tokens(self) -> int:
        return sum(choice.completion_tokens for choice in self.choices)

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
                yield choice.feed(output)
        finally:
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
