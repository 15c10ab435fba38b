"""What adapters have of their own for tokens, in a step on a card: rows of embeddings, and products for logits.

Such a step is launches, one after the other, and is read before the next is started. What of an adapter is multiplied
with lies on the device for as long as it has a slot; embeddings are few rows, which come with the step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from loramux_adapters.device.device import Device
from loramux_adapters.lora.token_rows import OwnLogits, StepTokens
from loramux_server.kernels.gpu.split_sums import scratch_numbers
from loramux_server.kernels.gpu.step.operations import Operations

ROWS_TOGETHER = 32  # of logits: for the product of so many with an adapter's rows there is memory for a moment


class OwnRowsOfStep:
    """Of one step. Owner: the engine thread."""

    def __init__(self, device: Device, own: StepTokens, samples: int) -> None:
        """`samples`: rows of logits of the step. Raises DeviceFull."""
        self._device, self._own = device, own
        own_rows = own.embedding_of >= 0
        own_rows[own.unknown] = True
        rows = np.flatnonzero(own_rows).astype(np.int32)
        self._count = len(rows)
        if self._count:
            hidden = own.embeddings.shape[1]
            more = np.zeros((len(rows), hidden), dtype=np.float32)
            which = own.embedding_of[rows]
            if hidden:
                more[which >= 0] = own.embeddings[which[which >= 0]]
            known = (~np.isin(rows, own.unknown)).astype(np.int32)
            self._at, self._known, self._more = (device.put(torch.from_numpy(part)) for part in (rows, known, more))
        self._wide = torch.full((samples, max(own.more, 1)), -torch.inf)

    @staticmethod
    def known(tokens: Sequence[int], own: StepTokens) -> list[int]:
        """The tokens with one that the base has in the place of each that it does not know."""
        found = list(tokens)
        for row in own.unknown.tolist():
            found[row] = 0
        return found

    def embed(
        self, of: Operations, x: torch.Tensor, tokens: torch.Tensor, embedding: torch.Tensor, factor: float
    ) -> None:
        """Changes x [rows, hidden] fp32, behind `Operations.embed`."""
        if not self._count:
            return
        more = self._more
        if not more.shape[1]:
            more = self._device.reserve((self._count, x.shape[1]), torch.float32)
        of.own_embeddings(self._device.launch, x, self._at, self._known, more, tokens, embedding, factor)

    def add(
        self,
        of: Operations,
        logits: torch.Tensor,
        n: torch.Tensor,
        row_tiles: tuple[int, ...],
        *,
        divisor: float,
        softcap: float,
    ) -> torch.Tensor:
        """The whole logits [samples, vocabulary + more] fp32 of n [samples, hidden], which the head has read.

        logits: [samples, vocabulary] fp32, as the head's product gave them; finished afterwards.
        """
        device = self._device
        wide = device.put(self._wide)
        for each in self._own.logits:
            self._add(of, logits, wide, n, each, row_tiles)
        options = {"divisor": divisor, "softcap": softcap}
        of.finish_logits(device.launch, logits, **options)
        if not self._own.more:
            return logits
        absent = wide == -torch.inf
        of.finish_logits(device.launch, wide, **options)
        return torch.cat([logits, wide.masked_fill(absent, -torch.inf)], 1)

    def _add(
        self,
        of: Operations,
        logits: torch.Tensor,
        wide: torch.Tensor,
        n: torch.Tensor,
        each: OwnLogits,
        row_tiles: tuple[int, ...],
    ) -> None:
        device, launch = self._device, self._device.launch
        weight = each.own.rows.to(n.dtype)
        tokens = each.own.places if each.own.places is not None else device.put(torch.from_numpy(each.own.tokens))
        at, factors = device.put(torch.from_numpy(each.at)), device.put(torch.from_numpy(each.scales))
        (count, hidden), most = weight.shape, min(len(at), ROWS_TOGETHER)
        x = device.scratch((most, hidden), n.dtype)
        products = device.scratch((most, count), torch.float32)
        sums = device.scratch((max(1, scratch_numbers(most, hidden, count)),), torch.float32)
        for first in range(0, len(at), most):
            some = slice(first, first + most)
            rows = at[some]
            of.gather_rows(launch, x[: len(rows)], n, rows)
            of.dense_product(launch, products[: len(rows)], x[: len(rows)], weight, sums, row_tiles=row_tiles)
            of.own_logits(launch, logits, wide, products[: len(rows)], tokens, rows, factors[some])
