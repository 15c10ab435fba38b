"""Stand-ins for what the engine's policy drives: a device, a host cache, a clock, metrics. They check as they go."""

from __future__ import annotations

import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterable

from loramux_adapters.lora.host_cache import LoadState
from loramux_server.engine.scheduling.kv_blocks import KVBlocks
from loramux_server.engine.scheduling.sequence import (
    AdapterUse,
    Batch,
    RowResult,
    SamplingParams,
    ScheduledSequence,
    Sequence,
    TokenLogprob,
)

VOCABULARY = 1000
Kind = tuple[tuple[str, float], ...]  # (version, factor) of each adapter
Cell = tuple[Kind, int]  # what the fake cache holds for one position: adapters, token id


class FakeClock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class FakeHost:
    """A host cache whose loads end when the test says so, or at once with `instant`."""

    def __init__(self, *, instant: bool = True, on_ready: Callable[[], None] = lambda: None) -> None:
        self.instant = instant
        self.on_ready = on_ready
        self.pins: Counter[str] = Counter()
        self.states: dict[str, LoadState] = {}
        self.requests: list[str] = []  # every load that was started
        self.broken: set[str] = set()  # versions whose load fails

    def request(self, version: str) -> LoadState:
        if version not in self.states:
            self.requests.append(version)
            self.states[version] = LoadState.LOADING
            if self.instant:
                self.end_load(version)
        state = self.states[version]
        if state is LoadState.FAILED:
            del self.states[version]
        return state

    def failure(self, version: str) -> str | None:
        return f"version {version} is broken" if version in self.broken else None

    def pin(self, version: str) -> None:
        self.pins[version] += 1

    def unpin(self, version: str) -> None:
        assert self.pins[version] > 0, f"{version} is unpinned more often than pinned"
        self.pins[version] -= 1

    @property
    def pinned(self) -> set[str]:
        return {version for version, count in self.pins.items() if count}

    @property
    def loading(self) -> list[str]:
        return [version for version, state in self.states.items() if state is LoadState.LOADING]

    def end_load(self, version: str) -> None:
        self.states[version] = LoadState.FAILED if version in self.broken else LoadState.READY
        self.on_ready()

    def evict_unpinned(self) -> None:
        for version, state in list(self.states.items()):
            if state is LoadState.READY and version not in self.pinned:
                del self.states[version]


