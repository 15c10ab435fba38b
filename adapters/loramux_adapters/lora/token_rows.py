"""What an adapter has of its own for tokens: rows of the embedding and of the output head, and LoRA on the embedding.

A saved embedding or head (modules_to_save), trained tokens (trainable_token_indices) and added tokens all come to one
form: for some tokens, how much the adapter's row is more than the base's, as the base is served. What is not changed is
not held. So of a row of token t that has the state x behind the last norm, with factor f,

    embedding(t) = (base(t) + f (own(t) - base(t) + A^T[t] B)) * the model's factor
    logit(t) = base head(t) . x + f (own head(t) - base head(t)) . x

in fp32; of a token that the base does not know, the base's part is zero. Differences are bf16, as A and B are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from loramux_adapters.device.device import Device

Side: TypeAlias = Literal["embedding", "head"]
SIDES: tuple[Side, ...] = ("embedding", "head")


class BaseTokens(Protocol):
    """The embedding and the output head of a base as they are served. Any thread may call it.

    Attributes:
        paths: of the modules; a base may have no head.
        tied: both have one weight.
        hidden: numbers of a row.
    """

    paths: dict[Side, str]
    tied: bool
    hidden: int

    def path_of(self, module: str) -> str | None:
        """The path of what an adapter calls `module`; None: it is of a part that is left out."""

    def size(self, side: Side) -> int:
        """Tokens that have a row."""

    def rows(self, side: Side, tokens: torch.Tensor) -> torch.Tensor:
        """tokens [n] int64 -> [n, hidden] fp32, of an embedding without the model's factor."""

    def served(self, side: Side, rows: torch.Tensor) -> torch.Tensor:
        """What rows [n, hidden] bf16 of a checkpoint would be as they are served, [n, hidden] fp32."""


class OwnRows(NamedTuple):
    """`tokens` [n] int32, ascending; `rows` [n, hidden] bf16: how much each is more than the base's.

    Where the rows lie on a device, `places` are the tokens there.
    """

    tokens: npt.NDArray[np.int32]
    rows: torch.Tensor
    places: torch.Tensor | None = None

    def on(self, device: Device) -> OwnRows:
        """Themselves where the device's memory is the host's. Raises DeviceFull."""
        if device.is_host:
            return self
        return OwnRows(self.tokens, device.put(self.rows), device.put(torch.from_numpy(self.tokens)))


@dataclass(frozen=True, slots=True, eq=False)
class TokenRows:
    """Of one adapter.

    Attributes:
        embedding, head: rows that are not the base's; None: there are none.
        a, b: LoRA on the embedding, [tokens, rank] and [rank, hidden] bf16, the scale in `b`; None: there is none.
        sizes, base_sizes: tokens that have a row of each side, here and in the base.
    """

    embedding: OwnRows | None
    head: OwnRows | None
    a: torch.Tensor | None
    b: torch.Tensor | None
    sizes: dict[Side, int]
    base_sizes: dict[Side, int]

    @property
    def nbytes(self) -> int:
        rows = [own.rows for own in (self.embedding, self.head) if own is not None]
        parts = [*rows, *(part for part in (self.a, self.b) if part is not None)]
        return sum(part.nbytes for part in parts) + sum(4 * len(part) for part in rows)

    @property
    def device_bytes(self) -> int:
        """Of them, those on a device with memory of its own."""
        return 0 if self.head is None or self.head.places is None else self.head.rows.nbytes + self.head.places.nbytes

    def on(self, device: Device) -> TokenRows:
        """With the rows of the head, which steps multiply with, on the device. Raises DeviceFull."""
        return self if self.head is None else replace(self, head=self.head.on(device))

    def embeddings(self, tokens: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float32]]:
        """(which of tokens [n] have an embedding of their own; what it has more than the base's, [n, hidden] fp32).

        One sum and one product after the other, which no processor and no company changes.
        """
        parts = [own.rows for own in (self.embedding,) if own is not None] + [b for b in (self.b,) if b is not None]
        changed = np.zeros(len(tokens), dtype=np.bool_)
        more = np.zeros((len(tokens), parts[0].shape[1] if parts else 0), dtype=np.float32)
        if self.embedding is not None:
            own = self.embedding
            places = np.minimum(np.searchsorted(own.tokens, tokens), len(own.tokens) - 1)
            changed = own.tokens[places] == tokens
            more[changed] = own.rows[torch.from_numpy(places[changed])].float().numpy()
        if self.a is not None and self.b is not None:
            known = tokens < len(self.a)
            changed |= known
            left = self.a[torch.from_numpy(tokens[known])].float().numpy()
            total = np.zeros((len(left), more.shape[1]), dtype=np.float32)
            for each, right in zip(left.T, self.b.float().numpy(), strict=True):
                total += each[:, None] * right
            more[known] += total
        return changed, more


