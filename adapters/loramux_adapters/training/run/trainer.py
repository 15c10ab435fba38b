"""The training loop: order, parts, gradients, clipping, AdamW; evaluation between epochs; checkpoints.

Everything random in a step comes from the seed and the step's number. A run that was killed and continued from a
checkpoint therefore makes the same adapter as one that was not, bit for bit on the CPU.
"""

from __future__ import annotations

import hashlib
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from loramux_adapters.device.choice import device_at
from loramux_adapters.device.device import Device
from loramux_adapters.device.peak import PeakMemory
from loramux_adapters.errors import CheckpointError, DataError, MemoryShort, TrainingError
from loramux_adapters.training.data.batches import Row, TokenBatch, epoch_order, parts
from loramux_adapters.training.model.model import StepLoss
from loramux_adapters.training.recipe import Recipe
from loramux_adapters.training.run.checkpoint import Checkpoint, Checkpoints
from loramux_adapters.training.run.optimizer import (
    learning_rate,
    make_optimizer,
    read_state,
    set_rate,
    total_steps,
    write_state,
)
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


LOG_FILE, CHECKPOINTS = "log.jsonl", "checkpoints"
_PARAMETER = "parameter/"
_NO_BACKWARD = ".*autograd kernel was not registered.*"  # what bitsandbytes' repacked weights make torch say


