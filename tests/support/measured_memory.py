"""What a training step really keeps in memory, counted tensor by tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from loramux_adapters.training.data.batches import Row, TokenBatch
from loramux_adapters.training.model.model import LoraModel


def different_rows(rows: int, length: int, *, learned: int, vocabulary: int) -> TokenBatch:
    """Rows that have nothing in common, so that nothing is computed once for several."""
    generator = torch.Generator().manual_seed(0)
    learn = (*[False] * (length - learned), *[True] * learned)
    drawn = torch.randint(0, vocabulary, (rows, length), generator=generator).tolist()
    return TokenBatch.of([Row((row, *ids[1:]), learn) for row, ids in enumerate(drawn)])


def saved_by_a_step(model: LoraModel, base: nn.Module, batch: TokenBatch) -> int:
    """Bytes that a forward pass keeps for its backward pass, the weights themselves left out."""
    weights = {p.untyped_storage().data_ptr() for p in [*base.parameters(), *base.buffers()]}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.loss(batch, grad_scale=1.0)
    return sum(kept.values())


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the state."""
    states: Any = optimizer.state.values()
    return sum(value.nbytes for state in states for value in state.values() if isinstance(value, torch.Tensor))
