"""What is checked on the user's own machine before the first request: the model's answers, and their independence.

Both checks run the real runner on the real base, for a few seconds at most. The cache and the slots hold nothing yet,
so they use what they need and leave it empty.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import torch

from loramux_adapters.device.device import Device
from loramux_adapters.lora.host_cache import HostAdapter
from loramux_adapters.lora.lora_linear import AdapterSlots
from loramux_adapters.lora.slots import SMALLEST_RANK, ScaledSlot, Slot
from loramux_server.engine.model_runner import ModelRunner
from loramux_server.engine.scheduling.admission import LEAST_COUNTED, SchedulerConfig
from loramux_server.engine.scheduling.sequence import Batch, SamplingParams, ScheduledSequence, Sequence
from loramux_server.errors import BaseModelError
from loramux_server.kernels.attention.kv_cache import BLOCK_SIZE
from loramux_server.kernels.attention.paged_attention import use_eager_attention, use_our_attention

# A wrong mask, position or scale is off by as much as the logits' spread itself. In bf16 our attention and
# transformers' eager one round differently by up to a tenth of it on random tokens. In fp32 they differ by what keys
# and values lose as whole numbers: 0.0015 with 30 layers, 0.0002 to 0.0009 with 2 layers of thirteen families.
TOLERANCES = {torch.float32: 0.02, torch.bfloat16: 0.15}
_CHUNK = 7
_LENGTH = 6 * _CHUNK  # more than two blocks, so that block tables matter
_LONGEST_WINDOW = 128  # a sliding window up to this is crossed
_PROMPTS = (_LENGTH, 7, 1, 3 * BLOCK_SIZE, 19)
_LARGEST_RANK = 32
_SCALES = (0.7, -0.45)  # of the two adapters, in the row that has both

Slots = tuple[ScaledSlot, ...]


def _blocks(tokens: int) -> int:
    """Of the KV cache, that so many tokens of a sequence take."""
    return -(-tokens // BLOCK_SIZE)


BLOCKS_TO_CHECK = sum(map(_blocks, _PROMPTS))  # of the KV cache, at least: one of each prompt


@dataclass(frozen=True, slots=True)
class StartCheck:
    """Result of the checks.

    Attributes:
        difference: root mean square difference of the logits to those of transformers' own attention, as a share of
            the logits' standard deviation.
        batch_invariant: True if every row of a mixed batch, with no adapter, one or two, had exactly the logits it
            has alone, and nothing else is known that speaks against it: kernels and graphs of a card were tried apart.
        blocks: KV blocks that the checks wrote to.
    """

    difference: float
    batch_invariant: bool
    blocks: int


NOT_CHECKED = StartCheck(math.nan, batch_invariant=False, blocks=0)


class Checker:
    """Runs the checks on a runner that nobody uses yet."""

    def __init__(
        self,
        runner: ModelRunner,
        slots: AdapterSlots,
        model: Any,
        *,
        vocabulary: int,
        num_blocks: int,
        config: SchedulerConfig,
        device: Device,
    ) -> None:
        """
        Args:
            model: the model inside `runner`, whose attention is switched to transformers' own and back.
            vocabulary: token ids to draw from.
            num_blocks: blocks of the cache.
            config: the scheduler's limits: no step will have more sequences and tokens, and no row more adapters.
            device: where all of it lies.
        """
        self._runner = runner
        self._slots = slots
        self._model = model
        self._vocabulary = vocabulary
        self._num_blocks = num_blocks
        self._device = device
        self._sequences, self._tokens = config.max_num_seqs, config.max_batch_tokens
        self._adapters, self._ranks = config.max_adapters, config.max_ranks
        self._random = torch.Generator().manual_seed(0)
        self._touched = 0  # KV blocks written to, from the first on

    def run(self) -> StartCheck:
        """Both checks.

        Raises:
            BaseModelError: the model does not run, or does not give transformers' own answers, through our attention
                and cache; or the cache is too small to try.
        """
        if BLOCKS_TO_CHECK > self._num_blocks:
            raise BaseModelError(
                f"the KV cache has {self._num_blocks} blocks; at least {BLOCKS_TO_CHECK} are needed: raise "
                "--device-memory-mib"
            )
        try:
            difference, allowed = self._difference_to_transformers()
            step = self._runner.decoder
            invariant = (step is None or step.equal_bits) and self._is_batch_invariant()
        except (ValueError, TypeError, RuntimeError) as error:
            raise BaseModelError(f"this model does not run through loramux: {error}") from error
        if not difference <= allowed:
            raise BaseModelError(
                f"this model's answers through loramux differ from transformers' own (by {difference:.1%} of the "
                f"logits' spread, allowed {allowed:.0%}); it uses something that loramux does not support"
            )
        return StartCheck(difference, invariant, self._touched)

    def _difference_to_transformers(self) -> tuple[float, float]:
        """(difference, how much is allowed), over the ends of all chunks of a prompt longer than a short window."""
        config = self._model.config
        window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None) or 0
        length = _LENGTH if window > _LONGEST_WINDOW else max(_LENGTH, -(-(window + 2 * _CHUNK) // _CHUNK) * _CHUNK)
        chunk = min(_CHUNK, self._tokens)
        prompt = self._prompt(min(length, self._num_blocks * BLOCK_SIZE) // chunk * chunk)
        ours = torch.stack(list(self._logits_in_chunks(prompt, chunk, ()))).float()
        use_eager_attention(self._model)
        try:
            with torch.inference_mode(), self._device.used():
                tokens = self._device.put(torch.tensor([prompt]))
                theirs = self._device.take(self._model(input_ids=tokens, use_cache=False).logits[0, chunk - 1 :: chunk])
        finally:
            use_our_attention(self._model)
        difference = (ours - theirs.float()).square().mean().sqrt() / theirs.float().std()
        return float(difference), TOLERANCES.get(theirs.dtype, max(TOLERANCES.values()))

    def _is_batch_invariant(self) -> bool:
        loaded = self._load_adapters()
        slots: list[Slots] = [(), *((ScaledSlot(slot),) for slot in loaded)]
        together = sum(max(LEAST_COUNTED, slot.rank) for slot in loaded)
        if 1 < len(loaded) <= self._adapters and together <= self._ranks:
            slots.append(tuple(ScaledSlot(slot, scale) for slot, scale in zip(loaded, _SCALES, strict=True)))
        try:
            kinds = [(self._prompt(length), slots[index % len(slots)]) for index, length in enumerate(_PROMPTS)]
            alone = [
                list(self._logits_in_chunks(p, min(5 + i, self._tokens), each))[-1] for i, (p, each) in enumerate(kinds)
            ]
            most = len(kinds) * (self._num_blocks // BLOCKS_TO_CHECK)
            company = list(islice(cycle(range(len(kinds))), min(self._sequences, most)))
            company.sort(key=lambda kind: slots.index(kinds[kind][1]))
            return self._all_equal(company, kinds, alone)
        finally:
            for slot in loaded:
                self._slots.load(slot, HostAdapter("", slot.rank, 0, {}))

    def _all_equal(self, company: list[int], kinds: list[tuple[list[int], Slots]], alone: list[torch.Tensor]) -> bool:
        """Whole prompts side by side, and then the last tokens of all as decodes of one step, against each alone."""
        sequences, start = [], 0
        for kind in company:
            sequences.append(self._sequence(kinds[kind][0], start, kinds[kind][1]))
            start += len(sequences[-1].blocks)
        together = torch.cat([self._ends_of_prompts(part) for part in self._parts(sequences)])
        for sequence in sequences:
            sequence.num_computed = len(sequence.prompt) - 1
        again = self._logits([ScheduledSequence(s, 1, samples=True) for s in sequences])
        return all(
            torch.equal(alone[kind], together[row]) and torch.equal(alone[kind], again[row])
            for row, kind in enumerate(company)
        )

    def _parts(self, sequences: list[Sequence]) -> Iterator[list[Sequence]]:
        """As many one after the other as a step has tokens for; a longer prompt comes alone, all but its end read."""
        part: list[Sequence] = []
        for sequence in sequences:
            while sequence.num_uncomputed > self._tokens:
                self._logits([ScheduledSequence(sequence, self._tokens, samples=True)])
                sequence.num_computed += self._tokens
            if sum(one.num_uncomputed for one in [*part, sequence]) > self._tokens:
                yield part
                part = []
            part.append(sequence)
        yield part

    def _ends_of_prompts(self, sequences: list[Sequence]) -> torch.Tensor:
        return self._logits([ScheduledSequence(s, s.num_uncomputed, samples=True) for s in sequences])

    def _logits(self, rows: list[ScheduledSequence]) -> torch.Tensor:
        """[rows, vocabulary] in host memory: those of the next step may lie where these did."""
        return self._device.take(self._runner.forward(Batch(rows))).clone()

    def _load_adapters(self) -> list[Slot]:
        """Random adapters of the smallest rank and of a large one, on every layer, as far as there is room; the last
        has gain and shift too, where the slots have room for them.

        One row may have both, where it may have two.
        """
        rows = self._slots.rows
        beside = self._ranks - LEAST_COUNTED if self._ranks >= 2 * LEAST_COUNTED else self._ranks
        large = min(_LARGEST_RANK, 1 << max(0, min(rows // 2, beside).bit_length() - 1))
        places = [Slot(0, SMALLEST_RANK)] if rows >= SMALLEST_RANK else []
        if large >= SMALLEST_RANK:
            places.append(Slot(large, large))
        for slot in places:
            arenas = {path: layer.arena for path, layer in self._slots.layers.items()}
            modules = {
                path: (self._matrix(slot.rank, arena.a.shape[1]), self._matrix(slot.rank, arena.bt.shape[1]))
                for path, arena in arenas.items()
            }
            affine = {
                path: self._matrix(2, arena.bt.shape[1]).float()
                for path, arena in arenas.items()
                if arena.affine is not None and slot is places[-1]
            }
            self._slots.load(slot, HostAdapter("", slot.rank, 0, modules, affine))
        return places

    def _matrix(self, rank: int, size: int) -> torch.Tensor:
        values: torch.Tensor = torch.randn(rank, size, generator=self._random) / math.sqrt(size)
        return values.bfloat16()

    def _prompt(self, length: int) -> list[int]:
        return [int(token) for token in torch.randint(0, self._vocabulary, (length,), generator=self._random)]

    def _logits_in_chunks(self, prompt: list[int], chunk: int, slots: Slots) -> Iterator[torch.Tensor]:
        """Logits [vocabulary] at the end of each chunk of the prompt."""
        sequence = self._sequence(prompt, 0, slots)
        while sequence.num_computed < len(prompt):
            count = min(chunk, len(prompt) - sequence.num_computed)
            yield self._logits([ScheduledSequence(sequence, count, samples=True)])[0]
            sequence.num_computed += count

    def _sequence(self, prompt: list[int], first_block: int, slots: Slots) -> Sequence:
        sequence = Sequence("start-check", prompt, SamplingParams(temperature=0.0, max_tokens=1))
        sequence.blocks = list(range(first_block, first_block + _blocks(len(prompt))))
        sequence.slots = slots
        self._touched = max(self._touched, first_block + len(sequence.blocks))
        return sequence
