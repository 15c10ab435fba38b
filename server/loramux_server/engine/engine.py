"""The engine: one thread that turns queued sequences into tokens, a step at a time.

Failures have three levels. One row (`RowResult.error`) ends that sequence. A step that raises ends the sequences of
its batch; what it held is freed and what it loaded is forgotten. Anything else, or `MAX_FAILED_STEPS` failing steps in
a row, ends the engine, and with it every sequence it has.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from loramux_server.engine.inbox import ENDED, EngineState, Inbox
from loramux_server.engine.scheduling.scheduler import Scheduler
from loramux_server.engine.scheduling.sequence import Batch, FinishReason, RowResult, Sequence, TokenOutput
from loramux_server.engine.step_metrics import EngineMetrics, EngineStats, StepMetrics, WorkRate
from loramux_server.errors import EngineDead

__all__ = ["Engine", "EngineMetrics", "EngineState", "EngineStats", "Runner"]

logger = logging.getLogger(__name__)

MAX_FAILED_STEPS = 3  # in a row
ABORT_GRACE = 5.0  # seconds an engine gets to notice, at the end of a drain, that all was aborted

Deliver = Callable[[list[tuple[str, TokenOutput]]], None]


class Runner(Protocol):
    """What happens on the device. Called by the engine thread only."""

    def run(self, batch: Batch) -> list[RowResult]:
        """Applies the slot loads, runs the rows, returns one result per row with logits, in row order.

        It fills `SlotLoad.seconds`. What it keeps for a sequence may go once the sequence is FINISHED. Raising fails
        every sequence of the batch, and nothing of the step is believed to be on the device.
        """


class Engine:
    """Owns the engine thread. `submit`, `abort`, `wake`, `drain` and the properties may be used by any thread."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        inbox: Inbox,
        metrics: EngineMetrics,
        *,
        warm_up: Callable[[], None] = lambda: None,
        watchdog_timeout: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`warm_up` runs on the engine thread before the first step; `watchdog_timeout` is in seconds, for one step."""
        self._scheduler = scheduler
        self._runner = runner
        self._inbox = inbox
        self._metrics = StepMetrics(metrics)
        self._rate = WorkRate()
        self._warm_up = warm_up
        self._watchdog_timeout = watchdog_timeout
        self._clock = clock
        self._deliver: Deliver = lambda outputs: None
        self._thread = threading.Thread(target=self._main, name="loramux-engine", daemon=True)
        self._warm = threading.Event()  # set once: the warm-up is over, one way or the other
        self._outputs: list[tuple[str, TokenOutput]] = []  # of this step, for one delivery
        self._failed_steps = 0  # in a row
        self._step_started_at: float | None = None
        self._stats = self._snapshot()

    def start(self, deliver: Deliver) -> None:
        """Starts the thread. `deliver` is called by it, at most once per step, with (sequence id, output) in order."""
        assert self.state is EngineState.STARTING
        self._deliver = deliver
        self._thread.start()

    def work_off(self, deliver: Deliver) -> None:
        """In place of `start`: runs all that was submitted to its end, on the caller's thread.

        The adapters must be in host memory, since nothing waits for a load here.

        Raises:
            EngineDead: `MAX_FAILED_STEPS` steps in a row failed.
        """
        assert self._thread.ident is None, "the engine has a thread of its own"
        self._deliver = deliver
        while self._step():
            pass

    def wait_until_warm(self) -> None:
        """Blocks until the first step could run. Raises EngineDead if the warm-up failed."""
        self._warm.wait()
        if self.state is EngineState.DEAD:
            raise EngineDead("the engine could not start")

    def submit(self, *sequences: Sequence) -> None:
        """Queues all of them, which run on the same adapters, or none.

        Raises RequestError, ServerBusy, ServerDraining or EngineDead.
        """
        for sequence in sequences:
            self._scheduler.check_fits(sequence)
        if self._hangs:
            raise EngineDead("the engine does not respond; the server must be restarted")
        self._inbox.put(*sequences)

    def abort(self, sequence_id: str) -> None:
        """Ends a sequence before the next step, with reason ABORT; an id that is not live is ignored."""
        self._inbox.abort(sequence_id)

    def drain(self, timeout: float) -> None:
        """Takes nothing new, finishes what it has for up to `timeout` seconds, aborts the rest, ends the thread."""
        self._inbox.drain()
        if self._thread.ident is None:
            self._inbox.end(EngineState.STOPPED)
            return
        self._thread.join(timeout)
        if self._thread.is_alive():
            self._inbox.abort_all()
            self._thread.join(ABORT_GRACE)
        if self._thread.is_alive():
            logger.error("the engine does not stop: its step has not ended")

    @property
    def state(self) -> EngineState:
        return self._inbox.state

    @property
    def alive(self) -> bool:
        """The thread runs, and its step is not older than the watchdog allows."""
        return self._thread.is_alive() and self.state not in ENDED and not self._hangs

    @property
    def ready(self) -> bool:
        """Alive, warmed up and not draining."""
        return self.alive and self.state is EngineState.RUNNING

    @property
    def stats(self) -> EngineStats:
        return replace(self._stats, waiting=self._inbox.num_waiting)

    @property
    def _hangs(self) -> bool:
        started = self._step_started_at
        return started is not None and self._clock() - started > self._watchdog_timeout

    def _main(self) -> None:
        state = EngineState.DEAD
        try:
            self._warm_up()
            self._inbox.started()
            self._warm.set()
            while not self._inbox.drained:
                if not self._step():
                    self._inbox.wait()
            state = EngineState.STOPPED
        except Exception:
            logger.exception("the engine stops after a failure")
        finally:
            self._end(state)

    def _step(self) -> bool:
        """False if there was nothing to run."""
        self._receive()
        self._prefetch()
        batch = self._scheduler.schedule()
        self._publish()
        if batch.rows:
            self._run(batch)
        self._flush()
        return bool(batch.rows)

    def _receive(self) -> None:
        mail = self._inbox.take()
        for sequence in mail.sequences:
            self._scheduler.add(sequence)
        for sequence in self._scheduler.abort(mail.aborted):
            if not sequence.background:
                self._metrics.aborted()
            self._emit(sequence, TokenOutput(finish_reason=FinishReason.ABORT))
        slots = self._scheduler.slots
        if mail.kept is not None:
            slots.keep(mail.kept)
        for version in mail.retired:  # after the aborts: what they gave up can go
            slots.retire(version)

    def _prefetch(self) -> None:
        for sequence, reason in self._scheduler.prefetch():
            logger.warning("sequence %s: adapter %s failed to load: %s", sequence.id, sequence.adapter, reason)
            self._emit(sequence, TokenOutput(finish_reason=FinishReason.ERROR, error=reason))

    def _publish(self) -> None:
        self._inbox.set_backlog(self._rate.backlog(self._scheduler.lines))
        self._stats = self._snapshot()

    def _run(self, batch: Batch) -> None:
        started = self._step_started_at = self._clock()
        try:
            results = self._runner.run(batch)
            if len(results) != sum(row.num_logits > 0 for row in batch.rows):
                raise RuntimeError(f"the runner gave {len(results)} results for another number of rows")
        except Exception:
            logger.exception("a step failed, with sequences %s", [row.sequence.id for row in batch.rows])
            self._fail(batch)
        else:
            self._update(batch, results, self._clock() - started)
        finally:
            self._step_started_at = None

    def _fail(self, batch: Batch) -> None:
        for sequence in self._scheduler.roll_back(batch):
            error = "the step failed; the request may be sent again"
            self._emit(sequence, TokenOutput(finish_reason=FinishReason.ERROR, error=error))
        self._failed_steps += 1
        if self._failed_steps == MAX_FAILED_STEPS:
            raise EngineDead(f"{MAX_FAILED_STEPS} steps in a row failed")

    def _update(self, batch: Batch, results: list[RowResult], seconds: float) -> None:
        self._failed_steps = 0
        self._scheduler.commit(batch)
        now = self._clock()
        rows = [row for row in batch.rows if row.num_logits]
        for row, result in zip(rows, results, strict=True):
            output = self._output_of(row.sequence, result, now)
            if output is None:
                continue
            if output.finish_reason is not None:
                self._scheduler.finish(row.sequence)
                self._rate.ended(row.sequence)
            self._emit(row.sequence, output)
        self._metrics.step_done(batch, seconds, self._scheduler.slots.evictions)
        self._rate.step_done(batch, seconds)

    def _output_of(self, sequence: Sequence, result: RowResult, now: float) -> TokenOutput | None:
        """What the client gets; None if it is nothing yet, since there is more to read."""
        if result.error is not None:
            return TokenOutput(finish_reason=FinishReason.ERROR, error=result.error)
        if result.scores:
            sequence.add_scores(result.scores)
        output: TokenOutput | None = None
        if result.token_id is not None:
            output = self._token_output(sequence, result, result.token_id, now)
        elif sequence.ends_with_prompt and sequence.last_output is None:
            output = _first_output(sequence, TokenOutput(finish_reason=FinishReason.LENGTH), now)
        if output is not None and output.finish_reason is not None:
            output, sequence.last_output = None, output
        if sequence.last_output is not None and not sequence.continuation:
            output = replace(sequence.last_output, continuations=tuple(map(tuple, sequence.continuation_logprobs)))
        return output

    def _token_output(self, sequence: Sequence, result: RowResult, token: int, now: float) -> TokenOutput:
        """A stop token ends the reply and is no part of it: neither text nor usage counts it."""
        is_first = sequence.first_token_at is None
        stops = token in sequence.params.stop_token_ids
        self._metrics.token_chosen(sequence, not stops, now)
        output = TokenOutput(finish_reason=FinishReason.STOP)
        if not stops:
            sequence.output.append(token)
            is_last = len(sequence.output) == sequence.params.max_tokens
            reason = FinishReason.LENGTH if is_last else None
            output = TokenOutput(token, result.logprob, reason, digest=result.digest)
        return _first_output(sequence, output, now) if is_first else output

    def _emit(self, sequence: Sequence, output: TokenOutput) -> None:
        self._outputs.append((sequence.id, output))

    def _flush(self) -> None:
        """Hands over all outputs of this step in one call."""
        outputs, self._outputs = self._outputs, []
        if outputs:
            self._inbox.forget(_ended(outputs))
            self._deliver(outputs)

    def _end(self, state: EngineState) -> None:
        """The thread's last act: no sequence is left without a final output."""
        left = self._inbox.end(state) - _ended(self._outputs)
        error = "the engine has stopped after a failure"
        self._outputs += [(id_, TokenOutput(finish_reason=FinishReason.ERROR, error=error)) for id_ in sorted(left)]
        self._stats = replace(self._stats, running=0)
        self._warm.set()
        self._flush()

    def _snapshot(self) -> EngineStats:
        blocks, slots = self._scheduler.blocks, self._scheduler.slots
        return EngineStats(
            running=len(self._scheduler.running),
            waiting=self._inbox.num_waiting,
            kv_blocks_used=blocks.used,
            kv_blocks_kept=blocks.kept,
            kv_blocks_total=blocks.num_blocks,
            kv_blocks_peak=blocks.peak,
            slot_rows_used=slots.rows_used,
            slot_rows_total=slots.rows,
            slot_hits=slots.hits,
            slot_misses=slots.misses,
            resident=slots.residents,
            waiting_by_adapter=dict(self._scheduler.waiting_by_adapter),
        )


def _ended(outputs: list[tuple[str, TokenOutput]]) -> set[str]:
    return {sequence_id for sequence_id, output in outputs if output.finish_reason is not None}


def _first_output(sequence: Sequence, output: TokenOutput, now: float) -> TokenOutput:
    """The same with what only the first output of a sequence tells."""
    assert sequence.scheduled_at is not None
    return replace(
        output,
        queue_seconds=sequence.scheduled_at - sequence.arrived,
        first_token_seconds=now - sequence.arrived,
        cached_tokens=sequence.num_cached,
        prompt_logprobs=tuple(sequence.prompt_logprobs),
    )
