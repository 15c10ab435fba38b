"""Who may start: the waiting queue, what each waiting sequence still lacks, and how long others may pass it.

A sequence starts only with everything it will ever need: a seat, KV blocks for its whole length, and, if it has an
adapter, a pinned slot. So nothing that runs can run out later, and there is no preemption.

    lacks its adapter in host memory (loading)   passed over by all behind it, always: a load ends by itself
    lacks a slot or KV blocks (blocked)          passed over `max_passed_over` times or for `max_wait_seconds`, then it
                                                 is a barrier: nobody behind it starts before it does
    lacks a seat, or the step has no token left  nobody starts

Nothing starves: while a barrier stands, no one new takes slots or blocks, what runs ends, and then it fits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from loramux_adapters.host_cache import LoadState
from loramux_adapters.slots import SlotTable
from loramux_server.engine.kv_blocks import KVBlocks
from loramux_server.engine.sequence import Sequence, SequenceStatus, SlotLoad
from loramux_server.errors import ConfigError


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of the scheduler.

    Attributes:
        max_num_seqs: sequences that run at the same time.
        max_batch_tokens: tokens of one step; decodes always run, prefill gets what they leave.
        max_passed_over: sequences that may start before an older one that lacks a slot or KV blocks; 0 is strict FIFO.
        max_wait_seconds: how long it may be passed over at most, counted from when it was first found blocked.
        max_prefetch: distinct versions that waiting sequences may hold in host memory at the same time.
        max_prefetch_bytes: most that these may take there, or be about to once they are loaded; one is always held,
            whatever its size. What is held cannot be evicted, so it must fit the budget of the host cache.
    """

    max_num_seqs: int = 32
    max_batch_tokens: int = 128
    max_passed_over: int = 32
    max_wait_seconds: float = 5.0
    max_prefetch: int = 16
    max_prefetch_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_batch_tokens", "max_prefetch", "max_prefetch_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("max_passed_over", "max_wait_seconds"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} cannot be negative, got {getattr(self, name)}")


class HostView(Protocol):
    """What the scheduler asks of the host cache. It never waits: `request` starts a load and says how far it is."""

    def request(self, version: str) -> LoadState: ...

    def failure(self, version: str) -> str | None: ...

    def pin(self, version: str) -> None:
        """Keeps the version once it is there; may be called before it is loaded."""

    def unpin(self, version: str) -> None: ...


@dataclass(eq=False, slots=True)
class Waiting:
    """A sequence in the queue. `load` is None until the host cache is asked; from then on it pins its version there."""

    sequence: Sequence
    load: LoadState | None = None
    blocked_since: float | None = None
    passed_over: int = 0


@dataclass(slots=True)
class Admitted:
    """Sequences that start in this step. Each version of `slot_loads` stays pinned in the host cache for its copy."""

    sequences: list[Sequence] = field(default_factory=list)
    slot_loads: list[SlotLoad] = field(default_factory=list)


