"""Our whole steps on a base with random weights, as the engine starts them, driven without one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from loramux_adapters.device.device import Device
from loramux_adapters.lora.lora_linear import AdapterSlots, head_path
from loramux_adapters.lora.ops import LoraRows
from loramux_adapters.lora.slots import ScaledSlot, Slot
from loramux_server.kernels.attention.kv_cache import BLOCK_SIZE, KVCache
from loramux_server.kernels.attention.paged_attention import AttentionStep, probe_kv_shape
from loramux_server.kernels.choice import choose_kernels
from loramux_server.kernels.decoder.asks import Ask
from loramux_server.kernels.decoder.whole_step import StepLimits
from measure.shapes import Shape

GRAPH_BYTES = 4 << 30
TRIED_ROWS, TRIED_SEQUENCES = 64, 4  # no fewer than what a whole step is tried on when it is made
STRENGTH = 0.01  # standard deviation of adapters' numbers


class OurSteps:
    """Decode steps of one base: each row one token of a sequence with `shape.context` tokens behind it.

    Attributes:
        decoder: the whole step; None where there is none, and nothing here can be used.
        why: the kernels' own word for that.
        kernels: the set's name.
        lines: what was told while graphs were captured.
    """

    def __init__(self, model: Any, shape: Shape, device: Device, *, rows: int, adapters: int) -> None:
        """Lays the base out for the kernels in place. `rows`, `adapters`: the most of a step."""
        self._shape, self._device = shape, device
        kernels = choose_kernels(device)
        self.kernels = kernels.name
        kernels.lay_out(model)
        kernels.use_ops(model)
        kv = probe_kv_shape(model, device, whole_numbers=False)
        kernels = choose_kernels(device, kernels.name, kv)
        self._attend = kernels.attend
        slots = AdapterSlots(
            model, adapters * shape.rank, kernels.add_lora, kernels.copy_slot, head=head_path(model), device=device
        )
        self._slots = [ScaledSlot(Slot(number * shape.rank, shape.rank)) for number in range(adapters)]
        width = -(-(shape.context + 1) // BLOCK_SIZE)
        self._cache = KVCache(kv, rows * width, device, spare=kernels.spare_block)
        tokens, sequences = max(rows, TRIED_ROWS), max(rows, TRIED_SEQUENCES)
        limits = StepLimits(tokens, tokens, sequences, width, 1, shape.rank, graph_bytes=GRAPH_BYTES)
        self.lines: list[str] = []
        step: Any = f"the kernels {kernels.name!r} have none"
        if kernels.compile_step is not None:
            step = kernels.compile_step(model, self._cache, limits, self.lines.append)
        self.decoder: Any = None if isinstance(step, str) else step
        self.why = step if isinstance(step, str) else ""
        self._fill(slots)
        # blocks of a sequence lie apart, as they do in a server that has run for a while
        order = torch.randperm(rows * width, generator=torch.Generator().manual_seed(1))
        self._tables = order.int().view(rows, width)
        self._tokens = torch.randint(shape.vocabulary, (rows,), generator=torch.Generator().manual_seed(2)).tolist()

    @torch.no_grad()
    def _fill(self, slots: AdapterSlots) -> None:
        """Random adapters on all layers but the head, and random keys and values."""
        random = torch.Generator(self._device.place).manual_seed(3)

        def numbers(to: torch.Tensor, spread: float) -> None:
            to.copy_(torch.randn(to.shape, generator=random, device=to.device, dtype=torch.float32) * spread)

        for path, layer in slots.layers.items():
            if path != slots.head:
                numbers(layer.arena.a, STRENGTH)
                numbers(layer.arena.bt, STRENGTH)
                self._device.fill(layer.arena.targeted, 1)
        for tensor in (*self._cache.k, *self._cache.v):
            numbers(tensor, 1.0)

    def inputs(self, rows: int, adapters: int) -> tuple[Any, ...]:
        """Arguments of the decoder's `start` but the asks; rows of an adapter lie together, as in an engine's step."""
        of = [self._slots[row * adapters // rows] if adapters else None for row in range(rows)]
        lora = LoraRows.build([((slot,) if slot else (), 1) for slot in of])
        context = self._shape.context
        step = AttentionStep(
            cache=self._cache,
            attend=self._attend,
            tables=self._tables[:rows],
            sequence=torch.arange(rows, dtype=torch.int32),
            position=torch.full((rows,), context, dtype=torch.int32),
            runs=tuple((row, row, 1, context) for row in range(rows)),
        )
        return self._tokens[:rows], list(range(rows)), step, lora, lora

    def start(self, rows: int, adapters: int) -> Any:
        """Starts a whole greedy step from the host; its answers."""
        with self._device.used():
            return self.decoder.start(*self.inputs(rows, adapters), [Ask(row) for row in range(rows)])

    def logits(self, rows: int, adapters: int) -> torch.Tensor:
        """[rows, vocabulary] fp32 on the host."""
        with self._device.used():
            return self._device.take(self.decoder.forward(*self.inputs(rows, adapters)))

    def shape(self, rows: int, adapters: int) -> Any:
        """What the launches of such a step follow from: those of its graph where there is one."""
        shape = self.decoder.tables.shape(*self.inputs(rows, adapters)[:4], rows)
        return shape if self.decoder.graphs is None else self.decoder.graphs.shape_for(shape)

    def ready(self, rows: int, adapters: int) -> Callable[[], None]:
        """The tables hold such a step now; what runs it on the device, once more each time: a graph where there is
        one. Nothing of the host's is part of it.
        """
        self.start(rows, adapters).read()
        shape, graphs = self.shape(rows, adapters), self.decoder.graphs
        if graphs is not None and shape in graphs.shapes:
            return lambda: graphs.run(shape)
        return lambda: self.decoder.run(shape)

    def is_graph(self, rows: int, adapters: int) -> bool:
        return self.decoder.graphs is not None and self.shape(rows, adapters) in self.decoder.graphs.shapes
