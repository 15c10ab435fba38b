"""How an adapter is trained: everything that decides its bits besides base and data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loramux_adapters.errors import RecipeError

QUANTIZATIONS = ("nf4", "none")
INITS = ("default", "loftq")
SCHEDULES = ("cosine", "linear", "constant")
BATCHINGS = ("length", "shuffle")
SAVED_DTYPES = ("bfloat16", "float32")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One training recipe; checked when made, never changed. Raises RecipeError.

    Attributes:
        rank: LoRA rank r.
        alpha: LoRA alpha; the delta is scaled by alpha/r, with rslora by alpha/sqrt(r).
        dropout: share of the adapters' inputs that is zeroed in training.
        rslora: rank-stabilised scaling (arXiv 2312.03732).
        target_modules: last path components of the linear layers that get an adapter; empty means all but the head.
        init: "default" (B zero) or "loftq" (arXiv 2310.08659; A and B start at what NF4 lost, the base is unchanged).
        quantize: "nf4", or "none" for plain LoRA on the 16-bit base.
        learning_rate: peak of the schedule.
        schedule: shape after the warm-up.
        warmup: share of all steps in which the rate rises linearly.
        weight_decay: AdamW's.
        epochs: passes over the data; used unless max_steps is positive.
        max_steps: optimizer steps; 0 means as many as `epochs` takes.
        batch_size: examples of one optimizer step.
        accumulation: parts that a step's batch is computed in, to save memory; gradients are those of the whole batch.
        max_length: tokens of an example; a longer one is truncated and counted.
        max_grad_norm: gradients are clipped to this norm.
        gradient_checkpointing: compute each layer twice instead of keeping its activations.
        batching: "length" puts examples of similar length into a batch, in random order; "shuffle" does not look.
        seed: of initialisation, order and dropout.
        save_dtype: of the adapter's tensors on disk.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    rslora: bool = False
    target_modules: tuple[str, ...] = ()
    init: str = "default"
    quantize: str = "nf4"
    learning_rate: float = 5e-4
    schedule: str = "cosine"
    warmup: float = 0.05
    weight_decay: float = 0.0
    epochs: float = 1.0
    max_steps: int = 0
    batch_size: int = 16
    accumulation: int = 1
    max_length: int = 512
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = False
    batching: str = "length"
    seed: int = 0
    save_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        def need(holds: bool, what: str) -> None:
            if not holds:
                raise RecipeError(what)

        need(1 <= self.rank <= 1024, f"rank must be from 1 to 1024, got {self.rank}")
        need(self.alpha > 0, f"alpha must be positive, got {self.alpha}")
        need(0 <= self.dropout < 1, f"dropout must be at least 0 and below 1, got {self.dropout}")
        need(self.init in INITS, _choice("init", self.init, INITS))
        need(self.quantize in QUANTIZATIONS, _choice("quantize", self.quantize, QUANTIZATIONS))
        need(self.schedule in SCHEDULES, _choice("schedule", self.schedule, SCHEDULES))
        need(self.batching in BATCHINGS, _choice("batching", self.batching, BATCHINGS))
        need(self.save_dtype in SAVED_DTYPES, _choice("save_dtype", self.save_dtype, SAVED_DTYPES))
        need(0 < self.learning_rate < 1, f"learning_rate must be between 0 and 1, got {self.learning_rate}")
        need(0 <= self.warmup < 1, f"warmup is a share of all steps, from 0 to below 1, got {self.warmup}")
        need(self.weight_decay >= 0, f"weight_decay must not be negative, got {self.weight_decay}")
        need(self.epochs > 0, f"epochs must be positive, got {self.epochs}")
        need(self.max_steps >= 0, f"max_steps must not be negative, got {self.max_steps}")
        need(self.batch_size >= 1, f"batch_size must be at least 1, got {self.batch_size}")
        need(
            1 <= self.accumulation <= self.batch_size,
            f"accumulation must be from 1 to batch_size ({self.batch_size}), got {self.accumulation}",
        )
        need(self.max_length >= 8, f"max_length must be at least 8 tokens, got {self.max_length}")
        need(self.max_grad_norm > 0, f"max_grad_norm must be positive, got {self.max_grad_norm}")
        need(
            self.init == "default" or self.quantize == "nf4",
            "init loftq makes up for what NF4 lost; with quantize none nothing is lost, use init default",
        )

    @property
    def scale(self) -> float:
        """What the delta B A is multiplied by."""
        return float(self.alpha / (self.rank**0.5 if self.rslora else self.rank))

    def as_json(self) -> dict[str, Any]:
        """Plain data, for the card and for checkpoints."""
        return dataclasses.asdict(self) | {"target_modules": list(self.target_modules)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Recipe:
        """The inverse of `as_json`. Raises RecipeError for an unknown or missing field."""
        names = {field.name for field in dataclasses.fields(cls)}
        if set(data) != names:
            raise RecipeError(f"not a recipe of this version: {', '.join(sorted(set(data) ^ names))}")
        return cls(**(dict(data) | {"target_modules": tuple(data["target_modules"])}))


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> str:
    hint = "; pissa changes the base, which all adapters share" if value == "pissa" else ""
    return f"{name} must be one of {', '.join(allowed)}, got {value!r}{hint}"
