"""What the engine tells others of itself: events for the metrics as they happen, and a snapshot once a step."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from typing import Protocol

from loramux_server.engine.inbox import Backlog, shares_of
from loramux_server.engine.scheduling.fair_share import PROMPT_WEIGHT, REPLY_WEIGHT, Line
from loramux_server.engine.scheduling.sequence import Batch, Flow, Sequence


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot, published once per step.

    Attributes:
        waiting: sequences in the inbox or in the queue.
        kv_blocks_kept: blocks that no sequence uses, kept for prompts that begin alike.
        kv_blocks_peak: most blocks that ever held something at a time.
        slot_rows_used: rank rows held by resident adapters, whether they are in use or not.
        slot_rows_total: rank rows of the device's adapter memory.
        slot_hits, slot_misses: adapters of started sequences that were on the device, and that were not, so far.
        resident: versions on the device, no snapshot but as they are now: to look one up or count, not to iterate.
        waiting_by_adapter: how many wait in the scheduler's lines, by the names they asked for; None is the base. The
            server's own work is left out.
    """

    running: int
    waiting: int
    kv_blocks_used: int
    kv_blocks_kept: int
    kv_blocks_total: int
    kv_blocks_peak: int
    slot_rows_used: int
    slot_rows_total: int
    slot_hits: int
    slot_misses: int
    resident: Set[str]
    waiting_by_adapter: Mapping[str | None, int]


class EngineMetrics(Protocol):
    """The part of the metrics that the engine thread feeds. `adapter` is `Sequence.adapter`."""

    def step_done(self, batch_size: int, distinct_adapters: int, seconds: float) -> None:
        """A forward of `batch_size` sequences took this long."""

    def queued(self, seconds: float) -> None:
        """A sequence ran for the first time, this long after it arrived."""

    def first_token(self, seconds: float) -> None:
        """A sequence's first token was chosen, this long after it arrived."""

    def inter_token(self, seconds: float) -> None:
        """Another token of a sequence was delivered, this long after the one before."""

    def tokens(self, adapter: str | None, prompt: int, generated: int) -> None:
        """In one step: prompt tokens that were computed or found, reply tokens that were delivered."""

    def prefix_looked_up(self, found: int, tokens: int) -> None:
        """A sequence started; so many tokens of its prompt, which has `tokens`, were in the cache."""

    def slot_loaded(self, seconds: float) -> None:
        """A version was copied to the device."""

    def evicted(self, count: int) -> None:
        """Versions left the device to make room."""

    def aborted(self) -> None:
        """A sequence was aborted, waiting or running."""

    def mask_made(self, seconds: float) -> None:
        """A token was chosen within a grammar, whose mask was there so long after it could be asked for."""

    def sat_out(self, count: int) -> None:
        """So many running sequences were not in a step, or came out of it without a token, for want of a mask."""