class FakeRunner:
    """A device with an arena of slots and a KV cache. It refuses to compute on what another sequence or version wrote.

    The next token depends on everything in the sequence's part of the cache, so a wrong chunk, a lost or shared block,
    or a wrong adapter shows as a wrong reply: compare with `solo_reply`.
    """

    def __init__(self, rows: int, blocks: KVBlocks, host: FakeHost | None = None) -> None:
        self.arena: list[str | None] = [None] * rows
        self.cache: list[list[Cell | None]] = [[None] * blocks.block_size for _ in range(blocks.num_blocks)]
        self.host = host
        self.batches: list[Batch] = []
        self.failures: list[Exception] = []  # raised by the next steps, one each
        self.row_errors: dict[str, str] = {}  # sequence id -> error
        self.gate = threading.Event()  # a step waits for it
        self.gate.set()
        self.entered = threading.Event()  # a step has begun

    def run(self, batch: Batch) -> list[RowResult]:
        self.batches.append(batch)
        self.entered.set()
        assert self.gate.wait(10), "the test forgot to open the gate"
        for load in batch.slot_loads:
            assert self.host is None or self.host.states.get(load.version) is LoadState.READY
            window = range(load.slot.offset, load.slot.offset + load.slot.rank)
            for row in window:
                self.arena[row] = load.version
        if self.failures:
            raise self.failures.pop(0)
        return [token for row in batch.rows if (token := self._forward(row)) is not None]

    def _forward(self, row: ScheduledSequence) -> RowResult | None:
        sequence = row.sequence
        self._check_slots(sequence)
        tokens = sequence.tokens_from(sequence.num_computed, row.num_tokens)
        assert len(tokens) == row.num_tokens >= 1
        block_size = len(self.cache[0])
        for position, token in enumerate(tokens, sequence.num_computed):
            self.cache[sequence.blocks[position // block_size]][position % block_size] = (kind_of(sequence), token)
        if not row.num_logits:
            return None
        end = sequence.num_computed + row.num_tokens
        assert not row.samples or end == sequence.num_tokens, "a token is chosen before all before it is in the cache"
        cells = [self.cache[sequence.blocks[position // block_size]][position % block_size] for position in range(end)]
        return RowResult(
            next_token(cells) if row.samples else None,
            error=self.row_errors.get(sequence.id),
            scores=[
                fake_score(cells[: position + 1], token)
                for position in range(end - row.num_scored, end)
                for token in sequence.scored_at(position)
            ],
        )

    def _check_slots(self, sequence: Sequence) -> None:
        for use, scaled in zip(sequence.adapters, sequence.slots, strict=True):
            held = set(self.arena[scaled.slot.offset : scaled.slot.offset + scaled.slot.rank])
            assert held == {use.version}, f"{sequence.id} would compute with {held}"
            assert scaled.scale == use.scale


def kind_of(sequence: Sequence) -> Kind:
    return tuple((use.version, use.scale) for use in sequence.adapters)


def next_token(cells: Iterable[Cell | None]) -> int:
    return zlib.crc32(repr(list(cells)).encode()) % VOCABULARY


def fake_score(cells: Iterable[Cell | None], token: int) -> TokenLogprob:
    """How likely the token is behind these: a number that depends on all of them."""
    return TokenLogprob(token, -float(zlib.crc32(repr([*cells, token]).encode())))


def solo_reply(sequence: Sequence) -> list[int]:
    """The tokens this sequence must get, whatever else runs."""
    cells: list[Cell | None] = [(kind_of(sequence), token) for token in sequence.prompt]
    reply: list[int] = []
    while len(reply) < sequence.params.max_tokens:
        token = next_token(cells)
        if token in sequence.params.stop_token_ids:
            break
        reply.append(token)
        cells.append((kind_of(sequence), token))
    return reply


def solo_scores(sequence: Sequence) -> tuple[list[TokenLogprob], list[list[TokenLogprob]]]:
    """The scores this sequence must get, whatever else runs: of its prompt, and of each continuation."""
    kind, params = kind_of(sequence), sequence.params
    cells = [(kind, token) for token in sequence.prompt]

    def scores(start: int, text: list[Cell]) -> list[TokenLogprob]:
        return [fake_score(text[:place], text[place][1]) for place in range(start, len(text))]

    return (
        [] if params.prompt_logprobs is None else scores(params.prompt_logprobs_from, cells),
        [scores(len(cells), [*cells, *((kind, token) for token in tokens)]) for tokens in params.continuations],
    )


class FakeMetrics:
    """Keeps every call: (name, arguments)."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[object, ...]]] = []

    def of(self, name: str) -> list[tuple[object, ...]]:
        return [arguments for called, arguments in self.calls if called == name]

    def step_done(self, batch_size: int, distinct_adapters: int, seconds: float) -> None:
        self.calls.append(("step_done", (batch_size, distinct_adapters, seconds)))

    def queued(self, seconds: float) -> None:
        self.calls.append(("queued", (seconds,)))

    def first_token(self, seconds: float) -> None:
        self.calls.append(("first_token", (seconds,)))

    def inter_token(self, seconds: float) -> None:
        self.calls.append(("inter_token", (seconds,)))

    def tokens(self, adapter: str | None, prompt: int, generated: int) -> None:
        self.calls.append(("tokens", (adapter, prompt, generated)))

    def prefix_looked_up(self, found: int, tokens: int) -> None:
        self.calls.append(("prefix_looked_up", (found, tokens)))

    def slot_loaded(self, seconds: float) -> None:
        self.calls.append(("slot_loaded", (seconds,)))

    def evicted(self, count: int) -> None:
        self.calls.append(("evicted", (count,)))

    def aborted(self) -> None:
        self.calls.append(("aborted", ()))


def sequence(
    id: str,
    *,
    prompt: int = 4,
    text: str | None = None,
    max_tokens: int = 3,
    version: str | None = None,
    rank: int = 8,
    nbytes: int = 0,
    stop: Iterable[int] = (),
    uses: Iterable[AdapterUse] = (),
    background: bool = False,
    arrived: float = 0.0,
    scored_from: int | None = None,
    continuations: Iterable[tuple[int, ...]] = (),
) -> Sequence:
    """A sequence whose prompt is `prompt` tokens that only it has; with one adapter, `version`, or with `uses`.

    With `text`, its prompt is what all prompts of this text begin with. `scored_from`: the first prompt token whose log
    probability is asked for.
    """
    tokens = [zlib.crc32(f"{text or id} {position}".encode()) % VOCABULARY for position in range(prompt)]
    params = SamplingParams(
        max_tokens=max_tokens,
        stop_token_ids=frozenset(stop),
        prompt_logprobs=None if scored_from is None else 0,
        prompt_logprobs_from=scored_from or 1,
        continuations=tuple(continuations),
    )
    adapters = tuple(uses) if version is None else (AdapterUse(version, rank, nbytes),)
    name = "+".join(use.version for use in adapters) or None
    return Sequence(id, tokens, params, adapters, adapter=name, background=background, arrived=arrived)
