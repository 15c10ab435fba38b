"""How a set of kernels keeps the NF4 layers of a base, and how each is laid out so, one at a time, as it is loaded.

A layer comes as its 16-bit weight, which is quantized with the numbers of `loramux_adapters.nf4`, or as the codes and
scales of a checkpoint that was quantized before, which are kept as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import nn

from loramux_adapters import nf4
from loramux_adapters.device.upload import Upload
from loramux_server.kernels.compiled.library import Compiled
from loramux_server.kernels.layers.nf4_linear import (
    NF4Linear,
    codes_shape,
    scales_shape,
    shape_fits,
    tiles,
    unpacked,
)
from loramux_server.kernels.layers.nf4_quantizer import quantize_into

Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]
WEIGHT, SCALES = "weight", "scales"  # what a layout keeps of a layer, or of several together


@dataclass(frozen=True, slots=True)
class Nf4Numbers:
    """A weight [out, in] that is quantized already, in blocks of 64 inputs; in host memory.

    Attributes:
        pairs: [out, in / 2] uint8: two codes in a byte, the first in its high half, as bitsandbytes packs them.
        scales: [out, in / 64] fp32, double quantization undone.
    """

    pairs: torch.Tensor
    scales: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.pairs.shape[0], 2 * self.pairs.shape[1]

    def codes(self) -> torch.Tensor:
        """[out, in] uint8, in NF4's own order; a copy."""
        return unpacked(self.pairs, *self.shape)

    def dequantized(self) -> torch.Tensor:
        """[out, in] fp32; a copy."""
        return nf4.dequantize(self.codes(), self.scales)


class Nf4Layout(Protocol):
    """See the module's text.

    Attributes:
        folder: of the cache, for files of tensors that are laid out so.
        form: goes up whenever the same checkpoint would give other bytes.
        compiled: the compiled code that reads the output head too, as whole numbers; None: it is kept as it is.
    """

    @property
    def folder(self) -> str: ...

    @property
    def form(self) -> int: ...

    @property
    def compiled(self) -> Compiled | None: ...

    def fits(self, layer: nn.Linear) -> bool:
        """Whether a layer of this shape can be kept so."""

    def together(self, layers: Mapping[str, nn.Linear]) -> list[tuple[str, ...]]:
        """Which of these layers (path -> layer) lie in the same tensors, their outputs side by side: all paths, in
        order."""

    def shapes(self, layers: Sequence[nn.Linear]) -> Shapes:
        """Of WEIGHT and SCALES, for layers that lie together."""

    def fill(
        self,
        held: Mapping[str, torch.Tensor],
        first: int,
        source: torch.Tensor | Nf4Numbers,
        upload: Upload,
    ) -> None:
        """Lays one layer out into tensors of `shapes`, whose outputs begin at `first` there.

        Args:
            source: its weight [out, in] of any float dtype, rounded to bf16 and quantized; or codes and scales. In host
                memory, and not needed any more when this returns.
            upload: to where `held` lies.
        Raises:
            DeviceFull: there is no room to work in.
        """

    def layer(
        self, held: Mapping[str, torch.Tensor], first: int, layer: nn.Linear, bias: torch.Tensor | None
    ) -> nn.Linear:
        """What computes with it, in the place of `layer`; the tensors are held as they are."""


@dataclass(frozen=True, slots=True)
class CompiledLayout:
    """For the compiled CPU kernels (nf4_linear.py); every layer lies alone."""

    compiled: Compiled
    folder: ClassVar[str] = "packed"
    form: ClassVar[int] = 3

    def fits(self, layer: nn.Linear) -> bool:
        return shape_fits(layer)

    def together(self, layers: Mapping[str, nn.Linear]) -> list[tuple[str, ...]]:
        return [(path,) for path in layers]

    def shapes(self, layers: Sequence[nn.Linear]) -> Shapes:
        (layer,) = layers
        return {WEIGHT: (torch.uint8, codes_shape(layer)), SCALES: (torch.float32, scales_shape(layer))}

    def fill(
        self,
        held: Mapping[str, torch.Tensor],
        first: int,
        source: torch.Tensor | Nf4Numbers,
        upload: Upload,
    ) -> None:
        assert first == 0
        if isinstance(source, Nf4Numbers):
            held[WEIGHT].copy_(tiles(source.codes()))
            held[SCALES].copy_(source.scales.t())
        else:
            quantize_into(held[WEIGHT], held[SCALES], source.to(torch.bfloat16), self.compiled)

    def layer(
        self, held: Mapping[str, torch.Tensor], first: int, layer: nn.Linear, bias: torch.Tensor | None
    ) -> nn.Linear:
        return NF4Linear(held[WEIGHT], held[SCALES], bias, self.compiled)