class TokenUse(NamedTuple):
    """An adapter of a sequence that has rows of its own."""

    version: str
    own: TokenRows
    scale: float


class OwnLogits(NamedTuple):
    """One adapter's rows of the head, `at` [uses] int32 rows of logits with `scales` [uses] fp32."""

    own: OwnRows
    at: npt.NDArray[np.int32]
    scales: npt.NDArray[np.float32]


class Run(NamedTuple):
    """Rows of one sequence in a step: its adapters, its tokens, and how many of its last rows have logits."""

    uses: tuple[TokenUse, ...]
    tokens: Sequence[int]
    num_logits: int


@dataclass(frozen=True, slots=True, eq=False)
class StepTokens:
    """What adapters change of the tokens of one step.

    Attributes:
        unknown: rows whose token the base does not know.
        embedding_of: [rows] int32, which of `embeddings` is added to the base's, -1: none.
        embeddings: [some, hidden] fp32.
        logits: in the order in which they are added.
        more: logits behind those of the base.
    """

    unknown: npt.NDArray[np.int64]
    embedding_of: npt.NDArray[np.int32]
    embeddings: npt.NDArray[np.float32]
    logits: tuple[OwnLogits, ...]
    more: int

    @classmethod
    def build(cls, runs: Sequence[Run]) -> StepTokens | None:
        """None: no adapter of these rows has rows of its own."""
        if not any(run.uses for run in runs):
            return None
        unknown: list[int] = []
        embedding_of = np.full(sum(len(run.tokens) for run in runs), -1, dtype=np.int32)
        added: list[npt.NDArray[np.float32]] = []
        heads: dict[str, tuple[OwnRows, list[tuple[int, float]]]] = {}
        row = head = count = more = 0
        for run in runs:
            if run.uses:
                tokens = np.array(run.tokens, dtype=np.int64)
                known = run.uses[0].own.base_sizes["embedding"]
                unknown += (row + np.flatnonzero(tokens >= known)).tolist()
                changed, total = _embeddings_of(run.uses, tokens)
                which = np.flatnonzero(changed)
                embedding_of[row + which] = np.arange(count, count + len(which))
                added.append(total[which])
                count += len(which)
            for version, own, scale in run.uses if run.num_logits else ():
                more = max(more, own.sizes["head"] - own.base_sizes["head"])
                if own.head is not None:
                    places = heads.setdefault(version, (own.head, []))[1]
                    places += [(at, scale) for at in range(head, head + run.num_logits)]
            row += len(run.tokens)
            head += run.num_logits
        logits = tuple(
            OwnLogits(own, np.array([at for at, _ in uses], np.int32), np.array([s for _, s in uses], np.float32))
            for _, (own, uses) in sorted(heads.items(), key=lambda item: item[0])
        )
        filled = [part for part in added if part.size]
        embeddings = np.concatenate(filled) if filled else np.zeros((0, 0), np.float32)
        return cls(np.array(unknown, dtype=np.int64), embedding_of, embeddings, logits, more)


def _embeddings_of(
    uses: tuple[TokenUse, ...], tokens: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float32]]:
    """As `TokenRows.embeddings`, of all adapters of a sequence together."""
    changed = np.zeros(len(tokens), dtype=np.bool_)
    total = np.zeros((len(tokens), 0), dtype=np.float32)
    for _, own, scale in uses:
        its, more = own.embeddings(tokens)
        if its.any():
            scaled = more if scale == 1.0 else more * np.float32(scale)
            total = scaled if not total.size else total + scaled
            changed |= its
    return changed, total


def add_token_logits_reference(y: torch.Tensor, wide: torch.Tensor, x: torch.Tensor, own: OwnLogits) -> None:
    """The slow reference: y [rows, vocabulary], wide [rows, more] += products with x [rows, hidden] fp32, in place.

    In `wide` minus infinity means that there is no logit yet.
    """
    vocabulary = y.shape[1]
    rows, tokens = own.own.rows.float(), torch.from_numpy(own.own.tokens).long().to(y.device)
    known = tokens < vocabulary
    for at, scale in zip(own.at.tolist(), own.scales.tolist(), strict=True):
        products = (rows @ x[at].float() * scale).to(y.dtype)
        y[at, tokens[known]] += products[known]
        beyond = tokens[~known] - vocabulary
        before = wide[at, beyond]
        wide[at, beyond] = torch.where(before == -torch.inf, 0.0, before) + products[~known]
