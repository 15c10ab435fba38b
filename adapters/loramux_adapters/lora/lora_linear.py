"""A linear layer of the base with room for many adapters beside it, none of them merged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from loramux_adapters.device.device import Device
from loramux_adapters.errors import AdapterRejected
from loramux_adapters.lora.host_cache import HostAdapter
from loramux_adapters.lora.ops import AddLora, Arena, LoraRows
from loramux_adapters.lora.slot_copy import CopySlot, LayerWeights
from loramux_adapters.lora.slots import SMALLEST_RANK, ScaledSlot, Slot
from loramux_adapters.lora.token_rows import TokenRows, TokenUse


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


class PicksRows(nn.Module):
    """A module of the base that has its linear layers run on some of the step's token rows each. Owner: the engine
    thread."""

    _rows: LoraRows | None = None

    def set_lora(self, rows: LoraRows | None) -> None:
        """Which adapter each token row of the coming forward uses."""
        self._rows = rows

    def layers_changed(self) -> None:
        """Others have taken the place of its layers."""

    def pick(self, rows: torch.Tensor, layers: Sequence[nn.Module]) -> None:
        """These layers run on these rows next, [some] int64 in ascending order."""
        picked = None if self._rows is None else self._rows.picked(rows.tolist())
        for layer in layers:
            if isinstance(layer, LoRALinear):
                layer.set_lora(picked)


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
        module_of: Callable[[str], str | None] = lambda path: path,
        affine: bool = False,
    ) -> None:
        """Wraps every linear layer of `model` in place.

        Args:
            rows: rank rows of each layer's arena, a multiple of 8; 0 wraps nothing (LoRA off).
            add_lora, copy_slot: the kernels in use.
            head: module path of the output head, which sees other rows than the layers do (`head_path`).
            device: where the model lies, and the arenas will.
            module_of: what an adapter calls a module -> its path in `model`; None: it is of a part that is left out.
            affine: with room for gain and shift of every slot.
        Raises:
            DeviceFull: there is no room for them.
        """
        if rows % SMALLEST_RANK:
            raise ValueError(f"rows must be a multiple of {SMALLEST_RANK}")
        self.rows = rows
        self.head = head
        self._copy = copy_slot
        self._device = device
        self._module_of = module_of
        self._has_affine = affine
        self.layers: dict[str, LoRALinear] = {}
        self._tokens: dict[Slot, tuple[str, TokenRows]] = {}  # (version, what it has of its own) of those that do
        self._written: dict[str, npt.NDArray[np.bool_]] = {}  # by layer, which groups of 8 rows ever held weights
        self._affine: set[tuple[str, int]] = set()  # (layer, group) whose gain and shift were ever written
        self._targets: list[set[str]] = [set() for _ in range(rows // SMALLEST_RANK)]  # layers with weights, by group
        self._pickers = [(path, module) for path, module in model.named_modules() if isinstance(module, PicksRows)]
        self._picked: set[str] = set()  # layers whose rows such a module picks
        self._some_picked = False  # an adapter in some slot has weights for one
        if rows:
            unwrapped = list(linears(model))
            for path, module in self._pickers:
                self._wrap_alike(model, path, module, add_lora)
            for path, linear in unwrapped:
                if path not in self._picked:
                    self.layers[path] = self._wrap(model, path, linear, self._arenas(linear, 1)[0], add_lora)

    def _wrap_alike(self, model: nn.Module, path: str, picker: PicksRows, add_lora: AddLora) -> None:
        """Wraps the layers below a module, those of one shape in one piece of memory: there may be thousands."""
        alike: dict[tuple[int, int], list[tuple[str, nn.Linear]]] = {}
        for inner, linear in list(linears(picker)):
            alike.setdefault((linear.in_features, linear.out_features), []).append((f"{path}.{inner}", linear))
        for layers in alike.values():
            for (whole, linear), arena in zip(layers, self._arenas(layers[0][1], len(layers)), strict=True):
                self.layers[whole] = self._wrap(model, whole, linear, arena, add_lora)
                self._picked.add(whole)
        picker.layers_changed()

    def _arenas(self, linear: nn.Linear, count: int) -> list[Arena]:
        """For so many layers of the shape of this one."""
        rows, groups = self.rows * count, self.rows * count // SMALLEST_RANK
        parts = [
            self._device.reserve((rows, linear.in_features), torch.bfloat16),
            self._device.reserve((rows, linear.out_features), torch.bfloat16),
            self._device.reserve((groups,), torch.uint8),
        ]
        if self._has_affine:
            parts.append(self._device.reserve((groups, 2, linear.out_features), torch.float32))
        return [Arena(*each) for each in zip(*(part.chunk(count) for part in parts), strict=True)]

    def _wrap(self, model: nn.Module, path: str, linear: nn.Linear, arena: Arena, add_lora: AddLora) -> LoRALinear:
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
        fitting = dict(self._fitting(slot, adapter))
        filling = [*fitting.items(), *((path, None) for path in before - fitting.keys())]
        for group in range(groups.start, groups.stop):
            self._targets[group] = before | fitting.keys()  # until it is clear that all went well
        self._some_picked |= not self._picked.isdisjoint(fitting)
        for held in [held for held in self._tokens if held.overlaps(slot)]:
            del self._tokens[held]
        self._copy(slot, [(self.layers[path].arena, weights) for path, weights in filling], in_use=in_use)
        if adapter.tokens is not None:
            self._tokens[slot] = adapter.version, adapter.tokens.on(self._device)
        for path in fitting:
            self._written[path][groups] = True
        for group in range(groups.start, groups.stop):
            self._targets[group] = set(fitting)
        self._some_picked = any(not targets.isdisjoint(self._picked) for targets in self._targets)
        self._affine |= {(path, groups.start) for path, weights in fitting.items() if weights.affine is not None}

    def forget(self, version: str) -> None:
        """Lets go of what a version has of its own for tokens: it has no slot any more, or is about to get another."""
        for held in [held for held, (its, _) in self._tokens.items() if its == version]:
            del self._tokens[held]

    def token_bytes(self, elsewhere: Callable[[str], bool]) -> int:
        """Bytes of what is held here for tokens, but for versions of which the same rows are held `elsewhere` too."""
        held = [*self._tokens.values()]
        return sum(own.device_bytes if elsewhere(version) else own.nbytes for version, own in held)

    def token_uses(self, slots: Sequence[ScaledSlot]) -> tuple[TokenUse, ...]:
        """What those in these slots have of their own for tokens; most have nothing."""
        if not self._tokens:
            return ()
        found = [(self._tokens.get(scaled.slot), scaled.scale) for scaled in slots]
        return tuple(TokenUse(*held, scale) for held, scale in found if held is not None)

    def _fitting(self, slot: Slot, adapter: HostAdapter) -> Iterator[tuple[str, LayerWeights]]:
        """Its weights, layer by layer, of which it is known that the kernel may copy them."""
        for theirs in adapter.modules.keys() | adapter.affine.keys():
            path = self._module_of(theirs)
            if path is None:
                continue
            if path not in self.layers:
                raise AdapterRejected([f"the base has no linear layer {path}"])
            arena = self.layers[path].arena
            inputs, outputs = arena.a.shape[1], arena.bt.shape[1]
            a, bt = adapter.modules.get(theirs) or (torch.empty(0, n, dtype=torch.bfloat16) for n in (inputs, outputs))
            rank = a.shape[0]
            if rank > slot.rank or a.shape != (rank, inputs) or bt.shape != (rank, outputs):
                raise AdapterRejected([f"{path}: shapes {tuple(a.shape)} and {tuple(bt.shape)} do not fit"])
            if not all(part.dtype == torch.bfloat16 and part.is_contiguous() for part in (a, bt)):
                raise AdapterRejected([f"{path}: the weights are not dense bf16"])
            affine = adapter.affine.get(theirs)
            if affine is not None and (arena.affine is None or affine.shape != (2, outputs)):
                raise AdapterRejected([f"{path}: there is no room for gain and shift of {tuple(affine.shape)}"])
            yield path, LayerWeights(a, bt, affine)

    def set_lora(self, tokens: LoraRows | None, head: LoraRows | None) -> None:
        """Says which adapter each token row (and each row of the output head) of the coming forward uses."""
        for path, layer in self.layers.items():
            if path not in self._picked:
                layer.set_lora(head if path == self.head else tokens)
        for _, module in self._pickers:
            module.set_lora(tokens if self._some_picked else None)

    def reset_lora(self) -> None:
        self.set_lora(None, None)

    @property
    def held_bytes(self) -> int:
        """Bytes that the device really holds: on the CPU what was ever written to, else the whole arena."""
        written = sum(
            int(self._written[path].sum()) * SMALLEST_RANK * 2 * (layer.arena.a.shape[1] + layer.arena.bt.shape[1])
            for path, layer in self.layers.items()
        )
        written += sum(affine_bytes(self.layers[path].arena.bt.shape[1]) for path, _ in self._affine)
        outputs = sum(layer.arena.bt.shape[1] for layer in self.layers.values() if layer.arena.affine is not None)
        reserved = self.rows * self.row_bytes + self.rows // SMALLEST_RANK * affine_bytes(outputs)
        return self._device.held_of(reserved, written)

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


def affine_bytes(outputs: int) -> int:
    """Bytes of gain and shift of so many numbers of output."""
    return 2 * torch.float32.itemsize * outputs
