"""Whatever runs on the device happens here: slot loads, one forward of the batch, sampling."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from loramux_adapters.device.device import Device
from loramux_adapters.lora.host_cache import HostAdapter
from loramux_adapters.lora.lora_linear import AdapterSlots
from loramux_adapters.lora.ops import LoraRows
from loramux_adapters.lora.token_rows import Run, StepTokens, add_token_logits_reference
from loramux_server.engine.module_tokens import ModuleTokens
from loramux_server.engine.sampler import Sampler, asks_first_token
from loramux_server.engine.scheduling.sequence import NOT_FINITE, Batch, RowResult, ScheduledSequence, SlotLoad
from loramux_server.engine.step_questions import StepQuestions, can_be_asked
from loramux_server.errors import SequenceFailed
from loramux_server.kernels.attention.kv_cache import BLOCK_SIZE, KVCache
from loramux_server.kernels.attention.paged_attention import AttentionStep, use_our_attention
from loramux_server.kernels.choice import Kernels
from loramux_server.kernels.compiled.token_logits import AddTokenLogits, NativeTokenLogits
from loramux_server.kernels.decoder.asks import AskedSampling
from loramux_server.kernels.decoder.decoder import Decoder
from loramux_server.kernels.decoder.whole_step import ChoosingStep, StepLimits, WholeStep
from loramux_server.kernels.layers.rotary import LONG, settle_angles

_NO_STATES = torch.empty(0, 0)


class StartedStep(NamedTuple):
    """A step that was started.

    Attributes:
        results: waits for it; a result for each row with `num_heads`, in row order.
        ahead: the next step may be started before they are asked for.
    """

    results: Callable[[], list[RowResult]]
    ahead: bool


class ModelRunner:
    """Runs batches on the base model. Owner of model, slots, cache and sampler: the engine thread.

    transformers' own model code runs unchanged, on packed tokens [1, rows] with explicit positions; attention and the
    cache behind it are ours (kernels/attention/), and so is every linear layer's delta (LoRALinear). Where the model
    allows it a whole step of ours takes its place (kernels/decoder/, kernels/gpu/step/).

    Attributes:
        decoder: the whole step; None where transformers' code runs.
        why_by_modules: why it does; empty where it does not.
        long_from: sequences of more tokens are long (kernels/layers/rotary.py); 0: none is.
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
        limits: StepLimits,
        progress: Callable[[str], None] = lambda line: None,
    ) -> None:
        """
        Args:
            kernels: those that slots and cache were made for.
            host_adapter: gives a version that is held in host memory, or None if it no longer is.
            limits: the largest step.
            progress: told a line at a time, where making the whole step takes long.
        Raises:
            DeviceFull: there is no room for what steps work in.
            BaseModelError: sequences would be longer than these kernels can tell the angles of.
        """
        use_our_attention(model)
        self._model: Any = model
        self._slots = slots
        self._cache = cache
        self._attend = kernels.attend
        self._add_token_logits: AddTokenLogits = add_token_logits_reference
        if kernels.compiled is not None:
            self._add_token_logits = NativeTokenLogits(kernels.compiled)
        self._host_adapter = host_adapter
        self._device = device
        self._places: dict[str, int] = {}  # sequence id -> the ask of the step before that chose its newest token
        self.decoder: WholeStep | None = None
        self.long_from = settle_angles(model, limits.blocks * BLOCK_SIZE)
        self.why_by_modules = f"the kernels {kernels.name!r} have no whole step"
        if kernels.compile_step is not None:
            with device.used():
                step = kernels.compile_step(model, cache, limits, progress)
            self.decoder, self.why_by_modules = (None, step) if isinstance(step, str) else (step, "")
        self._chooser: ChoosingStep | None = None  # the whole step, where it chooses tokens
        sampling = kernels.sampling
        if isinstance(self.decoder, ChoosingStep) and self.decoder.chooses:
            self._chooser = self.decoder
            sampling = AskedSampling(self.decoder.answer, self.decoder.changed, self.decoder.most_asks)
        self._sampler = Sampler(sampling)
        self._of_wide = Sampler(kernels.sampling)  # of rows with more logits than the whole step chooses among

    def start(self, batch: Batch) -> StartedStep:
        """Starts one step.

        Raises:
            SequenceFailed: a version that a slot load names is not in host memory any more.
        """
        with self._device.used():
            for load in batch.slot_loads:
                started = time.perf_counter()
                self._load(load)
                load.seconds = time.perf_counter() - started
            rows = [row for row in batch.rows if row.num_logits]
            pooled = [row for row in batch.rows if row.num_states]
            chooser = None if self._has_own(batch.rows) else self._chooser
            if chooser is not None and not pooled and all(map(can_be_asked, rows)):
                questions = StepQuestions(rows, self._sampler, chooser.description.vocabulary)
                if len(questions.asks) <= chooser.most_asks:
                    return self._started(chooser, batch, questions)
            results = self._pooled(batch, rows, pooled) if pooled else self._finished(batch, rows)
            self._places = {}
            return StartedStep(lambda: results, ahead=False)

    def _started(self, chooser: ChoosingStep, batch: Batch, questions: StepQuestions) -> StartedStep:
        tokens, _, heads, step, lora, head, _ = self._inputs(batch)
        changed = questions.changed if questions.changes else None
        answers = chooser.start(tokens, heads, step, lora, head, questions.asks, changed)
        self._places = questions.places

        def results() -> list[RowResult]:
            with self._device.used():
                return questions.results(answers)

        return StartedStep(results, ahead=questions.ahead)

    def _finished(self, batch: Batch, rows: list[ScheduledSequence]) -> list[RowResult]:
        own = self._has_own(batch.rows)
        if isinstance(self.decoder, Decoder) and rows and not own and all(map(asks_first_token, rows)):
            logits, first = self._first_tokens(self.decoder, batch)
            return self._sampler.results(logits, rows, first)
        return self._chosen(self.forward(batch), rows)

    def _has_own(self, rows: list[ScheduledSequence]) -> bool:
        """Whether an adapter of some row has something of its own for tokens."""
        return any(self._slots.token_uses(row.sequence.slots) for row in rows)

    def _chosen(self, logits: torch.Tensor, rows: list[ScheduledSequence]) -> list[RowResult]:
        """Each row has the logits of its own vocabulary, whatever that of others is."""
        uses = [self._slots.token_uses(row.sequence.slots) for row in rows]
        base = next((use.own.base_sizes["head"] for each in uses for use in each), logits.shape[1])
        sizes = [max([base, *(use.own.sizes["head"] for use in each)]) for each in uses]
        if len({base, *sizes, logits.shape[1]}) <= 1:
            return self._sampler.results(logits, rows) if rows else []
        starts = list(accumulate((row.num_logits for row in rows), initial=0))
        results: dict[int, RowResult] = {}
        for size in set(sizes):
            places = [place for place, its in enumerate(sizes) if its == size]
            of_rows = [at for place in places for at in range(starts[place], starts[place] + rows[place].num_logits)]
            sampler, some = self._sampler, logits[of_rows, :size]
            if size != base and self._chooser is not None:
                sampler, some = self._of_wide, self._device.take(some)
            found = sampler.results(some, [rows[place] for place in places])
            results.update(zip(places, found, strict=True))
        return [results[place] for place in range(len(rows))]

    @torch.inference_mode()
    def _pooled(self, batch: Batch, rows: list[ScheduledSequence], pooled: list[ScheduledSequence]) -> list[RowResult]:
        """Results of a step in which some rows, its last, are asked for their states."""
        count = sum(row.num_states for row in pooled)
        logits, states = self._plain(batch, count)
        results = self._chosen(logits, rows)
        told = np.split(states.numpy(), np.cumsum([row.num_states for row in pooled])[:-1])
        sound = [bool(np.isfinite(one).all()) for one in told]
        results += [
            RowResult(states=one) if is_sound else RowResult(error=NOT_FINITE)
            for one, is_sound in zip(told, sound, strict=True)
        ]
        return results

    @torch.inference_mode()
    def forward(self, batch: Batch) -> torch.Tensor:
        """Logits [sum of the rows' num_logits, vocabulary]; keys and values of all rows are in the cache afterwards."""
        with self._device.used():
            return self._plain(batch)[0]

    @torch.inference_mode()
    def _first_tokens(self, decoder: Decoder, batch: Batch) -> tuple[torch.Tensor, list[int]]:
        tokens, _, heads, step, lora, head, _ = self._inputs(batch)
        return decoder.first_tokens(tokens, heads, step, lora, head)

    def _plain(self, batch: Batch, states: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits, and the states [states, hidden] of the last so many rows that are followed to the output head."""
        tokens, position, heads, step, lora, head, own = self._inputs(batch)
        if self.decoder is not None:
            logits = self.decoder.forward(tokens, heads, step, lora, head, states=states, own=own)
            return logits, self.decoder.states(states) if states else _NO_STATES
        return self._call(
            self._device.put(torch.tensor([tokens])),
            self._device.put(torch.tensor([position])),
            self._device.put(torch.tensor(heads, dtype=torch.long)),
            step,
            lora,
            head,
            states,
            own,
        )

    def _inputs(
        self, batch: Batch
    ) -> tuple[list[int], list[int], list[int], AttentionStep, LoraRows | None, LoraRows | None, StepTokens | None]:
        """Tokens and positions, as modules turn them, of all rows, the rows that are followed to the output head,
        adapters of both, and what these have of their own for tokens."""
        tokens: list[int] = []
        sequence: list[int] = []
        position: list[int] = []
        angles: list[int] = []  # positions as the model's rotary modules read them
        heads: list[int] = []
        runs: list[tuple[int, int, int, int]] = []
        width = max(len(row.sequence.blocks) for row in batch.rows)
        tables = np.zeros((len(batch.rows), width), dtype=np.int32)
        for index, row in enumerate(batch.rows):
            first, count = row.first, row.num_tokens
            runs.append((index, len(tokens), count, first))
            tokens += [-1 - self._places[row.sequence.id]] if row.follows else row.sequence.tokens_from(first, count)
            sequence += [index] * count
            position += range(first, first + count)
            angles += range(first + LONG * row.sequence.is_long, first + LONG * row.sequence.is_long + count)
            tables[index, : len(row.sequence.blocks)] = row.sequence.blocks
            heads += range(len(tokens) - row.num_heads, len(tokens))
        step = AttentionStep(
            cache=self._cache,
            attend=self._attend,
            tables=self._for_the_step(tables),
            sequence=self._for_the_step(np.array(sequence, dtype=np.int32)),
            position=self._for_the_step(np.array(position, dtype=np.int32)),
            runs=tuple(runs),
        )
        lora = LoraRows.build([(row.sequence.slots, row.num_tokens) for row in batch.rows])
        head = lora  # logits of all tokens are wanted
        if len(heads) != len(tokens):
            head = LoraRows.build([(row.sequence.slots, row.num_heads) for row in batch.rows if row.num_heads])
        own = StepTokens.build(
            [
                Run(
                    self._slots.token_uses(row.sequence.slots),
                    tokens[start : start + row.num_tokens],
                    row.num_logits,
                )
                for (_, start, _, _), row in zip(runs, batch.rows, strict=True)
            ]
        )
        return tokens, angles, heads, step, lora, head, own

    def _call(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        sampled: torch.Tensor,
        step: AttentionStep,
        lora: LoraRows | None,
        head: LoraRows | None,
        states: int,
        own: StepTokens | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """transformers' code on tensors [1, rows] of the device; `sampled`: [n] rows that reach the output head."""
        self._slots.set_lora(lora, head)
        seen: list[torch.Tensor] = []
        watched: AbstractContextManager[object] = nullcontext()
        if states:
            head_layer = self._model.get_output_embeddings()
            watched = head_layer.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        changed = None if own is None else ModuleTokens(self._model, own, self._add_token_logits, states)
        hooks = nullcontext() if changed is None else changed.hooks()
        try:
            with watched, hooks:
                output = self._model(
                    input_ids=tokens if changed is None else changed.known(tokens),
                    position_ids=positions,
                    logits_to_keep=sampled,
                    use_cache=False,
                    loramux_step=step,
                )
        finally:
            self._slots.reset_lora()
        logits: torch.Tensor = output.logits[0]
        if changed is not None:
            logits = changed.whole(logits)
        if not states:
            return logits, _NO_STATES
        return logits[:-states], self._device.take(seen[0][0, -states:].float())

    def _for_the_step(self, array: npt.NDArray[np.int32]) -> torch.Tensor:
        """A tensor of it: in host memory for a whole step, on the device for modules.

        In host memory it is the same memory, without a call that gives up the interpreter lock.
        """
        tensor = torch.from_numpy(array)
        return tensor if self.decoder is not None else self._device.put(tensor)

    def _load(self, load: SlotLoad) -> None:
        adapter = self._host_adapter(load.version)
        if adapter is None:
            raise SequenceFailed(f"adapter version {load.version[:12]} left host memory before it was copied")
        self._slots.load(load.slot, adapter, in_use=load.in_use)
