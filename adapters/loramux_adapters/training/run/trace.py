"""What happened in a training: one JSON line for each step and each evaluation, in memory and in log.jsonl."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loramux_adapters.durable_files import write_whole
from loramux_adapters.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One optimizer step.

    Attributes:
        step: steps done, this one included.
        epoch: passes over the data so far, such as 1.25.
        loss: mean negative log-likelihood of the learned tokens, in nats.
        accuracy: share of them that the model would have said itself.
        learned: learned tokens.
        tokens: all tokens that were computed.
        learning_rate: of this step.
        grad_norm: before clipping.
        seconds: that the step took.
    """

    step: int
    epoch: float
    loss: float
    accuracy: float
    learned: int
    tokens: int
    learning_rate: float
    grad_norm: float
    seconds: float


@dataclass(frozen=True, slots=True)
class EpochRecord:
    """The state at the start, at the end of each epoch and at the end.

    Attributes:
        step, epoch: where it was taken; 0 before the first step.
        train_loss, train_accuracy: over the learned tokens since the last such record; None before the first step.
        held_loss, held_accuracy: over the held-out examples; None where there are none.
        seconds: that the evaluation took.
    """

    step: int
    epoch: float
    train_loss: float | None
    train_accuracy: float | None
    held_loss: float | None
    held_accuracy: float | None
    seconds: float


Record = StepRecord | EpochRecord
_KINDS: dict[str, type[StepRecord] | type[EpochRecord]] = {"step": StepRecord, "epoch": EpochRecord}


class Trace:
    """The records of a run so far; each is one whole line of the file as soon as it is added."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.steps: list[StepRecord] = []
        self.epochs: list[EpochRecord] = []

    def restore(self, lines: bytes) -> None:
        """Becomes what a checkpoint holds: what the file says beyond it did not happen. Raises CheckpointError."""
        records = [_parse(line) for line in lines.splitlines()]
        try:
            write_whole(self._path, lines)
        except OSError as error:
            raise _not_written(self._path, error) from error
        self.steps = [record for record in records if isinstance(record, StepRecord)]
        self.epochs = [record for record in records if isinstance(record, EpochRecord)]

    def add(self, record: Record) -> None:
        """Appends a record. Raises CheckpointError if the file cannot be written."""
        line = (json.dumps(_as_json(record)) + "\n").encode()
        try:
            file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                written = os.write(file, line)  # in one call, so that a kill leaves no half of a line
            finally:
                os.close(file)
        except OSError as error:
            raise _not_written(self._path, error) from error
        if written != len(line):
            raise CheckpointError(f"{self._path} could not be written whole; is the disk full?")
        if isinstance(record, StepRecord):
            self.steps.append(record)
        else:
            self.epochs.append(record)

    def lines(self) -> bytes:
        """All records, in order, as they are in the file."""
        records: list[Record] = [*self.steps, *self.epochs]
        records.sort(key=lambda record: (record.step, isinstance(record, EpochRecord)))
        return "".join(json.dumps(_as_json(record)) + "\n" for record in records).encode()

    @property
    def seconds(self) -> float:
        """That all steps and evaluations took."""
        return sum(step.seconds for step in self.steps) + sum(epoch.seconds for epoch in self.epochs)

    def since_last_epoch(self) -> tuple[float, float] | None:
        """Mean loss and accuracy of the tokens learned since the last epoch record; None if no step was made."""
        last = self.epochs[-1].step if self.epochs else 0
        recent = [record for record in self.steps if record.step > last]
        learned = sum(record.learned for record in recent)
        if not learned:
            return None
        loss = sum(record.loss * record.learned for record in recent) / learned
        return loss, sum(record.accuracy * record.learned for record in recent) / learned


def read_trace(path: Path) -> Trace:
    """The records of a finished run's log. Raises CheckpointError if it is not one."""
    trace = Trace(path)
    try:
        records = [_parse(line) for line in path.read_bytes().splitlines()]
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    trace.steps = [record for record in records if isinstance(record, StepRecord)]
    trace.epochs = [record for record in records if isinstance(record, EpochRecord)]
    return trace


def _as_json(record: Record) -> dict[str, Any]:
    kind = "step" if isinstance(record, StepRecord) else "epoch"
    return {"kind": kind} | dataclasses.asdict(record)


def _parse(line: bytes) -> Record:
    try:
        data = json.loads(line)
        return _KINDS[data.pop("kind")](**data)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"not a line of a training log: {line[:80]!r}") from error


def _not_written(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path} cannot be written: {error.strerror}; what was saved before is still there")
