"""The engine that serves, in this process and without HTTP: for evaluation, fingerprints and merge checks.

Scheduler, step and kernels are a server's, so a reply has the bits that a server of the same numerics id gives.
"""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from loramux_adapters.artifact.own_tokens import OwnTokens
from loramux_adapters.errors import DataError
from loramux_adapters.evaluation.scores import TokenScore
from loramux_adapters.lora.host_cache import HostAdapter, LoadState
from loramux_adapters.lora.slots import bucket_of
from loramux_adapters.lora.verify import check_adapter
from loramux_server.base.loader import BaseModel
from loramux_server.engine.build import DeviceSide
from loramux_server.engine.engine import Engine
from loramux_server.engine.inbox import Inbox
from loramux_server.engine.scheduling.admission import LEAST_RANKS, SchedulerConfig
from loramux_server.engine.scheduling.sequence import AdapterUse, FinishReason, Pooling, SamplingParams, TokenOutput
from loramux_server.engine.scheduling.sequence import Sequence as EngineSequence
from loramux_server.engine.step_metrics import NoMetrics
from loramux_server.errors import SequenceFailed
from loramux_server.kernels.attention.kv_cache import BLOCK_SIZE
from loramux_server.kernels.attention.paged_attention import probe_kv_shape

STEP_TOKENS = 256  # most tokens of a step: up to here every kernel's rows are known not to depend on their neighbours
KEPT_SHARE = 8  # of the cache, an eighth is kept for prompts that begin alike

Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LocalAdapter:
    """An adapter of the `LocalEngine` that loaded it.

    Attributes:
        version: the content digest that a store would give it.
        base_verified: it names the base it was loaded on.
        chat_template: that it brings in place of the base's.
        own_tokens: that it adds to the base's tokenizer.
    """

    directory: Path
    version: str
    rank: int
    base_verified: bool
    chat_template: str | None = None
    own_tokens: OwnTokens | None = None


@dataclass(frozen=True, slots=True)
class LocalReply:
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
    """What `LocalEngine.ask` found out.

    Attributes:
        scores: for each row, of each token of its continuation.
        replies: prompt -> greedy reply; empty unless replies were asked for.
    """

    scores: list[list[TokenScore]]
    replies: dict[Tokens, LocalReply]