class Admission:
    """The waiting queue, in order of arrival. Owner: the engine thread."""

    def __init__(
        self, config: SchedulerConfig, blocks: KVBlocks, slots: SlotTable, host: HostView, clock: Callable[[], float]
    ) -> None:
        self._config = config
        self._blocks = blocks
        self._slots = slots
        self._host = host
        self._clock = clock
        self._queue: list[Waiting] = []

    def __len__(self) -> int:
        return len(self._queue)

    def __iter__(self) -> Iterator[Waiting]:
        return iter(self._queue)

    def add(self, sequence: Sequence) -> None:
        """Puts a new sequence at the end of the queue."""
        assert sequence.status is SequenceStatus.WAITING, f"{sequence.id} has been scheduled before"
        self._queue.append(Waiting(sequence))

    def remove(self, ids: Collection[str]) -> list[Sequence]:
        """Takes these out of the queue, with their host pins; ids that are not waiting are ignored."""
        return self._leave([entry for entry in self._queue if entry.sequence.id in ids])

    def prefetch(self) -> list[tuple[Sequence, str]]:
        """Asks the host cache, in order of arrival, for versions that are in no slot, and pins them there.

        Whoever needs another one than those held, once they are `max_prefetch` or leave it too few bytes, has to wait
        for some to be given up, and nobody behind it gets a hold either: else a steady stream for the versions held, or
        for small ones, would shut it out.
        Returns the sequences whose load failed, each with the reason; they have left the queue.
        """
        held = self._held()
        is_full = False
        states: dict[str, LoadState] = {}
        for entry in self._queue:
            version = entry.sequence.version
            if version is None or entry.load is LoadState.READY:
                continue
            if entry.load is None:
                if self._slots.lookup(version) is not None:
                    continue
                is_full = is_full or (version not in held and not self._has_room(held, entry.sequence.nbytes))
                if is_full:
                    continue
                held[version] = entry.sequence.nbytes
                self._host.pin(version)  # before the request, so that what is READY stays so
            if version not in states:
                states[version] = self._host.request(version)
            entry.load = states[version]
        failed = [entry for entry in self._queue if entry.load is LoadState.FAILED]
        reasons = [self._host.failure(str(entry.sequence.version)) or "its adapter cannot be read" for entry in failed]
        return list(zip(self._leave(failed), reasons, strict=True))

    def admit(self, seats: int, tokens: int) -> Admitted:
        """Starts those who may, in order of arrival, as long as there is a seat and a token of this step for each.

        A sequence takes `min(prompt, tokens left)` of the step. Those that start have blocks and slots afterwards.
        """
        admitted = Admitted()
        blocked: list[Waiting] = []
        for entry in self._queue:
            if len(admitted.sequences) == seats or tokens <= 0:
                break
            if not self._has_adapter(entry):
                continue
            if self._start(entry, admitted):
                tokens -= len(entry.sequence.prompt)
                for older in blocked:
                    older.passed_over += 1
                barrier = any(self._is_barrier(older) for older in blocked)
            else:
                if entry.blocked_since is None:
                    entry.blocked_since = self._clock()
                blocked.append(entry)
                barrier = self._is_barrier(entry)
            if barrier:
                break
        self._queue = [entry for entry in self._queue if entry.sequence.status is SequenceStatus.WAITING]
        return admitted

    def check_integrity(self) -> None:
        """Asserts that who waits holds nothing of the device and pins the host cache only for an adapter."""
        for entry in self._queue:
            sequence = entry.sequence
            assert sequence.status is SequenceStatus.WAITING
            assert not sequence.blocks and sequence.slot is None and sequence.num_computed == 0
            assert entry.load is None or sequence.version is not None
            assert entry.load is not LoadState.FAILED
            assert entry.passed_over <= self._config.max_passed_over
        held = self._held()
        assert len(held) <= self._config.max_prefetch
        assert len(held) <= 1 or sum(held.values()) <= self._config.max_prefetch_bytes

    def _held(self) -> dict[str, int]:
        """Bytes of each version that somebody in the queue pins in host memory, or has asked for there."""
        return {
            entry.sequence.version: entry.sequence.nbytes
            for entry in self._queue
            if entry.sequence.version is not None and entry.load is not None
        }

    def _has_room(self, held: Mapping[str, int], nbytes: int) -> bool:
        """Whether one more version may be held beside these; the first always may."""
        config = self._config
        fits = len(held) < config.max_prefetch and sum(held.values()) + nbytes <= config.max_prefetch_bytes
        return fits or not held

    def _has_adapter(self, entry: Waiting) -> bool:
        version = entry.sequence.version
        return version is None or entry.load is LoadState.READY or self._slots.lookup(version) is not None

    def _start(self, entry: Waiting, admitted: Admitted) -> bool:
        """Gives the sequence all it needs, or nothing. A host pin is handed on to the slot load, or given back."""
        sequence = entry.sequence
        count = self._blocks.blocks_for(sequence.max_total)
        if not self._blocks.can_allocate(count):
            return False
        if sequence.version is not None:
            acquired = self._slots.acquire(sequence.version, sequence.rank)
            if acquired is None:
                return False
            sequence.slot = acquired.slot
            if acquired.is_new:
                admitted.slot_loads.append(SlotLoad(acquired.slot, sequence.version))
            elif entry.load is not None:
                self._host.unpin(sequence.version)
        blocks = self._blocks.allocate(count)
        assert blocks is not None
        sequence.blocks = blocks
        sequence.status = SequenceStatus.RUNNING
        admitted.sequences.append(sequence)
        return True

    def _is_barrier(self, entry: Waiting) -> bool:
        assert entry.blocked_since is not None, "only who was found blocked can be one"
        waited = self._clock() - entry.blocked_since
        return entry.passed_over >= self._config.max_passed_over or waited >= self._config.max_wait_seconds

    def _leave(self, leaving: list[Waiting]) -> list[Sequence]:
        """Takes entries out of the queue without starting them."""
        sequences = []
        for entry in leaving:
            if entry.load is not None and entry.sequence.version is not None:
                self._host.unpin(entry.sequence.version)
            entry.sequence.status = SequenceStatus.FINISHED
            sequences.append(entry.sequence)
        if leaving:
            self._queue = [entry for entry in self._queue if entry.sequence.status is SequenceStatus.WAITING]
        return sequences
