"""A token embedding whose weight is the output head's: read from the numbers that the head multiplies with.

Semantics: embedding(t) = (number * scale) * factor in fp32. The compiled step (csrc/exact/decoder.h) reads the same.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from loramux_server.kernels.compiled.library import Compiled
from loramux_server.kernels.layers.packed_head import PackedHead, head_fits, rows_of

_TRIED = 8


@dataclass(frozen=True, slots=True)
class Widened:
    """Attribute `loramux_embedding` of a token embedding whose forward is ours: its numbers in fp32, times `factor`."""

    factor: float


class PackedEmbedding(nn.Embedding):
    """The embedding of a base whose head is packed and has the same weight. Frozen.

    Attributes:
        weight, scales: the head's own (packed_head.py).
    """

    scales: torch.Tensor

    def __init__(self, head: PackedHead, factor: float) -> None:
        nn.Module.__init__(self)  # nn.Embedding's own would make a weight
        self.num_embeddings, self.embedding_dim = head.out_features, head.in_features
        self.padding_idx = self.max_norm = None
        self.norm_type, self.scale_grad_by_freq, self.sparse = 2.0, False, False
        self.weight = head.weight
        self.register_buffer("scales", head.scales)
        self.loramux_embedding = Widened(factor)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Tokens [...] -> [..., embedding_dim] fp32."""
        rows = rows_of(self.weight, self.scales, input)
        factor = self.loramux_embedding.factor
        return rows if factor == 1.0 else rows * factor


def factor_of(embedding: Any) -> float | None:
    """What a token embedding in 16 bits multiplies its rows with; None where a trial shows that it does more."""
    if not isinstance(embedding, nn.Embedding) or embedding.weight.dtype not in (torch.bfloat16, torch.float16):
        return None
    if embedding.max_norm is not None:
        return None
    factor = float(getattr(embedding, "embed_scale", 1.0))
    rows = embedding.weight[:_TRIED].detach().float().cpu()
    tokens = torch.arange(len(rows))
    few = copy.copy(embedding)
    few.__dict__.update(padding_idx=None, _parameters={"weight": nn.Parameter(rows)})
    own = few(tokens)
    return factor if own.dtype == torch.float32 and torch.equal(rows * factor, own) else None


def widened(weight: torch.Tensor, factor: float, tokens: torch.Tensor) -> torch.Tensor:
    """Rows of an embedding in bf16 [vocabulary, dim] -> [..., dim] fp32."""
    rows = functional.embedding(tokens, weight).float()
    return rows if factor == 1.0 else rows * factor


def tied_embedding(model: Any) -> nn.Embedding | None:
    """The token embedding, if its weight is the output head's too."""
    head, embedding = (
        getattr(model, name, lambda: None)() for name in ("get_output_embeddings", "get_input_embeddings")
    )
    tied = isinstance(head, nn.Linear) and isinstance(embedding, nn.Embedding) and head.weight is embedding.weight
    return embedding if tied else None


@torch.no_grad()
def pack_head(model: Any, compiled: Compiled) -> None:
    """Puts a PackedHead in the place of the model's output head, where it fits, and has a tied embedding read it."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if not head_fits(head):
        return
    embedding = tied_embedding(model)
    factor = factor_of(embedding)
    packed = PackedHead.of(head, compiled)
    put(model, head, packed)
    if embedding is not None and factor is not None:
        put(model, embedding, PackedEmbedding(packed, factor))


def put(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Has a module of the model be another one."""
    model.set_submodule(next(path for path, module in model.named_modules() if module is old), new)