class StepMetrics:
    """Gathers one step and reports it. Owner: the engine thread."""

    def __init__(self, metrics: EngineMetrics) -> None:
        self._metrics = metrics
        self._generated: Counter[str | None] = Counter()  # delivered in this step, by adapter
        self._evictions = 0  # reported so far

    def token_chosen(self, sequence: Sequence, delivered: bool, now: float) -> None:
        """Stamps the sequence. A stop token counts for the time to the first token, and for nothing else."""
        if sequence.background:
            sequence.first_token_at = sequence.first_token_at or now
            return
        if sequence.first_token_at is None:
            sequence.first_token_at = now
            self._metrics.first_token(now - sequence.arrived)
        elif delivered and sequence.last_token_at is not None:
            self._metrics.inter_token(now - sequence.last_token_at)
        if sequence.params.grammar is not None and not sequence.params.forced:
            self._metrics.mask_made(sequence.params.grammar.mask_seconds)
        if delivered:
            sequence.last_token_at = now
            self._generated[sequence.adapter] += 1

    def step_done(self, batch: Batch, seconds: float, evictions: int) -> None:
        """Reports a committed step. `evictions`: all there ever were."""
        prompt: Counter[str | None] = Counter()
        for row in batch.rows:
            sequence = row.sequence
            if sequence.background or row.repeats:
                continue
            if row.first < len(sequence.prompt):
                prompt[sequence.adapter] += row.num_tokens
            if row.first == sequence.num_cached and sequence.scheduled_at is not None:
                prompt[sequence.adapter] += sequence.num_cached
                self._metrics.prefix_looked_up(sequence.num_cached, len(sequence.prompt))
                self._metrics.queued(sequence.scheduled_at - sequence.arrived)
        for adapter in prompt.keys() | self._generated.keys():
            self._metrics.tokens(adapter, prompt[adapter], self._generated[adapter])
        self._generated.clear()
        versions = {use.version for row in batch.rows for use in row.sequence.adapters}
        self._metrics.step_done(len(batch.rows), len(versions), seconds)
        for load in batch.slot_loads:
            self._metrics.slot_loaded(load.seconds)
        if evictions > self._evictions:
            self._metrics.evicted(evictions - self._evictions)
            self._evictions = evictions

    def aborted(self) -> None:
        self._metrics.aborted()

    def sat_out(self, count: int) -> None:
        if count:
            self._metrics.sat_out(count)


class WorkRate:
    """How fast the engine works, measured, and so how long it will take. Owner: the engine thread.

    Recent steps and replies count most; what lies `_MEMORY` of them back counts a third.
    """

    _MEMORY = 100

    def __init__(self) -> None:
        self._work = self._seconds = 0.0  # of the last steps, by the weights of the fair share
        self._replies = self._tokens = 0.0  # how many have ended, and with how many tokens

    def step_done(self, batch: Batch, seconds: float) -> None:
        """A step took so long."""
        kept = 1 - 1 / self._MEMORY
        read = sum(row.num_tokens for row in batch.rows if row.first < len(row.sequence.prompt))
        chosen = sum(row.samples for row in batch.rows)
        self._work = kept * self._work + PROMPT_WEIGHT * read + REPLY_WEIGHT * chosen
        self._seconds = kept * self._seconds + seconds

    def ended(self, sequence: Sequence) -> None:
        """A reply is over."""
        kept = 1 - 1 / self._MEMORY
        self._replies = kept * self._replies + 1
        self._tokens = kept * self._tokens + len(sequence.output)

    def backlog(self, lines: Iterable[Line]) -> dict[Flow, Backlog]:
        """What waits in these lines, by share. Nothing takes time before the first step was measured."""
        pace = self._seconds / self._work if self._work else 0.0
        usual = self._tokens / self._replies if self._replies else math.inf  # most replies end before they must
        found: dict[Flow, Backlog] = {}
        for line in lines:
            waiting = len(line)
            replies = min(line.reply_tokens, waiting * usual)
            seconds = pace * (PROMPT_WEIGHT * line.prompt_tokens + REPLY_WEIGHT * replies)
            for share in shares_of(line.flow):
                before = found.get(share, Backlog(0, 0.0))
                found[share] = Backlog(before.waiting + waiting, before.seconds + seconds)
        return found


class NoMetrics:
    """`EngineMetrics` for an engine that nobody watches."""

    def step_done(self, batch_size: int, distinct_adapters: int, seconds: float) -> None: ...
    def queued(self, seconds: float) -> None: ...
    def first_token(self, seconds: float) -> None: ...
    def inter_token(self, seconds: float) -> None: ...
    def tokens(self, adapter: str | None, prompt: int, generated: int) -> None: ...
    def prefix_looked_up(self, found: int, tokens: int) -> None: ...
    def slot_loaded(self, seconds: float) -> None: ...
    def evicted(self, count: int) -> None: ...
    def aborted(self) -> None: ...
    def mask_made(self, seconds: float) -> None: ...
    def sat_out(self, count: int) -> None: ...