class Trainer:
    """One training run. `run` belongs to one thread; `stop` may be called from anywhere, a signal handler too."""

    def __init__(
        self,
        model: Trainable,
        rows: Sequence[Row],
        held: Sequence[Row],
        recipe: Recipe,
        *,
        run_dir: Path,
        data_sha256: str,
        base_id: str,
        observer: Observer,
        checkpoint_every: int,
        checkpoint_minutes: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        device: Device | None = None,
    ) -> None:
        """Looks at the rows; nothing is written before `run`.

        Args:
            held: rows to evaluate on, may be empty.
            checkpoint_every: a checkpoint is made at each multiple of so many steps, wherever a run was resumed.
            checkpoint_minutes: and where the last one is older than this; 0 leaves it at that.
            device: where the model lies; None: by its tensors.

        Raises:
            DataError: no example holds a token to learn.
        """
        self._model, self._recipe, self._observer = model, recipe, observer
        self._parameters = dict(model.trainable)
        self._rows = [row for row in rows if any(row.learn[1:])]
        self._held = sorted((row for row in held if any(row.learn[1:])), key=lambda row: len(row.ids))
        if not self._rows:
            raise DataError(
                "there is nothing to learn: no training example holds a token of an answer"
                + (f" within max_length ({recipe.max_length} tokens); raise it or shorten the examples" if rows else "")
            )
        self._left_out = len(rows) - len(self._rows)
        self._lengths = [len(row.ids) for row in self._rows]
        self._order = lru_cache(maxsize=1)(self._order_of)
        self._per_epoch = len(self._order(0))
        self._steps = total_steps(self._per_epoch, recipe)
        self._device = device or device_at(next(iter(self._parameters.values())).device)
        self._optimizer = make_optimizer(self._parameters, recipe, self._device)
        made_of = {"data": data_sha256, "tokens": _tokens_sha256(self._rows), "base": base_id}
        self._checkpoints = Checkpoints(run_dir / CHECKPOINTS, made_of | {"recipe": recipe.as_json()})
        self._checkpoint_every, self._checkpoint_seconds = checkpoint_every, 60 * checkpoint_minutes
        self._clock = clock
        self._saved_at = clock()
        self._run_dir = run_dir
        self.trace = Trace(run_dir / LOG_FILE)
        self._memory = PeakMemory(self._device)
        self._step = self._saved = 0
        self._stopping = False

    def stop(self) -> None:
        """Makes `run` return after the step or the part of an evaluation that it is in, with a checkpoint."""
        self._stopping = True

    def run(self) -> TrainingOutcome:
        """Trains from the newest checkpoint, or from the start, to the end or to `stop`.

        Raises:
            CheckpointError: it cannot be continued from what is there, or a checkpoint cannot be written.
            MemoryShort: a step does not fit into memory.
            TrainingError: the loss is not finite.
        """
        self._resume()
        self._saved_at = self._clock()
        plan = self.plan()
        self._observer.started(plan)
        with self._device.used(), self._guarded():
            while self._evaluate_if_due():
                finished = self._step == self._steps
                if finished or self._stopping or self._checkpoint_is_due():
                    self._save()
                if finished or self._stopping:
                    break
                self._train()
            else:  # stopped within an evaluation, which the next run makes anew
                self._save()
        return TrainingOutcome(
            finished=self._step == self._steps and not self._evaluation_is_due(),
            step=self._step,
            plan=plan,
            trace=self.trace,
            seconds=self.trace.seconds,
            peak_bytes=self._memory.peak(),
        )

    def forget(self) -> None:
        """Removes the checkpoints, once the adapter is saved. Raises OSError."""
        self._checkpoints.remove()

    def _resume(self) -> None:
        try:
            self._run_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"{self._run_dir} cannot be made: {error.strerror}") from error
        checkpoint = self._checkpoints.latest()
        if checkpoint is None:
            self.trace.restore(b"")
            return
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                stored = checkpoint.tensors.get(_PARAMETER + name)
                if stored is None or stored.shape != parameter.shape:
                    raise CheckpointError(f"the checkpoint of step {checkpoint.step} holds no weights for {name}")
                parameter.copy_(stored)
        write_state(self._optimizer, self._parameters, checkpoint.tensors, checkpoint.numbers)
        self.trace.restore(checkpoint.log)
        self._memory.at_least(checkpoint.peak_bytes)
        self._step = self._saved = checkpoint.step

    def plan(self) -> Plan:
        """What is going to be done; `first` is known once `run` has looked for a checkpoint."""
        return Plan(
            steps=self._steps,
            first=self._step,
            steps_per_epoch=self._per_epoch,
            tokens_per_epoch=sum(self._lengths),
            learned_per_epoch=sum(sum(row.learn[1:]) for row in self._rows),
            left_out=self._left_out,
            passed_over=tuple(self._checkpoints.damaged),
        )

    def _train(self) -> None:
        """One optimizer step."""
        began = time.perf_counter()
        recipe, step = self._recipe, self._step
        epoch, index = divmod(step, self._per_epoch)
        split = parts(self._order(epoch)[index], recipe.accumulation, self._lengths)
        batches = [TokenBatch.of([self._rows[row] for row in part]) for part in split]
        learned = sum(batch.learned for batch in batches)
        torch.manual_seed(step_seed(recipe.seed, step))
        outcomes = [self._model.loss(batch, grad_scale=1 / learned) for batch in batches]
        loss = sum(outcome.loss_sum for outcome in outcomes) / learned
        norm = float(nn.utils.clip_grad_norm_(self._parameters.values(), recipe.max_grad_norm))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingError(
                f"step {step + 1}: the loss is {loss:g} and the gradient's norm {norm:g}; lower learning_rate (now "
                f"{recipe.learning_rate:g}) or alpha (now {recipe.alpha:g}), or raise warmup (now {recipe.warmup:g})"
            )
        rate = learning_rate(step, self._steps, recipe)
        set_rate(self._optimizer, rate)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._step = step + 1
        record = StepRecord(
            step=self._step,
            epoch=self._step / self._per_epoch,
            loss=loss,
            accuracy=sum(outcome.correct for outcome in outcomes) / learned,
            learned=learned,
            tokens=sum(len(batch.ids) for batch in batches),
            learning_rate=rate,
            grad_norm=norm,
            seconds=time.perf_counter() - began,
        )
        self.trace.add(record)
        self._observer.step(record)

    def _evaluation_is_due(self) -> bool:
        """At the start, after each epoch and at the end, once."""
        at_a_mark = self._step % self._per_epoch == 0 or self._step == self._steps
        return at_a_mark and not any(record.step == self._step for record in self.trace.epochs)

    def _evaluate_if_due(self) -> bool:
        """False if it was stopped; then nothing is recorded."""
        if not self._evaluation_is_due():
            return True
        began = time.perf_counter()
        held = self._held_loss()
        if held is None and self._held:
            return False
        train = self.trace.since_last_epoch()
        if held is None and train is None:
            return True
        record = EpochRecord(
            step=self._step,
            epoch=self._step / self._per_epoch,
            train_loss=train[0] if train else None,
            train_accuracy=train[1] if train else None,
            held_loss=held[0] if held else None,
            held_accuracy=held[1] if held else None,
            seconds=time.perf_counter() - began,
        )
        self.trace.add(record)
        self._observer.epoch(record)
        return True

    def _held_loss(self) -> tuple[float, float] | None:
        """Mean loss and accuracy of the held-out tokens; None if there are none or it was stopped."""
        size = -(-self._recipe.batch_size // self._recipe.accumulation)  # no more memory than a step takes
        outcomes = []
        for first in range(0, len(self._held), size):
            if self._stopping:
                return None
            outcomes.append(self._model.evaluate(TokenBatch.of(self._held[first : first + size])))
            self._observer.evaluating(min(first + size, len(self._held)), len(self._held))
        tokens = sum(outcome.tokens for outcome in outcomes)
        if not tokens:
            return None
        return sum(o.loss_sum for o in outcomes) / tokens, sum(o.correct for o in outcomes) / tokens

    def _checkpoint_is_due(self) -> bool:
        """At the multiples of `checkpoint_every`, and when the last one, or the start, is too long ago."""
        if self._step % self._checkpoint_every == 0:
            return True
        return 0 < self._checkpoint_seconds <= self._clock() - self._saved_at

    def _save(self) -> None:
        """Nothing if this step is saved already."""
        if self._step == self._saved:
            return
        tensors, numbers = read_state(self._optimizer, self._parameters)
        tensors |= {_PARAMETER + name: p.detach().cpu().contiguous() for name, p in self._parameters.items()}
        peak = self._memory.peak()
        path = self._checkpoints.save(Checkpoint(self._step, tensors, numbers, self.trace.lines(), peak))
        self._saved, self._saved_at = self._step, self._clock()
        self._observer.saved(path)

    def _order_of(self, epoch: int) -> list[list[int]]:
        recipe = self._recipe
        return epoch_order(self._lengths, recipe.batch_size, seed=recipe.seed, epoch=epoch, batching=recipe.batching)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Turns what libraries raise in a step into our errors, and the warning of wrong gradients into one."""
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message=_NO_BACKWARD)
                yield
        except UserWarning as warning:
            raise TrainingError(
                "the base was repacked for serving, so gradients would be wrong; load it with training=True"
            ) from warning
        except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
            if not _is_out_of_memory(error):
                raise
            raise MemoryShort(_lower(self._recipe, self._step)) from error


def step_seed(seed: int, step: int) -> int:
    """The seed of everything random in a step; neighbouring steps and seeds share nothing."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{step}".encode()).digest()[:8], "big") >> 1


def _tokens_sha256(rows: Sequence[Row]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr((row.ids, row.learn)).encode())
    return digest.hexdigest()


def _is_out_of_memory(error: BaseException) -> bool:
    text = str(error)
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text


def _lower(recipe: Recipe, step: int) -> str:
    wishes = [f"raise accumulation (now {recipe.accumulation})"] if recipe.accumulation < recipe.batch_size else []
    if not recipe.gradient_checkpointing:
        wishes.append("turn gradient_checkpointing on")
    wishes.append(
        f"lower batch_size (now {recipe.batch_size}), max_length (now {recipe.max_length}) or rank (now {recipe.rank})"
    )
    return f"step {step + 1} does not fit into memory: {', '.join(wishes)}; a changed recipe starts anew"
