"""What training computes besides the products with the base's weights, as somebody hands it in for a device.

Without it, PyTorch's own operations do the work. What is not said to be of 16 bits is fp32; a row is computed alone.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch

from loramux_adapters.training.model.row_layout import LayerAttention, PackedRows

Saved = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class TrainingOps(Protocol):
    """Forward and backward of what stands between the layers; every sum in a fixed order.

    Attributes:
        kept: what products with the base's weights read is rounded to it, and kept in it for the backward pass: fp32,
            or 16 bits where the tensor cores of a graphics processor multiply these. A gate, too.
        adapters: A and scale * B are rounded to it in the forward pass, as they are when they are served; what is
            trained stays fp32. fp32 leaves them as they are.
    """

    kept: torch.dtype
    adapters: torch.dtype

    def matmul(self, a: torch.Tensor, b: torch.Tensor, add_to: torch.Tensor | None = None) -> torch.Tensor:
        """a [rows, depth] @ b [depth, columns] in fp32, with any strides; `add_to` is changed in place and returned.

        One of the two may be of dtype `kept`.
        """

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """weight * x / sqrt(mean(x^2) + eps) over the last dimension, a multiple of 16."""

    def norm_gradient(self, dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """dx of `norm`."""

    def activation(self, x: torch.Tensor, *, gelu: bool) -> torch.Tensor:
        """SiLU, or GELU by tanh."""

    def activation_gradient(self, dy: torch.Tensor, x: torch.Tensor, *, gelu: bool) -> torch.Tensor:
        """dx of `activation`."""

    def gated(self, gate: torch.Tensor, up: torch.Tensor, *, gelu: bool) -> torch.Tensor:
        """activation(gate) * up, both [..., width] of dtype `kept`, with a width that is a multiple of 16."""

    def gated_gradient(
        self, dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, *, gelu: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """d_gate and d_up of `gated`."""

    def token_losses(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        vocabulary: int,
        *,
        factor: float,
        softcap: float,
        gradient: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """-ln softmax(z)[label] of z = softcap(factor * logits), in one pass.

        Args:
            logits: [rows, at least vocabulary], changed in place: with `gradient` they become the losses' gradients
                with respect to them, zeros beyond the vocabulary; without it they are scratch.
            labels: [rows] int64, below `vocabulary`.
        Returns: losses [rows] fp64; [rows] bool, whether the label's logit is the first of the largest.
        """


@runtime_checkable
class Attends(Protocol):
    """Operations with an attention and its gradient."""

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        rows: torch.Tensor,
        *,
        scaling: float,
        softcap: float,
        window: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """packed_attention.py's semantics; contiguous, head dimension a multiple of 16.

        Args:
            q: [tokens, heads, dim].
            k, v: [tokens, kv_heads, dim].
            rows: [3, rows] int64, `PackedRows.spans`.
        Returns: [tokens, heads, dim]; what the gradient needs of it, [tokens, heads, 2].
        """

    def attend_gradient(
        self, d_out: torch.Tensor, saved: Saved, rows: torch.Tensor, *, scaling: float, softcap: float, window: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """d_q, d_k, d_v of `attend`; `saved` is q, k, v and what it returned."""


@runtime_checkable
class AttendsRows(Protocol):
    """Operations whose attention is differentiable by itself."""

    def attend_rows(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: PackedRows, params: LayerAttention
    ) -> torch.Tensor:
        """packed_attention.py's semantics: q [tokens, heads, dim], k and v [tokens, kv_heads, dim] -> as q; fp32."""