class LocalEngine:
    """A base and its adapters, asked in batches. One thread uses it; the base's model is its own from now on.

    Attributes:
        context: longest prompt and reply together.
    """

    def __init__(
        self, base: BaseModel, device: DeviceSide, engine: Engine, host: LoadedAdapters, max_rank: int
    ) -> None:
        """Use `open`."""
        self.base = base
        self.checked = device.checked
        self.numerics_id = device.numerics_id
        self.context = min(base.context_length, device.cache.num_blocks * BLOCK_SIZE)
        self._engine = engine
        self._host = host
        self._max_rank = max_rank

    @classmethod
    def open(
        cls, base: BaseModel, *, rows: int = 32, tokens: int = 16384, max_rank: int = 256, check: bool = True
    ) -> LocalEngine:
        """Puts an engine around a base and checks it as a server does at its start.

        Args:
            base: loaded with training=False; NF4 or 16 bit.
            rows: prompts in work at a time.
            tokens: room of the KV cache; also the longest prompt and reply together.
            max_rank: the largest rank that `load` takes; two adapters of it fit on the device at once.
            check: False for a slow path that is only compared with, on which the checks take long.
        Raises:
            BaseModelError: the base does not give transformers' own answers on this path.
            MemoryShort: there is no room for cache or adapters.
        """
        host = LoadedAdapters()
        device = DeviceSide.build(
            base,
            probe_kv_shape(base.model, base.device, whole_numbers=base.kernels.whole_numbers),
            host.get,
            config=SchedulerConfig(
                max_num_seqs=rows, max_batch_tokens=STEP_TOKENS, max_ranks=max(LEAST_RANKS, 2 * bucket_of(max_rank))
            ),
            arena_rows=2 * bucket_of(max_rank),
            num_blocks=-(-tokens // BLOCK_SIZE),
            check=check,
        )
        engine = device.engine(
            host,
            Inbox(max_waiting=sys.maxsize),
            NoMetrics(),
            kept_blocks=device.cache.num_blocks // KEPT_SHARE,
        )
        return cls(base, device, engine, host, max_rank)

    def load(self, directory: Path) -> LocalAdapter:
        """Checks a PEFT directory as an upload is checked, and holds it in memory until `unload`.

        Raises:
            AdapterRejected, BaseMismatch: a server of this base would not take it.
        """
        checked = check_adapter(directory, self.base.info(), self._max_rank)
        if self._host.get(checked.version) is None:
            self._host.add(checked.adapter)
        else:
            self._host.pin(checked.version)
        return LocalAdapter(
            directory,
            checked.version,
            checked.rank,
            checked.base_verified,
            checked.chat_template,
            checked.own_tokens,
        )

    def unload(self, adapter: LocalAdapter) -> None:
        """Lets the adapter go; once for each `load`."""
        self._host.unpin(adapter.version)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        adapter: LocalAdapter | None,
        *,
        max_tokens: int,
        stop_ids: frozenset[int],
    ) -> list[LocalReply]:
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

    def score(
        self, rows: Sequence[tuple[Sequence[int], Sequence[int]]], adapter: LocalAdapter | None
    ) -> list[list[float]]:
        """Log probability of each token of each continuation after its prompt; arguments as in `ask`."""
        return [[token.logprob for token in found] for found in self.ask(rows, adapter).scores]

    def ask(
        self,
        rows: Sequence[tuple[Sequence[int], Sequence[int]]],
        adapter: LocalAdapter | None,
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
        groups: dict[Tokens, list[Tokens]] = {}
        for prompt, continuation in rows:
            groups.setdefault(tuple(prompt), []).append(tuple(continuation))
        continuations = {prompt: _longest(each) for prompt, each in groups.items()}
        self._check({prompt: max(1, max_tokens, *map(len, each)) - 1 for prompt, each in continuations.items()})
        asked = {
            prompt: self._sequence(str(index), prompt, each, adapter, max_tokens, stop_ids)
            for index, (prompt, each) in enumerate(continuations.items())
            if each or max_tokens
        }
        outputs = self._run(asked.values())
        scores: list[list[TokenScore]] = []
        for prompt, continuation in rows:
            wanted, found = tuple(continuation), list[TokenScore]()
            if wanted:
                place = bisect_left(continuations[tuple(prompt)], wanted)  # of the first that begins with it
                logprobs = outputs[asked[tuple(prompt)].id][-1].continuations[place]
                found = [TokenScore(one.logprob, one.is_greedy) for one in logprobs[: len(wanted)]]
            scores.append(found)
        replies = {prompt: _reply(outputs[one.id]) for prompt, one in asked.items()} if max_tokens else {}
        return Asked(scores, replies)

    def embed(
        self, prompts: Sequence[Sequence[int]], adapter: LocalAdapter | None, pooling: Pooling
    ) -> list[npt.NDArray[np.float64]]:
        """What the output head reads, [hidden], of each prompt's last token or the mean over its tokens.

        Raises:
            DataError: a prompt does not fit into the context.
            SequenceFailed: the model's output is not finite.
        """
        self._check({tuple(prompt): 0 for prompt in prompts})
        params = SamplingParams(max_tokens=0, pooling=pooling)
        uses = self._uses(adapter)
        asked = [EngineSequence(str(at), list(prompt), params, uses) for at, prompt in enumerate(prompts)]
        told = (outputs[-1].pooled for outputs in self._run(asked).values())
        return [pooled for pooled in told if pooled is not None]

    def _sequence(
        self,
        name: str,
        prompt: Tokens,
        continuations: list[Tokens],
        adapter: LocalAdapter | None,
        max_tokens: int,
        stop_ids: frozenset[int],
    ) -> EngineSequence:
        params = SamplingParams(
            temperature=0.0,
            max_tokens=max_tokens,
            logprobs=0,
            stop_token_ids=stop_ids,
            continuations=tuple(continuations),
        )
        return EngineSequence(name, list(prompt), params, self._uses(adapter))

    def _uses(self, adapter: LocalAdapter | None) -> tuple[AdapterUse, ...]:
        return () if adapter is None else (AdapterUse(adapter.version, adapter.rank),)

    def _run(self, sequences: Iterable[EngineSequence]) -> dict[str, list[TokenOutput]]:
        """All outputs of each."""
        outputs: dict[str, list[TokenOutput]] = {}
        for sequence in sequences:
            outputs[sequence.id] = []
            self._engine.submit(sequence)

        def deliver(delivered: list[tuple[str, TokenOutput]]) -> None:
            for name, output in delivered:
                outputs[name].append(output)

        self._engine.work_off(deliver)
        for last in (found[-1] for found in outputs.values()):
            if last.finish_reason not in (FinishReason.STOP, FinishReason.LENGTH):
                raise SequenceFailed(last.error or "no token was chosen")
        return outputs

    def _check(self, more: Mapping[Tokens, int]) -> None:
        """more: prompt -> tokens fed after it."""
        for prompt, following in more.items():
            if not prompt:
                raise DataError("a prompt has no tokens; the base needs at least one to answer")
            if len(prompt) + following > self.context:
                raise DataError(
                    f"a prompt of {len(prompt)} tokens and {following} after it do not fit into the context of "
                    f"{self.context} tokens; use shorter examples"
                )


class LoadedAdapters:
    """Adapters in memory, as an engine's scheduler and runner ask for them; each stays while somebody pins it."""

    def __init__(self) -> None:
        self._held: dict[str, HostAdapter] = {}
        self._pins: Counter[str] = Counter()

    def add(self, adapter: HostAdapter) -> None:
        """Takes it, with a pin."""
        self._held[adapter.version] = adapter
        self._pins[adapter.version] += 1

    def get(self, version: str) -> HostAdapter | None:
        return self._held.get(version)

    def request(self, version: str) -> LoadState:
        return LoadState.READY if version in self._held else LoadState.FAILED

    def failure(self, version: str) -> str | None:
        return None if version in self._held else "the adapter is not loaded"

    def pin(self, version: str) -> None:
        self._pins[version] += 1

    def unpin(self, version: str) -> None:
        self._pins[version] -= 1
        if not self._pins[version]:
            del self._pins[version]
            self._held.pop(version, None)

    def bytes_beside(self, version: str) -> int:
        adapter = self._held.get(version)
        return 0 if adapter is None or adapter.tokens is None else adapter.tokens.nbytes


def _longest(continuations: list[Tokens]) -> list[Tokens]:
    """In order, those that are not the beginning of another: their scores hold those of all."""
    ordered = sorted(set(continuations))
    return [one for one, following in pairwise([*ordered, ()]) if one and following[: len(one)] != one]


def _reply(outputs: list[TokenOutput]) -> LocalReply:
    tokens = [output.token_id for output in outputs if output.token_id is not None]
    logprobs = [output.logprob.logprob for output in outputs if output.logprob is not None]
    return LocalReply(tokens, logprobs, outputs[-1].finish_reason is FinishReason.STOP)
