"""What the training loop is given and what it tells: the model it drives, and who watches it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import nn

from loramux_adapters.training.data.tokens import TokenBatch
from loramux_adapters.training.model.model import StepLoss
from loramux_adapters.training.run.trace import EpochRecord, StepRecord, Trace


class Trainable(Protocol):
    """What the loop needs of a model; see `LoraModel`."""

    @property
    def trainable(self) -> Mapping[str, nn.Parameter]: ...

    def loss(self, batch: TokenBatch, *, grad_scale: float) -> StepLoss: ...

    def evaluate(self, batch: TokenBatch) -> StepLoss: ...


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run is going to do.

    Attributes:
        steps: of the whole run; `first` of them were done before, in an earlier process.
        steps_per_epoch: batches of one pass over the data.
        tokens_per_epoch: of the examples that something is learned from; `learned_per_epoch` of them have a loss.
        left_out: training examples without a single token to learn, all of them cut away.
        passed_over: checkpoints that could not be read, in words.
    """

    steps: int
    first: int
    steps_per_epoch: int
    tokens_per_epoch: int
    learned_per_epoch: int
    left_out: int
    passed_over: Sequence[str]


@dataclass(frozen=True, slots=True)
class TrainingOutcome:
    """How a run ended.

    Attributes:
        finished: False if it was stopped; a checkpoint of `step` is there then, unless `step` is 0.
        trace: all its records.
        seconds: of all steps and evaluations, in earlier processes too.
        peak_bytes: most memory it took.
    """

    finished: bool
    step: int
    plan: Plan
    trace: Trace
    seconds: float
    peak_bytes: int


class Observer(Protocol):
    """Is told what happens, in the thread that trains."""

    def started(self, plan: Plan) -> None: ...

    def step(self, record: StepRecord) -> None: ...

    def evaluating(self, done: int, total: int) -> None:
        """Held-out examples evaluated so far."""

    def epoch(self, record: EpochRecord) -> None: ...

    def saved(self, checkpoint: Path) -> None: ...
