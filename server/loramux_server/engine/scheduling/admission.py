"""Who may start: whose turn it is, what each waiting sequence still lacks, and how long others may pass it.

A sequence starts only with everything it will ever need: a seat, KV blocks for its whole length, and a pinned
slot for each of its adapters. So nothing that runs can run out later, and there is no preemption.

Sequences of one flow wait in a line, first come, first served. The flow that got least (fair_share.py) has the first
turn. Whose turn it is may lack

    an adapter in host memory (loading)    its line has no turn: a load ends by itself
    slots or KV blocks (blocked)           passed over `max_passed_over` times or for `max_wait_seconds`, then it is a
                                           barrier: nobody starts whose turn comes after it
    a seat, or a token left in the step    nobody starts

Nothing starves: while others are served its turn comes, and while a barrier stands, no one new takes slots or blocks,
what runs ends, and then it fits. A sequence of several adapters takes its slots all at once. Unless all are on the
device, it holds all of them in host memory until then: so those that lie there in each other's way can be placed anew
(`SlotTable.acquire_all`).

Who shares a prompt with another that came before (`Sequence.shares_prompt_with`) is held in its line until the other's
prompt is in the cache, or the other has ended. Meanwhile it has no turn, so that nobody waits for it and it holds
nothing; then it takes the place that it came for, and finds all blocks of the prompt but the last, which is computed
again.

Background sequences have lines of their own. They start when no ordinary one could, beside its seats, in order of
arrival; and whoever has waited there for long joins the ordinary ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from heapq import heapify, heappop, heapreplace
from itertools import chain, count
from typing import Protocol

from loramux_adapters.lora.host_cache import LoadState
from loramux_adapters.lora.slots import ScaledSlot, SlotTable
from loramux_server.engine.scheduling.fair_share import FairShare, Line, Waiting, cost_of_prompt
from loramux_server.engine.scheduling.kv_blocks import KVBlocks, extend_keys
from loramux_server.engine.scheduling.sequence import Flow, Sequence, SequenceStatus, SlotLoad
from loramux_server.errors import ConfigError

LEAST_RANKS = 512  # that the adapters of one sequence may have together: two of the largest common rank
LEAST_COUNTED = 16  # of them: a step's tables are made of tiles of so many ranks
_MIB = 2**20
_AT_LEAST_ONE = ("max_num_seqs", "max_batch_tokens", "max_prefetch", "max_prefetch_bytes", "max_background_tokens")


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of the scheduler.

    Attributes:
        max_num_seqs: sequences that run at the same time.
        max_batch_tokens: tokens of one step; decodes always run, prefill gets what they leave.
        max_passed_over: sequences that may start before one whose turn it is and that lacks a slot or KV blocks. With 0
            the order of turns is strict.
        max_wait_seconds: how long it may be passed over at most, counted from when it was first found blocked.
        max_prefetch: distinct versions that waiting sequences may hold in host memory at the same time.
        max_prefetch_bytes: most that these may take there, or be about to once they are loaded; one is always held,
            whatever its size. What is held cannot be evicted, so it must fit the budget of the host cache.
        max_scored_tokens: tokens of one step that are scored as given text, beside one for each sequence. Their logits
            take memory: a number for each token of the vocabulary.
        max_background_tokens: most tokens of background sequences in one step, and of these sequences at a time.
        max_background_wait_seconds: how long a background sequence gives way before it counts as an ordinary one.
        max_adapters: of one sequence.
        max_ranks: of the adapters of one sequence together, each rounded up to a power of two of at least 16.
        long_from: sequences of more tokens, prompt and longest reply together, are long (Sequence.is_long); 0: none is.
    """

    max_num_seqs: int = 32
    max_batch_tokens: int = 128
    max_passed_over: int = 32
    max_wait_seconds: float = 2.0
    max_prefetch: int = 16
    max_prefetch_bytes: int = 1 << 30
    max_scored_tokens: int = 32
    max_background_tokens: int = 6
    max_background_wait_seconds: float = 5.0
    max_adapters: int = 8
    max_ranks: int = LEAST_RANKS
    long_from: int = 0

    def __post_init__(self) -> None:
        for name in _AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("max_scored_tokens", "max_passed_over", "max_wait_seconds", "max_background_wait_seconds"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} cannot be negative, got {getattr(self, name)}")


