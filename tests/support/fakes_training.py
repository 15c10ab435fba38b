"""A model small enough to train in milliseconds, with real tensors and real dropout, and an observer that remembers."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from loramux_adapters.training.data.batches import IGNORED, Row, TokenBatch
from loramux_adapters.training.model.model import StepLoss
from loramux_adapters.training.run.trace import EpochRecord, StepRecord
from loramux_adapters.training.run.trainer import Plan

VOCABULARY, RANK = 32, 4


class FakeModel:
    """Says the next token from the last one alone: logits = dropout(A[token]) B. Satisfies `Trainable`."""

    def __init__(self, *, seed: int = 0, dropout: float = 0.2) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.trainable = {
            "a": nn.Parameter(torch.randn(VOCABULARY, RANK, generator=generator)),
            "b": nn.Parameter(torch.zeros(RANK, VOCABULARY)),
        }
        self.dropout = dropout
        self.on_loss: Callable[[], None] = lambda: None
        self.losses: list[TokenBatch] = []
        self.evaluated: list[TokenBatch] = []

    def loss(self, batch: TokenBatch, *, grad_scale: float) -> StepLoss:
        self.on_loss()
        self.losses.append(batch)
        total, outcome = self._forward(batch, self.dropout)
        (total * grad_scale).backward()
        return outcome

    def evaluate(self, batch: TokenBatch) -> StepLoss:
        self.evaluated.append(batch)
        with torch.no_grad():
            return self._forward(batch, 0.0)[1]

    def _forward(self, batch: TokenBatch, dropout: float) -> tuple[torch.Tensor, StepLoss]:
        learned = batch.labels != IGNORED
        hidden = nn.functional.dropout(self.trainable["a"][batch.ids[learned]], dropout, training=dropout > 0)
        logits = hidden @ self.trainable["b"]
        labels = batch.labels[learned]
        total = nn.functional.cross_entropy(logits, labels, reduction="sum")
        right = int((logits.argmax(-1) == labels).sum())
        return total, StepLoss(float(total.detach()), len(labels), right)


class Remembering:
    """An observer that keeps what it is told, and may do something after a step."""

    def __init__(self, after_step: Callable[[StepRecord], None] = lambda record: None) -> None:
        self._after_step = after_step
        self.plans: list[Plan] = []
        self.steps: list[StepRecord] = []
        self.epochs: list[EpochRecord] = []
        self.evaluations: list[tuple[int, int]] = []
        self.checkpoints: list[str] = []

    def started(self, plan: Plan) -> None:
        self.plans.append(plan)

    def step(self, record: StepRecord) -> None:
        self.steps.append(record)
        self._after_step(record)

    def evaluating(self, done: int, total: int) -> None:
        self.evaluations.append((done, total))

    def epoch(self, record: EpochRecord) -> None:
        self.epochs.append(record)

    def saved(self, checkpoint: Path) -> None:
        self.checkpoints.append(checkpoint.name)


def counting_rows(count: int, *, seed: int = 0) -> list[Row]:
    """Rows that can be learned: each token is the one before plus one; of different lengths."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        start, length = draw.randrange(VOCABULARY), draw.randrange(4, 12)
        ids = tuple((start + offset) % VOCABULARY for offset in range(length))
        rows.append(Row(ids, tuple(index >= 2 for index in range(length))))
    return rows
