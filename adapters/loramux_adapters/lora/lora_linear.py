"""A linear layer of the base with room for many adapters beside it, none of them merged."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from loramux_adapters.device.device import Device
from loramux_adapters.errors import AdapterRejected
from loramux_adapters.lora.host_cache import HostAdapter
from loramux_adapters.lora.ops import AddLora, Arena, LoraRows
from loramux_adapters.lora.slot_copy import CopySlot, Weights
from loramux_adapters.lora.slots import SMALLEST_RANK, Slot


class LoRALinear(nn.Module):
    """`base_layer` plus, for each row that has one, its adapter's delta. Owner: the engine thread.

    `set_lora` says which adapter each row of the coming forward uses; with None the layer is the base layer and
    nothing else runs.
    """

    def __init__(self, base_layer: nn.Module, arena: Arena, add_lora: AddLora) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.arena = arena
        self._add_lora = add_lora
        self._rows: LoraRows | None = None

    @property
    def weight(self) -> torch.Tensor:
        """The base layer's own weight: transformers looks at it where weights are tied."""
        weight = self.base_layer.weight
        assert isinstance(weight, torch.Tensor)
        return weight

    def set_lora(self, rows: LoraRows | None) -> None:
        self._rows = rows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out]."""
        y: torch.Tensor = self.base_layer(x)
        if self._rows is not None:
            flat = y.view(-1, y.shape[-1])
            self._add_lora(flat, x.reshape(-1, x.shape[-1]), self.arena, self._rows)
        return y


class AdapterSlots:
    """The device side of all adapters: every LoRALinear of one model, loaded and set together.

    Owner: the engine thread.
    """

    def __init__(
        self,
        model: nn.Module,
        rows: int,
        add_lora: AddLora,
        copy_slot: CopySlot,
        *,
        head: str | None,
        device: Device,
    ) -> None:
        """Wraps every linear layer of `model` in place.

        Args:
            rows: rank rows of each layer's arena, a multiple of 8; 0 wraps nothing (LoRA off).
            add_lora, copy_slot: the kernels in use.
            head: module path of the output head, which sees other rows than the layers do (`head_path`).
            device: where the model lies, and the arenas will.
        Raises:
            DeviceFull: there is no room for them.
        """
        if rows % SMALLEST_RANK:
            raise ValueError(f"rows must be a multiple of {SMALLEST_RANK}")
        self.rows = rows
        self.head = head
        self._copy = copy_slot
        self._device = device
        self.layers: dict[str, LoRALinear] = {}
        self._written: dict[str, npt.NDArray[np.bool_]] = {}  # by layer, which groups of 8 rows ever held weights
        self._targets: list[set[str]] = [set() for _ in range(rows // SMALLEST_RANK)]  # layers with weights, by group
        if rows:
            for path, linear in list(linears(model)):
                self.layers[path] = self._wrap(model, path, linear, add_lora)

    def _wrap(self, model: nn.Module, path: str, linear: nn.Linear, add_lora: AddLora) -> LoRALinear:
        arena = Arena(
            self._device.reserve((self.rows, linear.in_features), torch.bfloat16),
            self._device.reserve((self.rows, linear.out_features), torch.bfloat16),
            self._device.reserve((self.rows // SMALLEST_RANK,), torch.uint8),
        )
        self._written[path] = np.zeros(self.rows // SMALLEST_RANK, dtype=np.bool_)
        layer = LoRALinear(linear, arena, add_lora)
        model.set_submodule(path, layer)
        return layer

    @torch.no_grad()
    def load(self, slot: Slot, adapter: HostAdapter, *, in_use: bool = True) -> None:
        """Copies an adapter into its slot; rows and layers that it does not fill become zero.

        `in_use`: steps that were started may still read what the slot holds.

        Raises:
            AdapterRejected: it does not fit this model (the upload check lets none such through).
        """
        groups = slice(slot.offset // SMALLEST_RANK, (slot.offset + slot.rank) // SMALLEST_RANK)
        before: set[str] = set().union(*self._targets[groups])
        filling = [*self._fitting(slot, adapter), *((path, None) for path in before - adapter.modules.keys())]
        for group in range(groups.start, groups.stop):
            self._targets[group] = before | adapter.modules.keys()  # until it is clear that all went well
        self._copy(slot, [(self.layers[path].arena, weights) for path, weights in filling], in_use=in_use)
        for path in adapter.modules:
            self._written[path][groups] = True
        for group in range(groups.start, groups.stop):
            self._targets[group] = set(adapter.modules)

    def _fitting(self, slot: Slot, adapter: HostAdapter) -> Iterator[tuple[str, Weights]]:
        """Its weights, layer by layer, of which it is known that the kernel may copy them."""
        for path, (a, bt) in adapter.modules.items():
            if path not in self.layers:
                raise AdapterRejected([f"the base has no linear layer {path}"])
            arena = self.layers[path].arena
            rank = a.shape[0]
            if rank > slot.rank or a.shape != (rank, arena.a.shape[1]) or bt.shape != (rank, arena.bt.shape[1]):
                raise AdapterRejected([f"{path}: shapes {tuple(a.shape)} and {tuple(bt.shape)} do not fit"])
            if not all(part.dtype == torch.bfloat16 and part.is_contiguous() for part in (a, bt)):
                raise AdapterRejected([f"{path}: the weights are not dense bf16"])
            yield path, (a, bt)

    def set_lora(self, tokens: LoraRows | None, head: LoraRows | None) -> None:
        """Says which adapter each token row (and each row of the output head) of the coming forward uses."""
        for path, layer in self.layers.items():
            layer.set_lora(head if path == self.head else tokens)

    def reset_lora(self) -> None:
        self.set_lora(None, None)

    @property
    def held_bytes(self) -> int:
        """Bytes that the device really holds: on the CPU what was ever written to, else the whole arena."""
        written = sum(
            int(self._written[path].sum()) * SMALLEST_RANK * 2 * (layer.arena.a.shape[1] + layer.arena.bt.shape[1])
            for path, layer in self.layers.items()
        )
        return self._device.held_of(self.rows * self.row_bytes, written)

    @property
    def row_bytes(self) -> int:
        """Bytes of one rank row over all layers."""
        return row_bytes(
            {path: (layer.arena.a.shape[1], layer.arena.bt.shape[1]) for path, layer in self.layers.items()}
        )


def output_head(model: nn.Module) -> tuple[str, nn.Module | None]:
    """Module path of a transformers model's output head, whatever the architecture calls it, and the head: "", None if
    it has none."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return next((path for path, each in model.named_modules() if each is head), ""), head


def head_path(model: nn.Module) -> str | None:
    """Module path of the output head; None if there is none."""
    return output_head(model)[0] or None


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """(module path, layer) of every linear layer of the base, quantized or not, the output head included."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            yield path, module


def row_bytes(shapes: dict[str, tuple[int, int]]) -> int:
    """Bytes that one rank row takes over layers of (in_features, out_features), in bf16."""
    return sum((inputs + outputs) * 2 for inputs, outputs in shapes.values())
