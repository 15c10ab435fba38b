"""A base's linear layers as adapters see them that change more than a product with A and B (lora/affine.py).

The norm of a changed row is put together of what does not depend on the adapter and a product of few rows, so no weight
is unpacked: with A [rank, in] and B [out, rank]

    |w + b A|^2 = |w|^2 + b (2 A w + A A^T b)

The compiled kernels' products, and sums in a fixed order, give it the same bits on every processor. A layer that they
have not laid out is dequantized instead, some outputs at a time: on a card there, beside the steps.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from loramux_adapters import nf4
from loramux_adapters.artifact.reading.strict_json import quoted
from loramux_adapters.device.device import Device, WorkStream
from loramux_adapters.errors import AdapterRejected, DeviceFull
from loramux_server.kernels.compiled.abi import FloatMatrix
from loramux_server.kernels.compiled.library import Compiled
from loramux_server.kernels.layers.nf4_linear import NF4Linear, scales_of, unpacked
from loramux_server.kernels.layers.packed_head import PackedHead
from loramux_server.kernels.layers.served_tokens import ServedTokens

_TOGETHER = 1024  # outputs of a layer that is dequantized
_ON_DEVICE = 1 << 20  # numbers that are dequantized there at a time: 4 MiB, and some times as much for a moment


@runtime_checkable
class UnpacksThere(Protocol):
    """A layer whose weight lies on a card as that card's kernels read it."""

    in_features: int
    out_features: int

    def dense_rows(self, first: int, last: int) -> torch.Tensor:
        """Weights of the outputs from `first` to `last` [last - first, in] fp32, on the card."""


class ServedWeights:
    """`BaseWeights` of a model, for as long as its layers lie as they do now.

    Any thread may call it. Products on the host run on the thread that asks: others are the engine's. Those on a card
    run on a stream of their own, one call at a time, and wait for no step.

    Attributes:
        tokens: its embedding and its output head; None: adapters cannot change them.
        vectors: slots have room for gain and shift.
    """

    def __init__(
        self,
        model: nn.Module,
        weight_of: Callable[[Any], torch.Tensor] | None = None,
        *,
        module_of: Callable[[str], str | None] = lambda path: path,
        device: Device | None = None,
        vectors: bool = True,
    ) -> None:
        """
        Args:
            weight_of: what a layer that no compiled kernel has laid out stands for, [out, in]; None: as it is.
            module_of: what an adapter calls a module -> its path in the model; None: it is of a part that is left out.
            device: where the model lies; None: in host memory.
            vectors: slots have room for gain and shift.
        """
        self.vectors = vectors
        self._device = device
        self._entry = threading.Lock()
        self._weight_of = weight_of or _dense_weight
        self._module_of = module_of
        self._layers = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
        has_tokens = getattr(model, "get_input_embeddings", lambda: None)() is not None
        self.tokens = ServedTokens(model, module_of, self._weight_of) if has_tokens else None
        self._squares: dict[str, torch.Tensor] = {}  # [out] fp64, of each layer that was asked for

    def __contains__(self, module: object) -> bool:
        return isinstance(module, str) and self._module_of(module) in self._layers

    def bias(self, module: str) -> torch.Tensor | None:
        """[out] fp32; None: the layer has none."""
        bias = self._layer(module).bias
        return None if bias is None else bias.detach().float().cpu()

    def _layer(self, module: str) -> Any:
        """Raises AdapterRejected: it is no linear layer here."""
        layer = self._layers.get(self._module_of(module) or "")
        if layer is None:
            raise AdapterRejected([f"module {quoted(module)} is no linear layer of what is served of the base"])
        return layer

    @torch.no_grad()
    def norms(self, module: str, a: torch.Tensor, bt: torch.Tensor) -> torch.Tensor:
        """[out] fp32: of each output, the norm of its row of W + (a.T @ bt).T; a [rank, in], bt [rank, out] fp32."""
        layer = self._layer(module)
        if isinstance(layer, UnpacksThere):
            return self._norms_there(layer, a, bt)
        if not isinstance(layer, NF4Linear | PackedHead):
            return dense_norms(self._weight_of(layer), a, bt)
        if (squares := self._squares.get(module)) is None:
            squares = self._squares[module] = layer.squares()
        crossed = layer.product(a, threads=1)[:, : layer.out_features]
        own = _matmul(layer.compiled, _matmul(layer.compiled, a, a.t()), bt)
        total = squares.clone()
        for b, of_weight, of_itself in zip(bt.double(), crossed.double(), own.double(), strict=True):
            total += b * (2 * of_weight + of_itself)
        return total.clamp_min(0).sqrt().float()

    def _norms_there(self, layer: UnpacksThere, a: torch.Tensor, bt: torch.Tensor) -> torch.Tensor:
        """On the card: a product in fp32 and a sum in fp64 for each output.

        Raises DeviceFull: it has no room for some outputs at a time.
        """
        device = self._device
        assert device is not None, "layers on a card come with their device"
        together = max(1, _ON_DEVICE // layer.in_features)
        parts = []
        with self._entry, device.used(), device.on(self._beside):
            try:
                there = device.put(a)
                for first in range(0, layer.out_features, together):
                    last = min(first + together, layer.out_features)
                    rows = layer.dense_rows(first, last)
                    rows += device.put(bt[:, first:last].t().contiguous()) @ there
                    parts.append(device.take(rows.double().square().sum(1).sqrt().float()))
            except (DeviceFull, torch.OutOfMemoryError) as error:
                raise DeviceFull(
                    f"there is no room on {device} to take the norms of this adapter's layers: start the server with "
                    "less --device-memory-mib"
                ) from error
        return torch.cat(parts)

    @cached_property
    def _beside(self) -> WorkStream:
        assert self._device is not None
        return self._device.stream()


def dense_norms(weight: torch.Tensor, a: torch.Tensor, bt: torch.Tensor) -> torch.Tensor:
    """The slow reference: of a weight [out, in] of any float dtype, as `ServedWeights.norms` gives it."""
    parts = []
    for first in range(0, len(weight), _TOGETHER):
        part = slice(first, first + _TOGETHER)
        parts.append((weight[part].cpu().double() + bt[:, part].double().t() @ a.double()).norm(dim=1))
    return torch.cat(parts).float()


def _dense_weight(layer: Any) -> torch.Tensor:
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        weight: torch.Tensor = layer.weight.detach()
        return weight
    return nf4.dequantize(unpacked(layer.weight.data.cpu(), *state.shape), scales_of(state).cpu())


def _matmul(compiled: Compiled, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a [m, k] @ b [k, n], fp32, in an order of sums that no processor changes."""
    c = torch.empty(a.shape[0], b.shape[1])
    matrices = [FloatMatrix(part.data_ptr(), *part.stride()) for part in (a, b)]
    places = (ctypes.addressof(matrix) for matrix in matrices)
    sizes = (*c.shape, a.shape[1])
    compiled.function("loramux_exact_matmul")(c.data_ptr(), c.stride(0), *places, *sizes, 0, compiled.isa, 1)
    return c
