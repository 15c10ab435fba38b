"""What a whole step of a decoder is to those who run it, whatever device it runs on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from loramux_adapters.lora.ops import LoraRows
from loramux_adapters.lora.token_rows import StepTokens
from loramux_server.kernels.attention.paged_attention import AttentionStep
from loramux_server.kernels.compiled.logit_changes import RowChange
from loramux_server.kernels.decoder.asks import Answers, Ask, ChangedAsk
from loramux_server.kernels.decoder.description import Description


@dataclass(frozen=True, slots=True)
class StepLimits:
    """The largest step that is asked for: what memory is taken by beforehand where that is done.

    Attributes:
        rows: token rows.
        samples: of them, whose logits are wanted.
        sequences: that they belong to.
        blocks: of the KV cache, of one sequence.
        adapters: of one row.
        ranks: rows of the adapters' memory that those of one row hold together.
        graph_bytes: of a device, that graphs of steps may take.
    """

    rows: int
    samples: int
    sequences: int
    blocks: int
    adapters: int
    ranks: int
    graph_bytes: int = 0


class WholeStep(Protocol):
    """Runs steps of one model. Owner: the engine thread.

    Attributes:
        description: the model.
        in_words: how it runs, for people.
        notes: what people should know of how it runs here, a line each.
        equal_bits: nothing is known by which a row would have other bits alone than in company.
    """

    description: Description
    in_words: str
    notes: tuple[str, ...]
    equal_bits: bool

    @property
    def replaced(self) -> tuple[str, ...]:
        """Operations that a library computes here, since our kernels for them were found to be wrong."""

    def forward(
        self,
        tokens: Sequence[int],
        heads: Sequence[int],
        step: AttentionStep,
        lora: LoraRows | None,
        head: LoraRows | None,
        *,
        states: int = 0,
        own: StepTokens | None = None,
    ) -> torch.Tensor:
        """Logits [len(heads) - states, vocabulary] fp32, a view; keys and values of all rows are in the cache
        afterwards.

        Args:
            tokens: the token of each row.
            heads: the rows, in order, whose logits are wanted.
            step: its tables in host memory, wherever the cache lies.
            lora, head: adapters of all rows, and of the rows in `heads`.
            states: of so many of the last rows in `heads` no logits are wanted, but what the output head would read.
            own: what adapters change of embeddings and of logits, whose places are among rows with logits; then rows
                are as much longer as it says, by minus infinity where a row has no such tokens. A card takes none.
        """

    def states(self, count: int) -> torch.Tensor:
        """[count, hidden] fp32 on the host: what the output head would read of the last `count` rows of the step that
        ran last, whose `states` were as many.
        """


@runtime_checkable
class ChoosingStep(WholeStep, Protocol):
    """One that chooses tokens on its device, so that the next may be started before its answers are read.

    Attributes:
        chooses: it does, for this model.
        most_asks: of one step.
    """

    chooses: bool
    most_asks: int

    def start(
        self,
        tokens: Sequence[int],
        heads: Sequence[int],
        step: AttentionStep,
        lora: LoraRows | None,
        head: LoraRows | None,
        asks: Sequence[Ask],
        changed: Callable[[], Sequence[ChangedAsk]] | None = None,
    ) -> Answers:
        """As `forward`, but it answers `asks`, whose rows count in `heads`, and nobody waits.

        Args:
            tokens: a negative one, -(1 + i), stands for what ask i of the step before chose.
            changed: tells which asks choose from changed logits, each ask once at most. It is called when the step
                itself is under way, so that the device computes while it waits.
        """

    def answer(self, logits: torch.Tensor, asks: Sequence[Ask]) -> npt.NDArray[np.void]:
        """[asks] of `asks.ANSWER` to at most `most_asks`, about logits that `forward` gave; waits for it.

        The answers are those of `start`, bit for bit.
        """

    def changed(self, logits: torch.Tensor, changes: Sequence[RowChange]) -> torch.Tensor:
        """[changes, vocabulary] fp32: up to MOST_CHANGES rows of what `forward` gave, as tokens are chosen from them.

        They lie where the logits do, and are there until the next call; `answer` tells of them too.
        """
