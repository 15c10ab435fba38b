"""The part of `loramux train` that needs PyTorch: base, adapter, loop and what it shows, the adapter's directory."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TextIO

import torch

from loramux_adapters.device.device import Device
from loramux_adapters.errors import MemoryShort
from loramux_adapters.training.data.batches import Row
from loramux_adapters.training.model.lora_layers import target_names
from loramux_adapters.training.model.model import LoraModel
from loramux_adapters.training.run.card import make_card, write_card
from loramux_adapters.training.run.curves import draw_curves
from loramux_adapters.training.run.optimizer import state_bytes, why_not_8_bit
from loramux_adapters.training.run.run_dir import RunDirectory
from loramux_adapters.training.run.trace import EpochRecord, StepRecord
from loramux_adapters.training.run.trainer import Plan, Trainer, TrainingOutcome
from loramux_server.base.device import device_of
from loramux_server.base.identity import cached_base_id
from loramux_server.base.loader import (
    BaseModel,
    load_base_model,
    load_tokenizer,
    quantization_recipe,
    skeleton_of,
    vocabulary_of,
)
from loramux_server.base.originals import original_weights
from loramux_server.base.source import BaseSource
from loramux_server.base.support import refuse_to_train
from loramux_server.cli.frame import show
from loramux_server.cli.screen import LineBar
from loramux_server.cli.train_data import Prepared, data_lines, render
from loramux_server.config.environment import kernels_of
from loramux_server.config.train import TrainConfig
from loramux_server.errors import BaseModelError, CommandFailed
from loramux_server.kernels.choice import choose_kernels
from loramux_server.kernels.training import training_kernels
from loramux_server.longrun.interrupt import interruptible
from loramux_server.longrun.time_left import duration
from loramux_server.plain_text import masked
from loramux_server.serving.startup import Stages

RECENT = 16  # steps that loss, accuracy and speed are taken over
MIB = 2**20


def run_training(
    config: TrainConfig, prepared: Prepared, run: RunDirectory, stages: Stages, *, skip_bad: bool, dry_run: bool
) -> TrainingOutcome | None:
    """Trains and writes the adapter; None if it was only to be shown. The base has left the memory when this returns.

    Raises:
        AdapterError, LoramuxError: it cannot be done; what was saved stays.
    """
    device = device_of(config.device, stages.note)
    with device.used():
        return _run_on(device, config, prepared, run, stages, skip_bad=skip_bad, dry_run=dry_run)


def _run_on(
    device: Device,
    config: TrainConfig,
    prepared: Prepared,
    run: RunDirectory,
    stages: Stages,
    *,
    skip_bad: bool,
    dry_run: bool,
) -> TrainingOutcome | None:
    material = prepared.material
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    recipe = config.recipe()
    with stages.stage("look at the base's layers"):
        skeleton_config, skeleton = skeleton_of(prepared.source)
        refuse_to_train(prepared.source.name, skeleton_config)
        target_names(skeleton, recipe)  # refuses layers that there are not
        if prepared.base_there is not None:
            served = quantization_recipe(skeleton_config, recipe.quantize)
            base_id = cached_base_id(prepared.source.directory, served, prepared.cache_dir, stages.note)
            _refuse_another_base(config, prepared.base_there, base_id)
    train, held = render(config, material, stages, prepared.source, skip_bad=skip_bad)
    rows = [*train.rendered.rows, *(held.rendered.rows if held is not None else ())]
    _refuse_unknown_tokens(vocabulary_of(skeleton), prepared.source, rows)
    with stages.stage("load the base"):
        base = load_base_model(
            prepared.source,
            device=device,
            cache_dir=prepared.cache_dir,
            report=stages.note,
            quantize=recipe.quantize,
            training=True,
            kernels=choose_kernels(device, kernels_of(os.environ)),
        )
    with stages.stage("add the adapter" if recipe.init == "default" else f"add the adapter ({recipe.init})"):
        model = _add_adapter(base, config)
    progress = Progress(sys.stdout, run.checkpoints, memory=lambda: device.memory().held, evaluates=held is not None)
    trainer = Trainer(
        model,
        train.rendered.rows,
        held.rendered.rows if held is not None else (),
        recipe,
        run_dir=run.path,
        data_sha256=material.train.sha256,
        base_id=base.base_id,
        observer=progress,
        checkpoint_every=config.checkpoint_every,
        checkpoint_minutes=config.checkpoint_minutes,
        device=device,
    )
    about = [*data_lines(config, material, train, held), *_model_lines(model, base, recipe.quantize)]
    for line in ["", *about, *_step_lines(trainer.plan(), config, run), ""]:
        show(line)
    if dry_run:
        show("nothing was trained, and nothing is left behind: --dry-run")
        return None
    try:
        with interruptible(progress.stopping, trainer.stop):
            outcome = trainer.run()
    finally:
        progress.end()
    if not outcome.finished:
        return outcome
    card = make_card(
        name=str(config.name),
        base_name=base.name,
        base_id=base.base_id,
        recipe=recipe,
        data=train.summary(),
        held=held.summary() if held is not None else None,
        outcome=outcome,
        device=device.in_words(),
    )

    def fill(directory: Path) -> None:
        model.save(directory, base_name=base.name, base_id=base.base_id, dtype=recipe.save_dtype)
        write_card(directory, card)

    _draw(outcome, run, f"{config.name}: LoRA of {base.name}")
    run.publish(fill)
    trainer.forget()
    speed = card["training"]["tokens_per_second"] or 0
    show(
        f"trained in {duration(outcome.seconds)}, {speed:,.0f} tokens/s; memory: at most "
        f"{outcome.peak_bytes / MIB:,.0f} MiB"
    )
    return outcome


def _refuse_another_base(config: TrainConfig, there: str | None, here: str) -> None:
    """Raises CommandFailed where the server that is to get the adapter would refuse it."""
    if there is not None and there != here:
        raise CommandFailed(
            f"--upload {masked(config.upload or '')}: that server holds another base (id {there[:12]}) than --base "
            f"{config.base} (id {here[:12]}), so it would refuse the adapter; name its base, or leave --upload out"
        )


def _refuse_unknown_tokens(vocabulary: int, source: BaseSource, rows: Iterable[Row]) -> None:
    """Raises CommandFailed: some tokenizers know tokens that the checkpoint has no row of numbers for."""
    highest = max((max(row.ids) for row in rows), default=0)
    if highest >= vocabulary:
        token = load_tokenizer(source.directory).convert_ids_to_tokens(highest)
        raise CommandFailed(
            f"{token!r} is token {highest} of the base's tokenizer, and the base "
            f"has embeddings for 0 to {vocabulary - 1} only; take it out of the data, or out of the chat template"
        )


def _add_adapter(base: BaseModel, config: TrainConfig) -> LoraModel:
    recipe = config.recipe()
    torch.manual_seed(recipe.seed)
    originals = original_weights(base.source.directory, base.names.whole_tensors) if recipe.init == "loftq" else None
    try:
        ops = training_kernels(base.model, base.device)
        return LoraModel.build(base.model, recipe, originals=originals, ops=ops, device=base.device)
    except BaseModelError as error:
        raise BaseModelError(f"{error}, and init loftq starts from it; use init default") from error
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise MemoryShort(
            f"an adapter of rank {recipe.rank} does not fit into memory; lower --rank, or name fewer --target-modules"
        ) from error


def _model_lines(model: LoraModel, base: BaseModel, quantize: str) -> list[str]:
    """Parameters and bytes, before the first step."""
    counts = model.counts()
    in_16_bit = f"{counts.base_bytes_16bit / MIB:,.1f} MiB in 16 bit"
    ratio = counts.base_bytes_16bit / counts.base_bytes
    size = f"{counts.base_bytes / MIB:,.1f} MiB in NF4; {in_16_bit}, {ratio:.1f} times as much"
    adapter, optimizer = counts.adapter_bytes / MIB, state_bytes(model.trainable, base.device) / MIB
    in_fp32 = why_not_8_bit(base.device) if base.device.layout.moments_8_bit else ""
    return [
        f"base      {base.name}: {size if quantize == 'nf4' else in_16_bit}",
        f"model     {counts.total:,} parameters, {counts.trainable:,} of them trainable: "
        f"{counts.trainable / counts.total:.2%}",
        f"adapter   {adapter:,.1f} MiB in fp32, as much for its gradients, {optimizer:,.1f} MiB for the optimizer",
        *([f"          its moments are kept in fp32, and not in 8 bits: {in_fp32}"] if in_fp32 else []),
    ]


def _step_lines(plan: Plan, config: TrainConfig, run: RunDirectory) -> list[str]:
    """How long it goes on, and where to."""
    left_out = f"; {plan.left_out:,} examples have nothing to learn left" if plan.left_out else ""
    return [
        f"steps     {plan.steps:,} of {config.batch_size} examples, {plan.steps / plan.steps_per_epoch:.2f} epochs of "
        f"{plan.tokens_per_epoch:,} tokens{left_out}",
        f"writes    {run.path}, with a checkpoint {_how_often(config)}; Ctrl-C stops, and the same command goes on",
    ]


def _how_often(config: TrainConfig) -> str:
    by_time = f" or {config.checkpoint_minutes:g} minutes" if config.checkpoint_minutes else ""
    return f"every {config.checkpoint_every} steps{by_time}"


def _draw(outcome: TrainingOutcome, run: RunDirectory, title: str) -> None:
    """Before the adapter is published: from then on the run counts as finished."""
    try:
        draw_curves(outcome.trace, run.curves, title=title)
    except OSError as error:
        raise CommandFailed(
            f"{run.curves} cannot be written: {error.strerror}. The last checkpoint is still there: make room and run "
            "the same command again"
        ) from error


class Progress:
    """Watches a `Trainer` and writes to a stream. Used by the thread that trains, `stopping` by any.

    Args:
        checkpoints: the directory that they are written to.
        memory: bytes that the run takes now.
        evaluates: there are held-out examples, which are looked at before the first step and after each epoch.
    """

    def __init__(
        self,
        stream: TextIO,
        checkpoints: Path,
        *,
        memory: Callable[[], int],
        evaluates: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._checkpoints = checkpoints
        self._done = 0
        self._evaluates = evaluates  # now; the first step comes after that
        self._bar, self._memory = LineBar(stream, clock), memory
        self._recent: deque[StepRecord] = deque(maxlen=RECENT)
        self._evaluation_seconds = 0.0
        self._plan: Plan | None = None

    def started(self, plan: Plan) -> None:
        self._plan, self._done = plan, plan.first
        self._evaluates = self._evaluates and plan.first % plan.steps_per_epoch == 0
        for what in plan.passed_over:
            self.line(f"a checkpoint cannot be read and is passed over: {what}")
        if plan.first:
            self.line(f"goes on from the checkpoint of step {plan.first} of {plan.steps}")

    def step(self, record: StepRecord) -> None:
        self._recent.append(record)
        self._done, self._evaluates = record.step, False
        self._bar.show(self._state(record), record.step, self._plan_of().steps)

    def evaluating(self, done: int, total: int) -> None:
        self._evaluates = done < total
        self._bar.show(f"evaluating on held-out examples: {done:,} of {total:,}")

    def epoch(self, record: EpochRecord) -> None:
        self._evaluation_seconds = record.seconds
        self.line(epoch_line(record, self._plan_of()))

    def saved(self, checkpoint: Path) -> None:
        """Says nothing: what comes every few minutes was announced once, at the start."""

    def stopping(self) -> None:
        """Says what will be kept, now that the run is to stop."""
        again = "press Ctrl-C again to stop now"
        if self._done == 0 and self._evaluates:
            self.line(f"stopping; nothing is learned yet; {again}")
            return
        where = "in this evaluation, which is made anew" if self._evaluates else "after this step"
        self.line(f"stopping {where}; the checkpoint will be in {self._checkpoints}; {again}")

    def line(self, text: str) -> None:
        """Adds a line; a bar that is on the terminal makes way for it."""
        self._bar.line(text)

    def end(self) -> None:
        """Takes the bar away, whatever happened."""
        self._bar.end()

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


def _scores(loss: float | None, accuracy: float | None) -> str:
    if loss is None or accuracy is None:
        return "nothing"
    return f"loss {loss:.4f}, {accuracy:.1%} of tokens right"
