"""What a training shows while it runs: a bar on a terminal, now and then a line elsewhere, one line for each epoch."""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from loramux_adapters.training.run.interface import Plan
from loramux_adapters.training.run.trace import EpochRecord, StepRecord

BAR_WIDTH = 24
BAR_SECONDS = 0.2  # least time between two drawings
LINE_SECONDS = 30.0  # between two lines where there is no terminal
RECENT = 16  # steps that loss, accuracy and speed are taken over
MIB = 2**20


class Progress:
    """Watches a `Trainer` and writes to a stream. Used by the thread that trains.

    Args:
        memory: bytes that the run takes now.
        terminal: draw a bar in place; otherwise lines are only ever added.
    """

    def __init__(
        self,
        stream: TextIO,
        *,
        memory: Callable[[], int],
        terminal: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream, self._memory, self._terminal, self._clock = stream, memory, terminal, clock
        self._recent: deque[StepRecord] = deque(maxlen=RECENT)
        self._shown_at: float | None = None
        self._drawn = False  # the bar is on the terminal's last line
        self._evaluation_seconds = 0.0
        self._plan: Plan | None = None

    def started(self, plan: Plan) -> None:
        self._plan = plan
        for what in plan.passed_over:
            self.line(f"a checkpoint cannot be read and is passed over: {what}")
        if plan.first:
            self.line(f"goes on from the checkpoint of step {plan.first} of {plan.steps}")

    def step(self, record: StepRecord) -> None:
        self._recent.append(record)
        text, steps = self._state(record), self._plan_of().steps
        if self._terminal:
            text = _bar(record.step / steps, _columns() - len(text)) + text
        self._show(text, final=record.step == steps)

    def evaluating(self, done: int, total: int) -> None:
        self._show(f"evaluating on held-out examples: {done:,} of {total:,}", final=False)

    def epoch(self, record: EpochRecord) -> None:
        self._evaluation_seconds = record.seconds
        self.line(epoch_line(record, self._plan_of()))

    def saved(self, checkpoint: Path) -> None:
        """Says nothing: what comes every few minutes was announced once, at the start."""

    def line(self, text: str) -> None:
        """Adds a line; a bar that is on the terminal makes way for it."""
        if self._drawn:
            self._stream.write("\r\x1b[K")
            self._drawn = False
        self._stream.write(f"{text}\n")
        self._stream.flush()

    def end(self) -> None:
        """Takes the bar away, whatever happened."""
        if self._drawn:
            self._stream.write("\n")
            self._stream.flush()
            self._drawn = False

    def _show(self, text: str, *, final: bool) -> None:
        now = self._clock()
        pause = BAR_SECONDS if self._terminal else LINE_SECONDS
        if self._shown_at is not None and now - self._shown_at < pause and not final:
            return
        self._shown_at = now
        if not self._terminal:
            self.line(text)
            return
        self._stream.write(f"\r{text[: _columns()]}\x1b[K")
        self._stream.flush()
        self._drawn = True

    def _state(self, record: StepRecord) -> str:
        plan = self._plan_of()
        learned = sum(each.learned for each in self._recent)
        seconds = sum(each.seconds for each in self._recent)
        loss = sum(each.loss * each.learned for each in self._recent) / learned
        right = sum(each.accuracy * each.learned for each in self._recent) / learned
        speed = sum(each.tokens for each in self._recent) / max(seconds, 1e-9)
        return (
            f"step {record.step}/{plan.steps}  loss {loss:.3f}  right {right:.1%}  {speed:,.0f} tokens/s  "
            f"{self._memory() / MIB:,.0f} MiB  {duration(self._left(record.step, seconds / len(self._recent)))} left"
        )

    def _left(self, step: int, seconds_per_step: float) -> float:
        """Seconds to the end: the steps, and the evaluations between them."""
        plan = self._plan_of()
        marks = set(range(plan.steps_per_epoch, plan.steps + 1, plan.steps_per_epoch)) | {plan.steps}
        evaluations = sum(mark >= step for mark in marks)
        return (plan.steps - step) * seconds_per_step + evaluations * self._evaluation_seconds

    def _plan_of(self) -> Plan:
        assert self._plan is not None  # the trainer says `started` first
        return self._plan


def epoch_line(record: EpochRecord, plan: Plan) -> str:
    """One line on where the run is, as a teacher would show it."""
    held = _scores(record.held_loss, record.held_accuracy)
    if record.step == 0:
        return f"before training: held-out {held}"
    train = _scores(record.train_loss, record.train_accuracy)
    done = f"{record.epoch:.2f}".rstrip("0").rstrip(".")
    text = f"epoch {done} (step {record.step}/{plan.steps}): training {train}"
    return f"{text} | held-out {held}" if record.held_loss is not None else text


def duration(seconds: float) -> str:
    """`0:07`, `12:30` or `3:05:00`."""
    whole = round(seconds)
    minutes, hours = whole // 60 % 60, whole // 3600
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def _bar(share: float, room: int) -> str:
    """A bar as wide as there is room for; where that is too little, the figure alone."""
    figure = f"{share:4.0%}  "
    width = min(BAR_WIDTH, room - len(figure) - len("[] "))
    return f"[{'#' * round(share * width):-<{width}}] {figure.lstrip()}" if width >= BAR_WIDTH // 4 else figure.lstrip()


def _columns() -> int:
    return shutil.get_terminal_size().columns - 1  # a full last column would wrap


def _scores(loss: float | None, accuracy: float | None) -> str:
    if loss is None or accuracy is None:
        return "nothing"
    return f"loss {loss:.4f}, {accuracy:.1%} of tokens right"
