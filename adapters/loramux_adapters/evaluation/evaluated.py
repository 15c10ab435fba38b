"""What an evaluation found, as plain data: predictors with their scores, differences, and remarks on them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from enum import Enum
from typing import Any

from loramux_adapters.evaluation.bootstrap import LEVEL, RESAMPLES, SEED, Difference
from loramux_adapters.evaluation.scores import LabelScores, TextScores

FORMAT = 1


class Role(Enum):
    """What a predictor is there for."""

    ADAPTER = "adapter"  # the one that is judged
    BASE = "base"  # without any adapter
    MAJORITY = "majority"  # always the commonest label
    REFERENCE = "reference"  # an adapter trained in 16 bit, on the 16-bit base
    OTHER = "other"  # a further adapter


class Level(Enum):
    """How a remark is meant."""

    GOOD = "good"
    NOTE = "note"
    WARNING = "warning"
    BAD = "bad"


@dataclass(frozen=True, slots=True)
class Remark:
    level: Level
    text: str


@dataclass(frozen=True, slots=True)
class Predictor:
    """Whoever answered the held-out examples.

    Attributes:
        by_logprob: of the label that its answer's log probability is highest for.
        by_generation: of its greedy answers; one that is no label counts as none of them.
        text: of the right answers' tokens.
    """

    name: str
    role: Role
    by_logprob: LabelScores | None = None
    by_generation: LabelScores | None = None
    text: TextScores | None = None

    @property
    def labelled(self) -> LabelScores | None:
        """By log probability where that can be had, else by generation: what predictors are compared by."""
        return self.by_logprob or self.by_generation


@dataclass(frozen=True, slots=True)
class ScoreComparison:
    """The judged adapter minus another predictor, on the same examples.

    Attributes:
        score: "F1 of spam", "accuracy", "macro F1" as shares; "loss" in nats per token.
    """

    other: str
    role: Role
    score: str
    difference: Difference


@dataclass(frozen=True, slots=True)
class Fidelity:
    """How far the judged adapter's numbers are, as they are served, from fp32 arithmetic on the same weights.

    Attributes:
        examples: whose answers were scored in both ways.
        tokens: of those answers.
        mean, max: absolute difference of the tokens' log probabilities, in nats.
        unlike: tokens that are the likeliest in one of the two ways alone.
    """

    examples: int
    tokens: int
    mean: float
    max: float
    unlike: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One adapter on one set of held-out examples, beside everything it is measured against.

    Attributes:
        data: name of the held-out file.
        labels: empty where answers are free text.
        predictors: the judged adapter first.
        gap: training examples' score minus that of held-out ones (of loss: held-out minus training, in nats).
        train_examples: that `gap` was taken on.
        fidelity: None where it was not asked for, or cannot be had.
        from_gguf: the base's 16-bit weights were themselves dequantized.
        notes: what a reader must know of how this was done.
        seconds: the whole of it took.
    """

    data: str
    data_sha256: str
    examples: int
    labels: tuple[str, ...]
    base: str
    base_id: str
    quantize: str
    from_gguf: bool
    numerics_id: str
    predictors: tuple[Predictor, ...]
    comparisons: tuple[ScoreComparison, ...] = ()
    gap: Difference | None = None
    train_examples: int = 0
    fidelity: Fidelity | None = None
    notes: tuple[str, ...] = ()
    remarks: tuple[Remark, ...] = ()
    seconds: float = 0.0

    @property
    def adapter(self) -> Predictor:
        """The one that is judged."""
        return self.predictors[0]

    def find(self, role: Role) -> Predictor | None:
        return next((predictor for predictor in self.predictors if predictor.role is role), None)

    def compared(self, role: Role, score: str | None = None) -> ScoreComparison | None:
        """The comparison with a predictor of this role, by the headline unless another score is named."""
        found = (comparison for comparison in self.comparisons if comparison.role is role)
        return next((comparison for comparison in found if score in (None, comparison.score)), None)

    def as_json(self) -> dict[str, Any]:
        """Plain data; what is not defined is null."""
        bootstrap = {"level": LEVEL, "resamples": RESAMPLES, "seed": SEED}
        plain = _plain(dataclasses.asdict(self))
        return {"format": FORMAT, "bootstrap": bootstrap, **plain}

    def card_scores(self) -> dict[str, Any]:
        """What an adapter's card says of this."""
        kept = ("data_sha256", "examples", "labels", "numerics_id", "predictors", "comparisons", "gap", "remarks")
        whole = self.as_json()
        return {name: whole[name] for name in kept}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
