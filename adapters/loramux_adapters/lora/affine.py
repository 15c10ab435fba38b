"""What an adapter does to a linear layer's own output: gain and shift, made of its vectors and the base it runs on.

Of a layer that gives y = W x + b, an adapter may have, beside A and B with their scale:

    DoRA            a magnitude m (arXiv 2402.09353): W x + scale B A x times s = m / |W + scale B A|, the norm of each
                    output's weights, as one number for each output; b is not scaled
    lora_bias       a bias of B, which counts scale times
    bias            a bias of the base's that was trained, and takes the place of b
    scale           a factor l of all that the layer gives, y becoming l y (arXiv 2205.05638)

So y changes by (s - 1) (y - b) + (scale s) B A x + scale b_B + (b' - b). All of it that is no product with x is

    gain * y + shift,   gain = s - 1 (or l - 1),   shift = scale b_B + (b' - b) - gain * b

and s is put into B. The norm is taken of the weights as they are served, once, when an adapter is read; gain and shift
are fp32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from loramux_adapters.artifact.format import VectorKind
from loramux_adapters.lora.token_rows import BaseTokens


class BaseWeights(Protocol):
    """The base's linear layers as they are served. Any thread may call it.

    Attributes:
        tokens: its embedding and its output head; None: adapters cannot change them.
        vectors: slots have room for gain and shift, so that adapters may have some.
    """

    @property
    def tokens(self) -> BaseTokens | None: ...

    @property
    def vectors(self) -> bool: ...

    def __contains__(self, module: object) -> bool:
        """Whether the base has a linear layer at this path."""

    def norms(self, module: str, a: torch.Tensor, bt: torch.Tensor) -> torch.Tensor:
        """[out] fp32: of each output, the norm of its row of W + (a.T @ bt).T; a [rank, in], bt [rank, out] fp32."""

    def bias(self, module: str) -> torch.Tensor | None:
        """[out] fp32; None: the layer has none."""


def magnitude_scale(
    weights: BaseWeights, module: str, magnitude: torch.Tensor, a: torch.Tensor, bt: torch.Tensor
) -> torch.Tensor:
    """s [out] fp32 of DoRA. magnitude [out] fp32, a [rank, in], bt [rank, out] fp32 with the scale in it."""
    return magnitude / weights.norms(module, a, bt)


def affine_of(
    vectors: Mapping[VectorKind, torch.Tensor], own: torch.Tensor | None, *, scale: float, s: torch.Tensor | None
) -> torch.Tensor | None:
    """Gain and shift [2, out] fp32; None where both are zeros.

    Args:
        vectors: of the module, each [out] fp32.
        own: the layer's bias; None: it has none.
        scale: of B.
        s: of DoRA, where the module has a magnitude.
    """
    size = next(iter(vectors.values())).shape
    gain = torch.zeros(size) if s is None else s - 1
    if "scale" in vectors:
        gain += vectors["scale"] - 1
    shift = torch.zeros(size)
    if "lora_bias" in vectors:
        shift += vectors["lora_bias"] * scale
    if "bias" in vectors:
        shift += vectors["bias"] if own is None else vectors["bias"] - own
    if own is not None and s is not None:
        shift -= gain * own
    affine = torch.stack([gain, shift])
    return affine if affine.any() else None
