"""Whatever runs on the device happens here: slot loads, one forward of the batch, sampling."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from loramux_adapters.device.device import Device
from loramux_adapters.lora.host_cache import HostAdapter
from loramux_adapters.lora.lora_linear import AdapterSlots
from loramux_adapters.lora.ops import LoraRows
from loramux_server.engine.sampler import Sampler, asks_first_token
from loramux_server.engine.scheduling.sequence import Batch, RowResult, SlotLoad
from loramux_server.engine.step_graphs import StepGraphs
from loramux_server.errors import SequenceFailed
from loramux_server.kernels.attention.kv_cache import KVCache
from loramux_server.kernels.attention.paged_attention import AttentionStep, use_our_attention
from loramux_server.kernels.choice import Kernels
from loramux_server.kernels.decoder.decoder import Decoder


class ModelRunner:
    """Runs batches on the base model. Owner of model, slots, cache and sampler: the engine thread.

    transformers' own model code runs unchanged, on packed tokens [1, rows] with explicit positions; attention and the
    cache behind it are ours (kernels/attention/), and so is every linear layer's delta (LoRALinear). Where the model
    allows it the same step runs in one call of compiled code instead (kernels/decoder/), with the same bits.

    Attributes:
        decoder: the compiled step; None where transformers' code runs, which is also its reference.
        graphs: steps captured as graphs; None where there are none.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        slots: AdapterSlots,
        cache: KVCache,
        kernels: Kernels,
        host_adapter: Callable[[str], HostAdapter | None],
        device: Device,
    ) -> None:
        """`kernels`: those that slots and cache were made for.

        `host_adapter` gives a version that is held in host memory, or None if it no longer is.
        """
        use_our_attention(model)
        self._model: Any = model
        self._slots = slots
        self._cache = cache
        self._attend = kernels.attend
        self._host_adapter = host_adapter
        self._device = device
        self._sampler = Sampler(kernels.sampling)
        self.decoder: Decoder | None = None
        self.why_by_modules = f"the kernels {kernels.name!r} have no whole step"
        if kernels.compile_step is not None:
            step = kernels.compile_step(model, cache)
            self.decoder, self.why_by_modules = (None, step) if isinstance(step, str) else (step, "")
        self.graphs: StepGraphs | None = None
        if kernels.graphs is not None:
            self.graphs = StepGraphs(self._call, cache, kernels.graphs, slots.rows, device.capture)

    def run(self, batch: Batch) -> list[RowResult]:
        """One step: a result for each row with logits, in row order.

        Raises:
            SequenceFailed: a version that a slot load names is not in host memory any more.
        """
        with self._device.used():
            for load in batch.slot_loads:
                started = time.perf_counter()
                self._load(load)
                load.seconds = time.perf_counter() - started
            rows = [row for row in batch.rows if row.num_logits]
            if self.decoder is not None and rows and all(map(asks_first_token, rows)):
                logits, first = self._first_tokens(self.decoder, batch)
                return self._sampler.results(logits, rows, first)
            logits = self.forward(batch)
            return self._sampler.results(logits, rows) if rows else []

    @torch.inference_mode()
    def forward(self, batch: Batch) -> torch.Tensor:
        """Logits [sum of the rows' num_logits, vocabulary]; keys and values of all rows are in the cache afterwards."""
        with self._device.used():
            if self.graphs is not None:
                return self.graphs.run(batch, lambda: self._plain(batch))
            return self._plain(batch)

    @torch.inference_mode()
    def _first_tokens(self, decoder: Decoder, batch: Batch) -> tuple[torch.Tensor, list[int]]:
        tokens, _, heads, step, lora, head = self._inputs(batch)
        return decoder.first_tokens(tokens, heads, step, lora, head)

    def _plain(self, batch: Batch) -> torch.Tensor:
        tokens, position, heads, step, lora, head = self._inputs(batch)
        if self.decoder is not None:
            decoded: torch.Tensor = self.decoder.forward(tokens, heads, step, lora, head)
            return decoded
        return self._call(
            self._device.put(torch.tensor([tokens])),
            self._device.put(torch.tensor([position])),
            self._device.put(torch.tensor(heads, dtype=torch.long)),
            step,
            lora,
            head,
        )

    def _inputs(
        self, batch: Batch
    ) -> tuple[list[int], list[int], list[int], AttentionStep, LoraRows | None, LoraRows | None]:
        """Tokens and positions of all rows, the rows whose logits are wanted, and adapters of both."""
        tokens: list[int] = []
        sequence: list[int] = []
        position: list[int] = []
        heads: list[int] = []
        runs: list[tuple[int, int, int, int]] = []
        width = max(len(row.sequence.blocks) for row in batch.rows)
        tables = np.zeros((len(batch.rows), width), dtype=np.int32)
        for index, row in enumerate(batch.rows):
            first, count = row.first, row.num_tokens
            runs.append((index, len(tokens), count, first))
            tokens += row.sequence.tokens_from(first, count)
            sequence += [index] * count
            position += range(first, first + count)
            tables[index, : len(row.sequence.blocks)] = row.sequence.blocks
            heads += range(len(tokens) - row.num_logits, len(tokens))
        step = AttentionStep(
            cache=self._cache,
            attend=self._attend,
            tables=self._on_device(tables),
            sequence=self._on_device(np.array(sequence, dtype=np.int32)),
            position=self._on_device(np.array(position, dtype=np.int32)),
            runs=tuple(runs),
        )
        lora = LoraRows.build([(row.sequence.slots, row.num_tokens) for row in batch.rows])
        head = lora  # logits of all tokens are wanted
        if len(heads) != len(tokens):
            head = LoraRows.build([(row.sequence.slots, row.num_logits) for row in batch.rows if row.num_logits])
        return tokens, position, heads, step, lora, head

    def _call(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        sampled: torch.Tensor,
        step: AttentionStep,
        lora: LoraRows | None,
        head: LoraRows | None,
    ) -> torch.Tensor:
        """transformers' code on tensors [1, rows] of the device; `sampled`: [n] rows whose logits are wanted."""
        self._slots.set_lora(lora, head)
        try:
            output = self._model(
                input_ids=tokens,
                position_ids=positions,
                logits_to_keep=sampled,
                use_cache=False,
                loramux_step=step,
            )
        finally:
            self._slots.reset_lora()
        logits: torch.Tensor = output.logits[0]
        return logits

    def _on_device(self, array: npt.NDArray[np.int32]) -> torch.Tensor:
        """A tensor of it; on the CPU of the same memory, without a call that gives up the interpreter lock."""
        return self._device.put(torch.from_numpy(array))

    def _load(self, load: SlotLoad) -> None:
        adapter = self._host_adapter(load.version)
        if adapter is None:
            raise SequenceFailed(f"adapter version {load.version[:12]} left host memory before it was copied")
        self._slots.load(load.slot, adapter)