class HostView(Protocol):
    """What the scheduler asks of the host cache. It never waits: `request` starts a load and says how far it is."""

    def request(self, version: str) -> LoadState: ...

    def failure(self, version: str) -> str | None: ...

    def pin(self, version: str) -> None:
        """Keeps the version once it is there; may be called before it is loaded."""

    def unpin(self, version: str) -> None: ...

    def bytes_beside(self, version: str) -> int:
        """What a version that is held takes on the device beside the memory of its rank."""


class Lack(Enum):
    """What keeps a sequence with its adapters at hand from starting."""

    BLOCKS = auto()  # of the KV cache: another of its line may need fewer
    SLOTS = auto()  # on the device: all of its line lack them


@dataclass(slots=True)
class Admitted:
    """Sequences that start in this step. Each version of `slot_loads` stays pinned in the host cache for its copy."""

    sequences: list[Sequence] = field(default_factory=list)
    slot_loads: list[SlotLoad] = field(default_factory=list)


class WaitingQueues:
    """Lines of sequences that wait. Owner: the engine thread.

    A step takes time by how many lines there are and by how many sequences start or are found blocked, not by how many
    wait.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        blocks: KVBlocks,
        slots: SlotTable,
        host: HostView,
        share: FairShare,
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._blocks = blocks
        self._slots = slots
        self._host = host
        self._share = share
        self._clock = clock
        self._lines: dict[Flow, Line] = {}
        self._background: dict[Flow, Line] = {}
        self._unread: dict[str, Flow] = {}  # of sequences here and running whose prompt is not in the cache yet, by id
        self._numbers = count()
        self.by_adapter: Counter[str | None] = Counter()  # how many wait, of the names they were asked for under

    def __len__(self) -> int:
        return sum(map(len, self.lines()))

    def __iter__(self) -> Iterator[Waiting]:
        """In order of arrival; for tests and aborts."""
        return iter(sorted(chain.from_iterable(self.lines()), key=lambda entry: entry.number))

    def lines(self) -> Iterable[Line]:
        """All of them, background ones last."""
        return chain(self._lines.values(), self._background.values())

    def add(self, sequence: Sequence) -> None:
        """Puts a new sequence at the end of its line, or has it held there."""
        assert sequence.status is SequenceStatus.WAITING, f"{sequence.id} has been scheduled before"
        if not sequence.background:
            self.by_adapter[sequence.adapter] += 1
        if not sequence.gives_way:
            self._share.enter(sequence.flow)
        self._enqueue(self._background if sequence.gives_way else self._lines, sequence)
        self._unread[sequence.id] = sequence.flow

    def release_held(self, sequence: Sequence) -> None:
        """Its prompt is in the cache, or never will be: it has ended. Nobody is held for it any more."""
        if self._unread.pop(sequence.id, None) is not None:
            for lines in (self._lines, self._background):
                if sequence.flow in lines:
                    lines[sequence.flow].release(sequence.id)

    def remove(self, ids: Collection[str]) -> list[Sequence]:
        """Takes these out of their lines, with their host pins; ids that are not waiting are ignored."""
        return self._leave([entry for entry in self if entry.sequence.id in ids]) if ids else []

    def prefetch(self) -> list[tuple[Sequence, str]]:
        """Asks the host cache, in order of turns, for versions that it must have, and pins them there.

        Whoever needs others than those held, once they are `max_prefetch` or leave it too few bytes, has to wait for
        some to be given up, and nobody behind it gets a hold either: else a steady stream for the versions held, or for
        small ones, would shut it out. What one sequence needs is held together or not at all.
        Returns the sequences of which a load failed, each with the reason; they have left their lines.
        """
        self._promote()
        self._hold(self._lines, self._turn)
        self._hold(self._background, lambda line: (min(entry.number for entry in line),))
        states: dict[str, LoadState] = {}
        failed: list[tuple[Waiting, str]] = []
        for line in [line for line in self.lines() if line.loads]:
            for version in [one for one, state in line.loads.items() if state is LoadState.LOADING]:
                if version not in states:
                    states[version] = self._host.request(version)
                line.loads[version] = states[version]
            if LoadState.FAILED in line.loads.values():
                reason = self._reason(line)
                failed += [(entry, reason) for entry in line]
            elif self._is_too_much_beside(line):
                failed += [(entry, self._too_much_beside(line)) for entry in line]
        failed.sort(key=lambda one: one[0].number)
        sequences = self._leave([entry for entry, _ in failed])
        for line in self._lines.values():
            self._set_active(line, line.has_turn and self._has_adapters(line))
        return list(zip(sequences, (reason for _, reason in failed), strict=True))

    def admit(self, seats: int, tokens: int) -> Admitted:
        """Starts those who may, in order of turns, as long as there is a seat and a token of this step for each.

        A sequence takes `min(rest of its prompt, tokens left)` of the step. Those that start have blocks and slots
        afterwards.
        """
        admitted = Admitted()
        if seats <= 0 or tokens <= 0:
            return admitted
        for line in self._lines.values():
            line.tried = 0
        blocked: list[Waiting] = []  # in this step
        lines = [line for line in self._lines.values() if line.has_turn and self._has_adapters(line)]
        turns = [(self._turn(line), line) for line in lines]
        heapify(turns)  # no two lines have the same turn: a turn ends with a number of arrival
        without_blocks = 0
        while turns and len(admitted.sequences) < seats and tokens > 0:
            turn, line = turns[0]
            entry = line.next
            if entry is None or not self._has_adapters(line):  # one that started took their place on the device
                heappop(turns)
                continue
            if (now := self._turn(line)) != turn:  # it has become later since it was put here
                heapreplace(turns, (now, line))
                continue
            lack = self._start(entry, line, admitted)
            if lack is None:
                self._share.charge(line.flow, cost_of_prompt(entry.sequence), entry.sequence.weight)
                tokens -= entry.sequence.num_uncomputed
                for older in blocked:
                    older.passed_over += 1
                barrier = any(self._is_barrier(older) for older in blocked)
            else:
                entry.blocked_since = self._clock() if entry.blocked_since is None else entry.blocked_since
                line.block()
                blocked.append(entry)
                barrier = self._is_barrier(entry)
                if lack is Lack.SLOTS:
                    heappop(turns)
                else:
                    without_blocks += 1
                    barrier = barrier or without_blocks > self._config.max_passed_over
            if barrier:
                break
        self._discard_empty()
        return admitted

    def admit_background(self, seats: int, tokens: int) -> Admitted:
        """The same for those that give way: none of them while an ordinary sequence lacks something but its adapter."""
        admitted = Admitted()
        if not self._background or any(line.has_turn and self._has_adapters(line) for line in self._lines.values()):
            return admitted
        in_order = sorted(
            ((entry, line) for line in self._background.values() for entry in line.in_turn),
            key=lambda one: one[0].number,
        )
        for entry, line in in_order:
            if len(admitted.sequences) == seats or tokens <= 0:
                break
            if self._has_adapters(line) and self._start(entry, line, admitted) is None:
                tokens -= len(entry.sequence.prompt)
        self._discard_empty()
        return admitted

    def check_integrity(self) -> None:
        """Asserts that who waits holds nothing of the device and pins the host cache only for an adapter."""
        for lines in (self._lines, self._background):
            for flow, line in lines.items():
                assert len(line) > 0, "an empty line is left"
                assert not line.loads or line.loads.keys() == line.needs.keys()
                assert LoadState.FAILED not in line.loads.values()
                for entry in line:
                    sequence = entry.sequence
                    assert sequence.flow == flow == line.flow
                    assert sequence.status is SequenceStatus.WAITING
                    assert not sequence.blocks and not sequence.slots and sequence.num_computed == 0
                    assert line.needs.keys() == {use.version for use in sequence.adapters}
                    assert entry.passed_over <= self._config.max_passed_over
                    assert sequence.id in self._unread
                assert all(self._unread[str(entry.sequence.shares_prompt_with)] == flow for entry in line.held)
                numbers = [entry.number for entry in line.fresh]
                assert numbers == sorted(numbers)
                assert all(entry.blocked_since is not None for entry in line.blocked)
            held = _held(lines)
            assert self._is_within_limits(held) or any(held.keys() == line.loads.keys() for line in lines.values())
        waiting = Counter(entry.sequence.adapter for entry in self if not entry.sequence.background)
        assert waiting == +self.by_adapter

    def _enqueue(self, lines: dict[Flow, Line], sequence: Sequence) -> None:
        line = lines.get(sequence.flow)
        if line is None:
            line = lines[sequence.flow] = Line(sequence.flow, {use.version: use.nbytes for use in sequence.adapters})
        line.add(Waiting(sequence, next(self._numbers)), held=self._must_wait(sequence))

    def _must_wait(self, sequence: Sequence) -> bool:
        """For the prompt of another, of which it will then find a block or more."""
        first = sequence.shares_prompt_with
        shares = self._blocks.keeps_content and sequence.logits_from >= self._blocks.block_size
        return shares and first is not None and self._unread.get(first) == sequence.flow

    def _promote(self) -> None:
        """Background sequences that have waited long enough join the ordinary ones, as if they came now."""
        latest = self._clock() - self._config.max_background_wait_seconds
        late = [entry for line in self._background.values() for entry in line if entry.sequence.arrived <= latest]
        if not late:
            return
        for entry in late:
            self._background[entry.sequence.flow].remove(entry)
        self._discard_empty()  # with its hold: among the ordinary ones it waits for its turn to have one
        for entry in sorted(late, key=lambda entry: entry.number):
            entry.sequence.promoted = True
            self._share.enter(entry.sequence.flow)
            self._enqueue(self._lines, entry.sequence)

    def _turn(self, line: Line) -> tuple[float, ...]:
        """The least comes first: the highest priority, then the flow that got least, then the oldest."""
        entry = line.next
        if entry is None:
            return (0, *self._share.turn(line.flow), -1)
        return (-entry.sequence.priority, *self._share.turn(line.flow), entry.number)

    def _hold(self, lines: Mapping[Flow, Line], order: Callable[[Line], tuple[float, ...]]) -> None:
        """Pins what lines of one kind need in host memory. Each kind has the whole limit: so neither waits for what
        the other holds.
        """
        lacking = [line for line in lines.values() if not line.loads and self._wanted(line)]
        held = _held(lines)
        if not lacking or len(held) >= self._config.max_prefetch:
            return
        for line in lines.values():
            line.tried = 0
        for line in sorted(lacking, key=order):
            if not self._has_room(held, line.needs):
                break
            held |= line.needs
            for version in line.needs:
                self._host.pin(version)  # before the request, so that what is READY stays so
                line.loads[version] = LoadState.LOADING

    def _wanted(self, line: Line) -> Mapping[str, int]:
        """Bytes of each version that must be held in host memory before one of the line can start."""
        return {} if line.needs.keys() <= self._slots.residents else line.needs

    def _has_room(self, held: Mapping[str, int], wanted: Mapping[str, int]) -> bool:
        """Whether these may be held as well; whatever one sequence needs may always be held by itself."""
        together = {**held, **wanted}
        return self._is_within_limits(together) or together.keys() == wanted.keys()

    def _is_within_limits(self, held: Mapping[str, int]) -> bool:
        config = self._config
        return len(held) <= config.max_prefetch and sum(held.values()) <= config.max_prefetch_bytes

    def _has_adapters(self, line: Line) -> bool:
        """Whether all it needs can be had without waiting for the disk."""
        if line.loads and all(state is LoadState.READY for state in line.loads.values()):
            return True
        return not self._wanted(line)

    def _set_active(self, line: Line, active: bool) -> None:
        if active and not line.is_active:
            self._share.activate(line.flow)
        elif line.is_active and not active:
            self._share.deactivate(line.flow)
        line.is_active = active

    def _is_too_much_beside(self, line: Line) -> bool:
        """What it needs is in host memory, and can never lie on the device together."""
        if not all(state is LoadState.READY for state in line.loads.values()):
            return False
        return not self._slots.fits_beside(*map(self._host.bytes_beside, line.loads))

    def _too_much_beside(self, line: Line) -> str:
        together = sum(map(self._host.bytes_beside, line.loads))
        return (
            f"its own rows of embeddings and output head take {-(-together // _MIB)} MiB, and this server has "
            f"{self._slots.beside // _MIB} MiB for those of all adapters (--token-memory-mib)"
        )

    def _reason(self, line: Line) -> str:
        failed = [version for version, state in line.loads.items() if state is LoadState.FAILED]
        return self._host.failure(failed[0]) or "its adapter cannot be read"

    def _start(self, entry: Waiting, line: Line, admitted: Admitted) -> Lack | None:
        """Gives the sequence all it needs, or nothing, and says what it lacks.

        All it needs lies on the device then, so its line holds nothing in host memory any more: its pins are handed on
        to the slot loads, or given back.
        """
        sequence = entry.sequence
        blocks = self._allocate(sequence)
        if blocks is None:
            return Lack.BLOCKS
        acquired = self._slots.acquire_all(
            {use.version: use.rank for use in sequence.adapters},
            {version: self._host.bytes_beside(version) for version in line.loads},
        )
        if acquired is None:
            self._blocks.free(blocks)
            return Lack.SLOTS
        sequence.slots = tuple(ScaledSlot(acquired[use.version].slot, use.scale) for use in sequence.adapters)
        for version, got in acquired.items():
            if got.is_new:
                admitted.slot_loads.append(SlotLoad(got.slot, version))
            elif line.loads:
                self._host.unpin(version)
        line.loads = {}
        sequence.blocks = blocks
        sequence.num_computed = sequence.num_cached
        sequence.status = SequenceStatus.RUNNING
        admitted.sequences.append(sequence)
        line.remove(entry)
        self._count_out(entry)
        return None

    def _count_out(self, entry: Waiting) -> None:
        adapter = entry.sequence.adapter
        if not entry.sequence.background:
            self.by_adapter[adapter] -= 1
            if not self.by_adapter[adapter]:
                del self.by_adapter[adapter]

    def _allocate(self, sequence: Sequence) -> list[int] | None:
        """Blocks for its whole length, those that hold the beginning of its prompt already among them; or None.

        Tokens whose logits are needed are left to compute: at least the last of the prompt, where the reply begins.
        """
        shared: list[int] = []
        if self._blocks.keeps_content:
            size, most = self._blocks.block_size, sequence.logits_from
            extend_keys(sequence, size, most)
            shared = self._blocks.find(sequence.keys[: most // size])
        blocks = self._blocks.allocate(self._blocks.blocks_for(sequence.max_total), shared)
        sequence.num_cached = len(shared) * self._blocks.block_size if blocks is not None else 0
        return blocks

    def _is_barrier(self, entry: Waiting) -> bool:
        assert entry.blocked_since is not None, "only who was found blocked can be one"
        waited = self._clock() - entry.blocked_since
        return entry.passed_over >= self._config.max_passed_over or waited >= self._config.max_wait_seconds

    def _leave(self, leaving: list[Waiting]) -> list[Sequence]:
        """Takes entries out of their lines without starting them."""
        if not leaving:
            return []
        for entry in leaving:
            sequence = entry.sequence
            sequence.status = SequenceStatus.FINISHED
            (self._background if sequence.gives_way else self._lines)[sequence.flow].remove(entry)
            self._count_out(entry)
            if not sequence.gives_way:
                self._share.leave(sequence.flow)
        for entry in leaving:
            self.release_held(entry.sequence)
        self._discard_empty()
        return [entry.sequence for entry in leaving]

    def _discard_empty(self) -> None:
        for lines in (self._lines, self._background):
            for flow in [flow for flow, line in lines.items() if not len(line)]:
                line = lines.pop(flow)
                self._set_active(line, False)
                for version in line.loads:
                    self._host.unpin(version)


def _held(lines: Mapping[Flow, Line]) -> dict[str, int]:
    """Bytes of each version that some line pins in host memory, or has asked for there."""
    held: dict[str, int] = {}
    for line in lines.values():
        if line.loads:
            held |= line.needs
    return held
