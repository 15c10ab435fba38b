"""The serving path without HTTP, in one process: the same kernels, cache and slots, for evaluation and fingerprints.

A step here is of a size that servers use, so a reply has the bits that a server of the same numerics id gives.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from loramux_adapters.errors import DataError, MemoryShort
from loramux_adapters.evaluation.scores import TokenScore
from loramux_adapters.lora.lora_linear import AdapterSlots, head_path
from loramux_adapters.lora.slots import Slot, SlotTable, bucket_of
from loramux_adapters.lora.verify import check_adapter
from loramux_adapters.lora.weights import load_host_adapter
from loramux_server.base.loader import BaseModel
from loramux_server.engine.local_steps import Pool, Work, turns
from loramux_server.engine.model_runner import ModelRunner
from loramux_server.engine.sampler import Sampler
from loramux_server.engine.sequence import SamplingParams
from loramux_server.engine.sequence import Sequence as EngineSequence
from loramux_server.engine.start_check import Checker, StartCheck
from loramux_server.errors import SequenceFailed
from loramux_server.kernels.attention import probe_kv_shape
from loramux_server.kernels.choice import Kernels, choose_kernels
from loramux_server.kernels.kv_cache import BLOCK_SIZE, KVCache
from loramux_server.kernels.numerics import numerics_id


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter on the device, for the `Offline` that loaded it.

    Attributes:
        version: the content digest that a store would give it.
        base_verified: it names the base it was loaded on.
    """

    directory: Path
    version: str
    rank: int
    slot: Slot
    base_verified: bool


@dataclass(frozen=True, slots=True)
class Reply:
    """A greedy reply.

    Attributes:
        tokens: what was chosen, the stop token left out.
        logprobs: log probability of each.
        ended: a stop token was chosen; otherwise `max_tokens` is used up.
    """

    tokens: list[int]
    logprobs: list[float]
    ended: bool


@dataclass(frozen=True, slots=True)
class Asked:
    """What `Offline.ask` found out.

    Attributes:
        scores: for each row, of each token of its continuation.
        replies: prompt -> greedy reply; empty unless replies were asked for.
    """

    scores: list[list[TokenScore]]
    replies: dict[tuple[int, ...], Reply]


