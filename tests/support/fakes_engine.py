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
    SequenceStatus,
    SlotLoad,
    TokenLogprob,
)
from loramux_server.errors import GrammarFailed, MaskLate

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
        self.beside: dict[str, int] = {}  # bytes of versions that take some beside their slot

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

    def bytes_beside(self, version: str) -> int:
        return self.beside.get(version, 0) if self.states.get(version) is LoadState.READY else 0

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

    With `ahead` it is as late as a device may be: a step is done when its results are asked for, on what was given when
    it was started, behind all steps before it, also where its sequences have ended since.
    """

    def __init__(self, rows: int, blocks: KVBlocks, host: FakeHost | None = None, *, ahead: bool = False) -> None:
        self.arena: list[str | None] = [None] * rows
        self.cache: list[list[Cell | None]] = [[None] * blocks.block_size for _ in range(blocks.num_blocks)]
        self.blocks = blocks
        self.host = host
        self.ahead = ahead
        self.batches: list[Batch] = []
        self.failures: list[Exception] = []  # raised by the next steps, one each
        self.start_failures: list[Exception] = []  # raised where the next steps are started, one each
        self.row_errors: dict[str | tuple[str, int], str] = {}  # sequence id, or id and token of the reply -> error
        self.gate = threading.Event()  # a step waits for it
        self.gate.set()
        self.entered = threading.Event()  # a step has begun
        self.scores_ahead = False  # a step may be started before scores of the one before are read, too
        self.started_ahead = 0  # steps that were started before the results of the one before were read
        self._last: FakeStep | None = None

    def start(self, batch: Batch) -> FakeStep:
        self.batches.append(batch)
        for load in batch.slot_loads:
            assert self.host is None or self.host.states.get(load.version) is LoadState.READY
        if self.start_failures:
            raise self.start_failures.pop(0)
        before, self._last = self._last, FakeStep(self, batch, self._last)
        if before is not None and not before.is_read:
            assert before.ahead, "a step was started before results that the host needs were read"
            assert before.before is None or before.before.is_read, "three steps at a time"
            self.started_ahead += 1
        self.entered.set()
        if not self.ahead:
            self._last.run()
        return self._last

    def fill_slot(self, load: SlotLoad) -> None:
        for row in range(load.slot.offset, load.slot.offset + load.slot.rank):
            self.arena[row] = load.version


class FakeStep:
    """A step of a `FakeRunner`. It may be read before the next is started, or after."""

    def __init__(self, runner: FakeRunner, batch: Batch, before: FakeStep | None) -> None:
        self.before = before  # until it is done
        self.ahead = runner.ahead and (runner.scores_ahead or not any(row.num_scored for row in batch.rows))
        self.is_read = self.is_done = self.has_failed = False
        self.chosen: dict[Sequence, int] = {}
        self._is_on_top = before is not None and not before.is_read
        self._runner = runner
        self._loads = [load for load in batch.slot_loads if load.in_use]
        for load in batch.slot_loads:
            if not load.in_use:  # as early as a copy beside the steps may be made
                runner.fill_slot(load)
        self._rows = [FakeRow(row, runner) for row in batch.rows]
        self._results: list[RowResult] = []
        self._check_memory(before)

    def results(self) -> list[RowResult]:
        assert not self.is_read
        self.is_read = True
        self.run()
        return self._results

    def run(self) -> None:
        """Does the work, once, after that of all steps before."""
        if self.is_done:
            return
        self.is_done = True
        before, self.before = self.before, None
        assert before is None or before.is_done, "results are read out of order"
        assert self._runner.gate.wait(10), "the test forgot to open the gate"
        for load in self._loads:
            self._runner.fill_slot(load)
        if self._runner.failures:
            self.has_failed = self.is_read = True
            raise self._runner.failures.pop(0)
        on_failed = self._is_on_top and before is not None and before.has_failed  # it ends with the other
        chosen = {} if before is None else before.chosen
        for row in self._rows:
            result = row.run(chosen, self.chosen, believed=not on_failed)
            self._results += [] if result is None else [result]

    def _check_memory(self, before: FakeStep | None) -> None:
        """Nobody writes to a block that another row of this step touches, or one of a step that is not done."""
        for row in self._rows:
            beside = [other for other in self._rows if other is not row]
            if before is not None and not before.is_done:
                beside += [one for one in before._rows if one.sequence is not row.sequence and not one.has_ended]
            for other in beside:
                assert not row.written & (other.written | other.read), "a block that others use is written to"


class FakeRow:
    """What a step takes of one sequence when it is started."""

    def __init__(self, row: ScheduledSequence, runner: FakeRunner) -> None:
        sequence, size = row.sequence, len(runner.cache[0])
        self.sequence, self.follows = sequence, row.follows
        self._runner, self._row = runner, row
        self._blocks, self._slots = list(sequence.blocks), sequence.slots
        self._tokens = sequence.tokens_from(row.first, row.num_tokens)
        self._end = row.first + row.num_tokens
        assert len(self._tokens) == (0 if row.follows else row.num_tokens)
        assert row.num_tokens >= 1 and not (row.follows and row.num_tokens > 1)
        places = range(row.first, self._end)
        self.written = {self._blocks[position // size] for position in places}
        self.read = {self._blocks[position // size] for position in range(self._end)}
        self._scored = [
            (position, token)
            for position in range(self._end - row.num_scored, self._end)
            for token in sequence.scored_at(position)
        ]
        known = len(sequence.prompt) + row.reply_index
        assert not row.samples or self._end == known, "a token is chosen before all before it is in the cache"

    @property
    def has_ended(self) -> bool:
        return self.sequence.status is SequenceStatus.FINISHED

    def run(self, before: dict[Sequence, int], chosen: dict[Sequence, int], *, believed: bool) -> RowResult | None:
        """before, chosen: what the step before chose, and what this one does."""
        runner, row, sequence = self._runner, self._row, self.sequence
        if believed:
            self._check_slots()
        tokens = [before.get(sequence, -1)] if self.follows else self._tokens
        size, kind = len(runner.cache[0]), kind_of(sequence)
        assert not any(runner.blocks.is_known(block) for block in self.written), "known content is written over"
        for position, token in enumerate(tokens, row.first):
            runner.cache[self._blocks[position // size]][position % size] = (kind, token)
        if not row.num_logits:
            return None
        cells = [runner.cache[self._blocks[position // size]][position % size] for position in range(self._end)]
        assert not believed or all(cell is not None and cell[0] == kind for cell in cells), "another's keys are read"
        is_late = row.samples and not _is_known(sequence)
        if row.samples and not is_late:
            chosen[sequence] = next_token(cells)
        return RowResult(
            chosen[sequence] if row.samples and not is_late else None,
            is_late=is_late,
            error=runner.row_errors.get(sequence.id, runner.row_errors.get((sequence.id, row.reply_index))),
            scores=[fake_score(cells[: position + 1], token) for position, token in self._scored],
        )

    def _check_slots(self) -> None:
        for use, scaled in zip(self.sequence.adapters, self._slots, strict=True):
            held = set(self._runner.arena[scaled.slot.offset : scaled.slot.offset + scaled.slot.rank])
            assert held == {use.version}, f"{self.sequence.id} would compute with {held}"
            assert scaled.scale == use.scale


def _is_known(sequence: Sequence) -> bool:
    """Whether its grammar has said what may come next."""
    if sequence.params.grammar is None or sequence.params.forced:
        return True
    try:
        sequence.params.grammar.mask(0.0)
    except MaskLate:
        return False
    except GrammarFailed:
        pass
    return True


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

    def mask_made(self, seconds: float) -> None:
        self.calls.append(("mask_made", (seconds,)))

    def sat_out(self, count: int) -> None:
        self.calls.append(("sat_out", (count,)))


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
    shares_prompt_with: str | None = None,
    tenant: str | None = None,
    weight: int = 1,
    priority: int = 0,
) -> Sequence:
    """A sequence whose prompt is `prompt` tokens that only it has; with one adapter, `version`, or with `uses`.

    With `text`, its prompt is what all prompts of this text begin with; with `shares_prompt_with`, that
    one's. `scored_from`: the first prompt token whose log probability is asked for.
    """
    text = text or shares_prompt_with or id
    tokens = [zlib.crc32(f"{text} {position}".encode()) % VOCABULARY for position in range(prompt)]
    params = SamplingParams(
        max_tokens=max_tokens,
        stop_token_ids=frozenset(stop),
        prompt_logprobs=None if scored_from is None else 0,
        prompt_logprobs_from=scored_from or 1,
        continuations=tuple(continuations),
    )
    adapters = tuple(uses) if version is None else (AdapterUse(version, rank, nbytes),)
    name = "+".join(use.version for use in adapters) or None
    return Sequence(
        id,
        tokens,
        params,
        adapters,
        adapter=name,
        background=background,
        shares_prompt_with=shares_prompt_with,
        arrived=arrived,
        tenant=tenant,
        weight=weight,
        priority=priority,
    )
