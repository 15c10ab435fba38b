"""The engine: one thread that turns queued sequences into tokens, a step at a time.

Where the device works beside the host (`Running.ahead`), the next step is scheduled and started before the results of
this one are read, so that the device never waits for the host:

    host     | schedule, start 2 | read 1, deliver 1, schedule, start 3 | read 2, deliver 2, ...
    device   | step 1                     | step 2                               | step 3

A sequence that ends in step 1 (a stop token, its last token, an error, an abort) may have a row in step 2, whose result
is dropped. At most one step is under way while another is scheduled. Steps end in order, so a client hears the same
tokens in the same order as without.

Failures have three levels. One row (`RowResult.error`) ends that sequence. A step that raises ends the sequences of
its batch, and those of the step that was started on top of it; what they held is freed and what they loaded is
forgotten. Where a step cannot even be started, the one under way ends as it would have, before the sequences of the
other are ended. Anything else, or `MAX_FAILED_STEPS` failures in a row, ends the engine, and with it every sequence it
has. A step that copies adapters to a device which has no room for them is none of these failures: that is about the
adapters, and who asks for one again and again must not end what the others have.

A sequence whose grammar has not said yet what may come next sits steps out (`Scheduler`); the thread waits for a mask
when nothing else is left to do, and otherwise a few milliseconds at most.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple, Protocol

from loramux_adapters.errors import DeviceFull
from loramux_server.engine.inbox import ENDED, EngineState, Inbox
from loramux_server.engine.scheduling.scheduler import Scheduler
from loramux_server.engine.scheduling.sequence import (
    Batch,
    FinishReason,
    RowResult,
    ScheduledSequence,
    Sequence,
    SequenceStatus,
    TokenOutput,
)
from loramux_server.engine.step_metrics import EngineMetrics, EngineStats, StepMetrics, WorkRate
from loramux_server.errors import EngineDead, GrammarFailed

__all__ = ["Engine", "EngineMetrics", "EngineState", "EngineStats", "Runner", "Running"]

logger = logging.getLogger(__name__)

MAX_FAILED_STEPS = 3  # in a row
SLOW_MASK = 1.0  # seconds for one mask, of which the log is told
MASK_WAIT = 0.25  # seconds that an engine with nothing else to do waits for a mask before it looks for overdue ones
ABORT_GRACE = 5.0  # seconds an engine gets to notice, at the end of a drain, that all was aborted

Deliver = Callable[[list[tuple[str, TokenOutput]]], None]


class Running(Protocol):
    """A step that was started.

    Attributes:
        ahead: the next step may be started before this one's results are asked for.
    """

    @property
    def ahead(self) -> bool: ...

    def results(self) -> list[RowResult]:
        """Waits for the step; one result for each row with `num_heads`, in row order. Called once.

        Raising fails every sequence of the batch and of the step that was started after it, and nothing of the two is
        believed to be on the device.
        """


class Runner(Protocol):
    """What happens on the device. Called by the engine thread only."""

    def start(self, batch: Batch) -> Running:
        """Applies the slot loads and runs the rows, behind all that was started before; it need not wait for the end.

        It fills `SlotLoad.seconds`. When it returns it has taken all it needs of the sequences: one may have ended,
        and what it held may be given to others, before the step is done. Raising fails every sequence of the batch, and
        nothing of the step is believed to be on the device. Results are read in the order of the starts, and at most
        one step is not read when another is started.
        """


class _Started(NamedTuple):
    """A step that is under way.

    Attributes:
        running: None if it could not be started.
        is_full: it could not, since the device had no room, and it was to copy adapters there.
        since: when it was started.
    """

    batch: Batch
    running: Running | None
    since: float
    is_full: bool = False

    @property
    def ahead(self) -> bool:
        """Whether another may be started before this one is read."""
        return self.running is not None and self.running.ahead


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
        self._under_way: _Started | None = None  # between two calls of `_step`
        self._read_at = 0.0  # when the results of the last step were there
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
        while self._step() or self._wait_for_mask():
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
        """Ends a sequence before the next step is scheduled, with reason ABORT; an id that is not live is ignored."""
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
            while self._under_way is not None or not self._inbox.drained:
                if not self._step() and not self._wait_for_mask():
                    self._inbox.wait()
            state = EngineState.STOPPED
        except Exception:
            logger.exception("the engine stops after a failure")
        finally:
            self._end(state)

    def _step(self) -> bool:
        """Starts a step, and reads one. False if there was nothing to run."""
        self._receive()
        self._prefetch()
        must_read = self._under_way is not None and not self._under_way.ahead
        batch = Batch() if must_read else self._scheduler.schedule()
        self._publish()
        works = bool(batch.rows) or self._under_way is not None
        if works:
            self._run(batch)
        self._flush()
        return works

    def _wait_for_mask(self) -> bool:
        """Until a mask is there, or anything is said; a while at most. False, at once, if no sequence sits out."""
        sitting = self._scheduler.sitting_out
        for sequence in sitting:
            assert sequence.params.grammar is not None
            sequence.params.grammar.on_ready(self._inbox.wake)
        if sitting:
            self._inbox.wait(MASK_WAIT)
        return bool(sitting)

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
        """Starts the next step, if it has rows, then reads the one before; or the next, if that must be read first."""
        now = self._step_started_at = self._clock()
        try:
            step, self._under_way = self._under_way, None
            following = self._start(batch, now) if batch.rows else None
            if step is not None and not self._read(step) and following is not None:
                self._results(following)  # so that the device is done with it; it has failed with the other
            elif following is not None and step is None and not following.ahead:
                self._read(following)
            else:
                self._under_way = following
        finally:
            self._step_started_at = None

    def _start(self, batch: Batch, now: float) -> _Started:
        running: Running | None = None
        is_full = False
        try:
            running = self._runner.start(batch)
        except DeviceFull:
            is_full = bool(batch.slot_loads)
            _log_failure(batch)
        except Exception:
            _log_failure(batch)
        return _Started(batch, running, now, is_full)

    def _read(self, step: _Started) -> bool:
        """Waits for the step and turns its results into outputs. False if it failed."""
        results = self._results(step)
        if results is None:
            self._fail(step)
            return False
        now = self._clock()
        seconds, self._read_at = now - max(step.since, self._read_at), now  # the device was busy before, with another
        self._update(step.batch, results, seconds)
        return True

    def _results(self, step: _Started) -> list[tuple[ScheduledSequence, RowResult]] | None:
        """Waits for the step: its rows with `num_heads`, and what came of them. None if it failed: that is logged."""
        if step.running is None:
            return None
        try:
            results = step.running.results()
            rows = [row for row in step.batch.rows if row.num_heads]
            if len(results) != len(rows):
                raise RuntimeError(f"the runner gave {len(results)} results for {len(rows)} rows")
        except Exception:
            _log_failure(step.batch)
            return None
        return list(zip(rows, results, strict=True))

    def _fail(self, step: _Started) -> None:
        why = "the step failed" + (": the device has no room for an adapter of it" if step.is_full else "")
        for sequence in self._scheduler.roll_back():
            error = f"{why}; the request may be sent again"
            self._emit(sequence, TokenOutput(finish_reason=FinishReason.ERROR, error=error))
        if step.is_full:
            return
        self._failed_steps += 1
        if self._failed_steps == MAX_FAILED_STEPS:
            raise EngineDead(f"{MAX_FAILED_STEPS} steps in a row failed")

    def _update(self, batch: Batch, results: list[tuple[ScheduledSequence, RowResult]], seconds: float) -> None:
        self._failed_steps = 0
        late = {row.sequence for row, result in results if result.is_late}
        self._scheduler.commit(batch, late)
        now, finished = self._clock(), SequenceStatus.FINISHED
        for row, result in results:
            if row.sequence.status is finished:
                continue  # it has ended since the step was started
            output = self._output_of(row.sequence, result, now)
            if output is None:
                continue
            if output.finish_reason is not None:
                self._scheduler.finish(row.sequence)
                self._rate.ended(row.sequence)
            self._emit(row.sequence, output)
        self._metrics.step_done(batch, seconds, self._scheduler.slots.evictions)
        self._metrics.sat_out(len(self._scheduler.sitting_out))
        self._rate.step_done(batch, seconds)

    def _output_of(self, sequence: Sequence, result: RowResult, now: float) -> TokenOutput | None:
        """What the client gets; None if it is nothing yet, since there is more to read."""
        if result.error is not None:
            return TokenOutput(finish_reason=FinishReason.ERROR, error=result.error, is_impossible=result.is_impossible)
        if result.scores:
            sequence.add_scores(result.scores)
        if result.states is not None:
            sequence.add_states(result.states)
        output: TokenOutput | None = None
        if result.token_id is not None:
            try:
                output = self._token_output(sequence, result, result.token_id, now)
            except GrammarFailed as failure:
                return TokenOutput(finish_reason=FinishReason.ERROR, error=str(failure), is_impossible=True)
        elif sequence.ends_with_prompt and sequence.last_output is None:
            ended = TokenOutput(finish_reason=FinishReason.LENGTH, pooled=sequence.pooled)
            output = _first_output(sequence, ended, now)
        if output is not None and output.finish_reason is not None:
            output, sequence.last_output = None, output
        if sequence.last_output is not None and not sequence.continuation:
            output = replace(sequence.last_output, continuations=tuple(map(tuple, sequence.continuation_logprobs)))
        return output

    def _token_output(self, sequence: Sequence, result: RowResult, token: int, now: float) -> TokenOutput:
        """A stop token ends the reply and is no part of it: neither text nor usage counts it.

        A grammar that has come to its end ends the reply behind this token. Raises GrammarFailed.
        """
        params, is_first = sequence.params, sequence.first_token_at is None
        stops = token in params.stop_token_ids
        grammar = None if stops or params.forced else params.grammar
        if grammar is not None:
            if grammar.mask_seconds > SLOW_MASK:
                logger.warning("sequence %s: its grammar took %.1f s for a mask", sequence.id, grammar.mask_seconds)
            grammar.advance(token)
        self._metrics.token_chosen(sequence, not stops, now)
        output = TokenOutput(finish_reason=FinishReason.STOP, stopped_by=token, stopped_logprob=result.logprob)
        if not stops:
            sequence.output.append(token)
            reason = FinishReason.LENGTH if len(sequence.output) == params.max_tokens else None
            if grammar is not None and grammar.ended:
                reason = FinishReason.STOP
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


def _log_failure(batch: Batch) -> None:
    """Of the exception that is being handled."""
    logger.exception("a step failed, with sequences %s", [row.sequence.id for row in batch.rows])


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