class Offline:
    """A base and its adapters, asked in batches. One thread uses it; the base's model is its own from now on."""

    def __init__(
        self,
        base: BaseModel,
        runner: ModelRunner,
        slots: AdapterSlots,
        *,
        num_blocks: int,
        rows: int,
        max_rank: int,
        kernels: Kernels,
        checked: StartCheck,
    ) -> None:
        """Use `open`."""
        self.base = base
        self.numerics_id = numerics_id(base.model, base.device, kernels)
        self.checked = checked
        self.context = min(base.context_length, num_blocks * BLOCK_SIZE)
        self._runner = runner
        self._slots = slots
        self._table = SlotTable(slots.rows)
        self._num_blocks = num_blocks
        self._rows = rows
        self._max_rank = max_rank
        self._sampler = Sampler(kernels.argmax)

    @classmethod
    def open(cls, base: BaseModel, *, rows: int = 32, tokens: int = 16384, max_rank: int = 256) -> Offline:
        """Puts cache, slots and runner around a base, and checks it as a server does at its start.

        Args:
            base: loaded with training=False; NF4 or 16 bit.
            rows: prompts in work at a time.
            tokens: room of the KV cache; also the longest prompt and reply together.
            max_rank: the largest rank that `load` takes; two adapters of it fit at once.
        Raises:
            BaseModelError: the base does not give transformers' own answers on this path.
            MemoryShort: there is no room for cache or slots.
        """
        shape = probe_kv_shape(base.model, base.device)
        kernels = choose_kernels(base.device, base.kernels.name, shape)
        num_blocks = -(-tokens // BLOCK_SIZE)
        try:
            slots = AdapterSlots(
                base.model,
                2 * bucket_of(max_rank),
                kernels.add_lora,
                kernels.copy_slot,
                head=head_path(base.model),
            )
            cache = KVCache(shape, num_blocks, base.device, tiled=kernels.tiled)
        except (MemoryError, RuntimeError) as error:
            raise MemoryShort(
                f"there is no room on {base.device} for a cache of {tokens} tokens and two adapters of rank {max_rank}"
                "; use a smaller base"
            ) from error
        runner = ModelRunner(
            base.model, slots=slots, cache=cache, kernels=kernels, host_adapter=lambda version: None, device=base.device
        )
        vocabulary = int(base.model.get_input_embeddings().num_embeddings)  # type: ignore[operator]
        checker = Checker(runner, slots, base.model, vocabulary=vocabulary, num_blocks=num_blocks, rows=rows)
        return cls(
            base,
            runner,
            slots,
            num_blocks=num_blocks,
            rows=rows,
            max_rank=max_rank,
            kernels=kernels,
            checked=checker.run(),
        )

    def load(self, directory: Path) -> Adapter:
        """Checks a PEFT directory as an upload is checked, and copies it into a slot.

        Raises:
            AdapterRejected, BaseMismatch: a server of this base would not take it.
            MemoryShort: the slots are full; `unload` one.
        """
        checked = check_adapter(directory, self.base.info(), self._max_rank)
        version = checked.version
        acquired = self._table.acquire(version, checked.rank)
        if acquired is None:
            raise MemoryShort(f"there is no slot left for an adapter of rank {checked.rank}; unload one first")
        if acquired.is_new:
            self._slots.load(acquired.slot, load_host_adapter(directory, version, self.base.kernels.convert))
        return Adapter(directory, version, checked.rank, acquired.slot, checked.base_verified)

    def unload(self, adapter: Adapter) -> None:
        """Gives the adapter's slot back; once for each `load`."""
        self._table.release(adapter.version)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        adapter: Adapter | None,
        *,
        max_tokens: int,
        stop_ids: frozenset[int],
    ) -> list[Reply]:
        """Greedy replies, in the order of the prompts.

        Args:
            prompts: token ids, at least one each.
            adapter: None asks the bare base.
            max_tokens: most tokens of a reply, at least 1.
            stop_ids: a reply ends where one of these is chosen.
        Raises:
            DataError: a prompt and its reply do not fit into the context.
            SequenceFailed: the model's output is not finite.
        """
        rows = [(prompt, ()) for prompt in prompts]
        replies = self.ask(rows, adapter, max_tokens=max_tokens, stop_ids=stop_ids).replies
        return [replies[tuple(prompt)] for prompt in prompts]

    def score(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]], adapter: Adapter | None) -> list[list[float]]:
        """Log probability of each token of each continuation after its prompt; arguments as in `ask`."""
        return [[token.logprob for token in found] for found in self.ask(rows, adapter).scores]

    def ask(
        self,
        rows: Sequence[tuple[Sequence[int], Sequence[int]]],
        adapter: Adapter | None,
        *,
        max_tokens: int = 0,
        stop_ids: frozenset[int] = frozenset(),
    ) -> Asked:
        """Scores continuations and, where `max_tokens` is positive, answers their prompts too.

        A prompt that several rows share is read once, for its reply as well; continuations of one token cost nothing
        more than that.

        Args:
            rows: (prompt, continuation) as token ids, at least one in a prompt.
            adapter: None asks the bare base.
        Raises:
            DataError: a prompt and what follows do not fit into the context.
            SequenceFailed: the model's output is not finite.
        """
        groups: dict[tuple[int, ...], dict[int, list[int]]] = {}
        for index, (prompt, continuation) in enumerate(rows):
            groups.setdefault(tuple(prompt), {})[index] = list(continuation)
        more = {prompt: max(1, max_tokens, *map(len, tails.values())) - 1 for prompt, tails in groups.items()}
        self._check(more)
        params = SamplingParams(temperature=0.0, max_tokens=max(1, max_tokens), logprobs=0, stop_token_ids=stop_ids)
        pool = Pool(self._runner, self._num_blocks, None if adapter is None else adapter.slot, list(groups))
        asked = Asked([[] for _ in rows], {})
        waiting = deque(groups)
        while waiting:
            wave: list[EngineSequence] = []
            while waiting and len(wave) < self._rows:
                sequence = pool.sequence(waiting[0], more[waiting[0]], params)
                if sequence is None:
                    break
                waiting.popleft()
                wave.append(sequence)
            self._read(pool, wave, groups, asked, reply=max_tokens > 0)
            if max_tokens:
                self._reply(pool, wave, asked)
            for sequence in wave:
                pool.free(sequence)
        return asked

    def _read(
        self,
        pool: Pool,
        wave: list[EngineSequence],
        groups: dict[tuple[int, ...], dict[int, list[int]]],
        asked: Asked,
        *,
        reply: bool,
    ) -> None:
        """Reads prompts and scores their continuations; with `reply` chooses the first token of each reply too."""
        works = [turns(sequence, groups[tuple(sequence.prompt)]) for sequence in wave]
        whose = {id(each[0]): sequence for each, sequence in zip(works, wave, strict=True)}
        for turn in range(max(map(len, works))):
            for logits, owners in pool.feed(each[turn] for each in works if turn < len(each)):
                logprobs = logits.float().log_softmax(-1)
                best = logprobs.argmax(-1).tolist()
                for row, (work, position) in enumerate(owners):
                    for index, token in work.wanted[position - work.heads]:
                        asked.scores[index].append(TokenScore(logprobs[row, token].item(), token == best[row]))
                if reply and turn == 0:
                    ends = [row for row, (work, position) in enumerate(owners) if position == work.heads]
                    self._choose(logits[ends], [whose[id(owners[row][0])] for row in ends], asked)
        for sequence in wave:
            sequence.num_computed = len(sequence.prompt)

    def _reply(self, pool: Pool, wave: list[EngineSequence], asked: Asked) -> None:
        """Goes on with replies until each has ended."""
        while running := [sequence for sequence in wave if not _is_done(sequence, asked)]:
            for logits, owners in pool.feed(Work(sequence, sequence.num_tokens - 1) for sequence in running):
                self._choose(logits, [work.sequence for work, _ in owners], asked)

    def _choose(self, logits: torch.Tensor, sequences: list[EngineSequence], asked: Asked) -> None:
        """One greedy token for each sequence; a stop token is not kept."""
        for sequence, sampled in zip(sequences, self._sampler.sample(logits, sequences), strict=True):
            if sampled.error is not None or sampled.logprob is None:
                raise SequenceFailed(sampled.error or "no token was chosen")
            prompt = tuple(sequence.prompt)
            reply = asked.replies.setdefault(prompt, Reply(sequence.output, [], ended=False))
            if sampled.token_id in sequence.params.stop_token_ids:
                asked.replies[prompt] = replace(reply, ended=True)
            else:
                sequence.output.append(sampled.token_id)
                reply.logprobs.append(sampled.logprob.logprob)

    def _check(self, more: Mapping[tuple[int, ...], int]) -> None:
        """more: prompt -> tokens fed after it."""
        for prompt, following in more.items():
            if not prompt:
                raise DataError("a prompt has no tokens; the base needs at least one to answer")
            if len(prompt) + following > self.context:
                raise DataError(
                    f"a prompt of {len(prompt)} tokens and {following} after it do not fit into the context of "
                    f"{self.context} tokens; use shorter examples"
                )


def _is_done(sequence: EngineSequence, asked: Asked) -> bool:
    return asked.replies[tuple(sequence.prompt)].ended or len(sequence.output) == sequence.params.max_tokens
