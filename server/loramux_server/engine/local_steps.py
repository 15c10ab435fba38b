"""How a pile of prompts becomes steps of the model runner: blocks, a shared beginning, steps of a server's size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from loramux_adapters.lora.slots import ScaledSlot, Slot
from loramux_server.engine.kv_blocks import KVBlocks
from loramux_server.engine.model_runner import ModelRunner
from loramux_server.engine.sequence import Batch, SamplingParams, ScheduledSequence
from loramux_server.engine.sequence import Sequence as EngineSequence
from loramux_server.kernels.kv_cache import BLOCK_SIZE

STEP_TOKENS = 256  # most tokens of a step: up to here every kernel's rows are known not to depend on their neighbours
STEP_HEADS = 64  # most rows that the output head sees in a step; the same holds for it
GREEDY = SamplingParams(temperature=0.0, max_tokens=1, logprobs=0)


@dataclass(eq=False, slots=True)
class Work:
    """A sequence whose tokens from `num_computed` on are to be fed.

    Attributes:
        heads: logits are asked for from this position on.
        wanted: for each of these positions, (row of the caller, token) whose log probability is asked for.
    """

    sequence: EngineSequence
    heads: int
    wanted: list[list[tuple[int, int]]] = field(default_factory=list)


class Pool:
    """The cache of one call: sequences of one adapter (or of the base), and the beginning that all of them share.

    Keys and values of the shared beginning are computed once. Its blocks are full ones, so nobody writes to them again.
    """

    def __init__(
        self, runner: ModelRunner, num_blocks: int, slot: Slot | None, prompts: Sequence[Sequence[int]]
    ) -> None:
        """`prompts`: all that this call will ask, at least one token each."""
        self._runner = runner
        self._slot = slot
        self._blocks = KVBlocks(num_blocks, BLOCK_SIZE)
        self._shared: list[int] = []
        length = _shared_length(prompts)
        if length:
            beginning = self.sequence(prompts[0][:length], 0)
            assert beginning is not None  # it is shorter than a prompt, and any prompt fits
            for _ in self.feed([Work(beginning, length)]):
                pass
            self._shared = beginning.blocks

    def sequence(
        self, prompt: Sequence[int], more: int, params: SamplingParams = GREEDY, name: str = ""
    ) -> EngineSequence | None:
        """A sequence with room for `more` tokens after its prompt, or None if there is none now."""
        needed = self._blocks.blocks_for(len(prompt) + more) - len(self._shared)
        blocks = self._blocks.allocate(needed)
        if blocks is None:
            return None
        sequence = EngineSequence(name, list(prompt), params)
        sequence.slots = () if self._slot is None else (ScaledSlot(self._slot),)
        sequence.blocks = [*self._shared, *blocks]
        sequence.num_computed = len(self._shared) * BLOCK_SIZE
        return sequence

    def free(self, sequence: EngineSequence) -> None:
        self._blocks.free(sequence.blocks[len(self._shared) :])

    def feed(self, works: Iterable[Work]) -> Iterator[tuple[torch.Tensor, list[tuple[Work, int]]]]:
        """Feeds all tokens; for each step logits [n, vocabulary] and the (work, position) that each row belongs to.

        A sequence may come several times in one step, a piece each: keys and values of a whole step are written before
        any of its rows looks at them.
        """
        batch, owners, tokens = Batch(), list[tuple[Work, int]](), 0
        for work in works:
            sequence, end = work.sequence, work.sequence.num_tokens
            while (first := sequence.num_computed) < end:
                count = 1 if first > work.heads else min(work.heads + 1, end) - first
                count = min(count, STEP_TOKENS - tokens)
                samples = first + count > work.heads
                batch.rows.append(ScheduledSequence(replace(sequence), count, samples))
                sequence.num_computed += count
                tokens += count
                if samples:
                    owners.append((work, first + count - 1))
                if tokens == STEP_TOKENS or len(owners) == STEP_HEADS:
                    yield self._runner.forward(batch), owners
                    batch, owners, tokens = Batch(), [], 0
        if batch.rows:
            yield self._runner.forward(batch), owners


def turns(sequence: EngineSequence, continuations: dict[int, list[int]]) -> list[Work]:
    """What is fed for one prompt, one after the other: the prompt with a first continuation, then each further one.

    Further ones overwrite the keys and values behind the prompt, which by then nobody looks at any more.
    """
    long = [index for index, tokens in continuations.items() if len(tokens) > 1]
    rest = {index: [[(index, token)] for token in continuations[index][1:]] for index in long}
    end = len(sequence.prompt)
    first = [(index, tokens[0]) for index, tokens in continuations.items() if tokens]
    works = []
    for turn, index in enumerate(long or [next(iter(continuations))]):
        fed = replace(sequence, prompt=sequence.prompt + continuations[index][:-1], output=[])
        if turn:
            fed.num_computed = end
            works.append(Work(fed, end, rest[index]))
        else:
            works.append(Work(fed, end - 1, [first, *rest.get(index, [])]))
    return works


def _shared_length(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens of whole blocks that all prompts begin with; the last token of each is left out, it is always fed."""
    if len(prompts) < 2:
        return 0
    ordered = sorted(map(tuple, prompts))
    first, last = ordered[0], ordered[-1]  # all others lie between these two
    shortest = min(len(prompt) for prompt in prompts) - 1
    common = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), shortest)
    return min(common, shortest) // BLOCK_SIZE * BLOCK_SIZE
