"""A base's embedding and output head as adapters see them that change single tokens (lora/token_rows.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from loramux_adapters.lora.token_rows import Side
from loramux_server.kernels.layers.packed_embedding import PackedEmbedding
from loramux_server.kernels.layers.packed_head import PackedHead, head_shapes_of, rows_of


class ServedTokens:
    """`BaseTokens` of a model, for as long as its layers lie as they do now. Any thread may call it."""

    def __init__(
        self, model: Any, module_of: Callable[[str], str | None], weight_of: Callable[[Any], torch.Tensor]
    ) -> None:
        """
        Args:
            module_of: what an adapter calls a module -> its path in the model.
            weight_of: the weight [tokens, hidden] of a head that is no PackedHead.
        """
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        self._layers: dict[Side, Any] = {"embedding": embedding}
        if isinstance(head, nn.Linear):
            self._layers["head"] = head
        paths = {id(module): path for path, module in model.named_modules()}
        self.path_of = module_of
        self.paths: dict[Side, str] = {side: paths[id(layer)] for side, layer in self._layers.items()}
        self.tied = "head" in self._layers and head.weight is embedding.weight
        self.hidden = int(embedding.embedding_dim)
        self._weight_of = weight_of

    def size(self, side: Side) -> int:
        """Tokens that have a row."""
        if side == "embedding":
            return int(self._layers[side].num_embeddings)
        return int(self._layers[side].out_features) if side in self._layers else 0

    @torch.no_grad()
    def rows(self, side: Side, tokens: torch.Tensor) -> torch.Tensor:
        """tokens [n] int64 -> [n, hidden] fp32 in host memory, of an embedding without the model's factor."""
        layer = self._layers[side]
        tokens = tokens.to(layer.weight.device)
        return (embedding_rows(layer, tokens) if side == "embedding" else self._head_rows(layer, tokens)).cpu()

    def _head_rows(self, layer: Any, tokens: torch.Tensor) -> torch.Tensor:
        if isinstance(layer, PackedHead):
            return rows_of(layer.weight, layer.scales, tokens)
        return self._weight_of(layer)[tokens].float()

    @torch.no_grad()
    def served(self, side: Side, rows: torch.Tensor) -> torch.Tensor:
        """What rows [n, hidden] bf16 of a checkpoint would be as they are served, [n, hidden] fp32."""
        head = self._layers.get("head")
        packed = isinstance(self._layers[side], PackedHead | PackedEmbedding)
        if not packed or not isinstance(head, PackedHead):
            return rows.float()
        numbers, scales = (
            torch.empty(shape, dtype=dtype)
            for shape, dtype in zip(head_shapes_of(*rows.shape), (torch.uint8, torch.float32), strict=True)
        )
        PackedHead.fill(numbers, scales, rows.contiguous(), head.compiled, threads=1)
        return rows_of(numbers, scales, torch.arange(len(rows)))


def embedding_rows(layer: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Of a token embedding, without the model's factor: tokens [...] -> [..., hidden] fp32."""
    if isinstance(layer, PackedEmbedding):
        return rows_of(layer.weight, layer.scales, tokens)
    return functional.embedding(tokens, layer.weight).float()


def embedding_factor(layer: Any) -> float:
    """What a token embedding multiplies its rows with."""
    own = getattr(layer, "loramux_embedding", None)
    return float(getattr(layer, "embed_scale", 1.0) if own is None else own.factor)
