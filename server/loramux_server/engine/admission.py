"""Who may start: the waiting queue, what each waiting sequence still lacks, and how long others may pass it.

A sequence starts only with everything it will ever need: a seat, KV blocks for its whole length, and a pinned
slot for each of its adapters. So nothing that runs can run out later, and there is no preemption.

    lacks an adapter in host memory (loading)    passed over by all behind it, always: a load ends by itself
    lacks slots or KV blocks (blocked)           passed over `max_passed_over` times or for `max_wait_seconds`, then it
                                                 is a barrier: nobody behind it starts before it does
    lacks a seat, or the step has no token left  nobody starts

Nothing starves: while a barrier stands, no one new takes slots or blocks, what runs ends, and then it fits. A sequence
of several adapters takes its slots all at once, and holds all of them in host memory until then, on the device or not:
so those that lie there in each other's way can be placed anew (`SlotTable.acquire_all`).

Background sequences have a queue of their own. They start when no ordinary one could, beside its seats; and whoever
has waited there for long joins the ordinary queue at its end.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Protocol

from loramux_adapters.lora.host_cache import LoadState
from loramux_adapters.lora.slots import ScaledSlot, SlotTable
from loramux_server.engine.kv_blocks import KVBlocks, extend_keys
from loramux_server.engine.sequence import Sequence, SequenceStatus, SlotLoad
from loramux_server.errors import ConfigError

_AT_LEAST_ONE = ("max_num_seqs", "max_batch_tokens", "max_prefetch", "max_prefetch_bytes", "max_background_tokens")


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
        max_scored_tokens: tokens of one step that are scored as given text, beside one for each sequence. Their logits
            take memory: a number for each token of the vocabulary.
        max_background_tokens: most tokens of background sequences in one step, and of these sequences at a time.
        max_background_wait_seconds: how long a background sequence gives way before it counts as an ordinary one.
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


@dataclass(eq=False, slots=True)
class Waiting:
    """A sequence in the queue. `loads`: the versions that it pins in the host cache, none until that was asked."""

    sequence: Sequence
    loads: dict[str, LoadState] = field(default_factory=dict)
    blocked_since: float | None = None
    passed_over: int = 0


@dataclass(slots=True)
class Admitted:
    """Sequences that start in this step. Each version of `slot_loads` stays pinned in the host cache for its copy."""

    sequences: list[Sequence] = field(default_factory=list)
    slot_loads: list[SlotLoad] = field(default_factory=list)


class WaitingQueues:
    """The waiting queues, in order of arrival. Owner: the engine thread."""

    def __init__(
        self, config: SchedulerConfig, blocks: KVBlocks, slots: SlotTable, host: HostView, clock: Callable[[], float]
    ) -> None:
        self._config = config
        self._blocks = blocks
        self._slots = slots
        self._host = host
        self._clock = clock
        self._queue: list[Waiting] = []
        self._background: list[Waiting] = []

    def __len__(self) -> int:
        return len(self._queue) + len(self._background)

    def __iter__(self) -> Iterator[Waiting]:
        return chain(self._queue, self._background)

    def add(self, sequence: Sequence) -> None:
        """Puts a new sequence at the end of its queue."""
        assert sequence.status is SequenceStatus.WAITING, f"{sequence.id} has been scheduled before"
        (self._background if sequence.gives_way else self._queue).append(Waiting(sequence))

    def remove(self, ids: Collection[str]) -> list[Sequence]:
        """Takes these out of the queues, with their host pins; ids that are not waiting are ignored."""
        return self._leave([entry for entry in self if entry.sequence.id in ids])

    def prefetch(self) -> list[tuple[Sequence, str]]:
        """Asks the host cache, in order of arrival, for versions that it must have, and pins them there.

        Whoever needs others than those held, once they are `max_prefetch` or leave it too few bytes, has to wait for
        some to be given up, and nobody behind it gets a hold either: else a steady stream for the versions held, or for
        small ones, would shut it out. What one sequence needs is held together or not at all.
        Returns the sequences of which a load failed, each with the reason; they have left the queue.
        """
        self._promote()
        self._hold(self._queue)
        self._hold(self._background)
        states: dict[str, LoadState] = {}
        for entry in self:
            for version in [one for one, state in entry.loads.items() if state is LoadState.LOADING]:
                if version not in states:
                    states[version] = self._host.request(version)
                entry.loads[version] = states[version]
        failed = [entry for entry in self if LoadState.FAILED in entry.loads.values()]
        reasons = [self._reason(entry) for entry in failed]
        return list(zip(self._leave(failed), reasons, strict=True))

    def admit(self, seats: int, tokens: int) -> Admitted:
        """Starts those who may, in order of arrival, as long as there is a seat and a token of this step for each.

        A sequence takes `min(rest of its prompt, tokens left)` of the step. Those that start have blocks and slots
        afterwards.
        """
        admitted = Admitted()
        blocked: list[Waiting] = []
        for entry in self._queue:
            if len(admitted.sequences) == seats or tokens <= 0:
                break
            if not self._has_adapters(entry):
                continue
            if self._start(entry, admitted):
                tokens -= entry.sequence.num_uncomputed
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

    def admit_background(self, seats: int, tokens: int) -> Admitted:
        """The same for those that give way: none of them while an ordinary sequence lacks something but its adapter."""
        admitted = Admitted()
        if any(self._has_adapters(entry) for entry in self._queue):
            return admitted
        for entry in self._background:
            if len(admitted.sequences) == seats or tokens <= 0:
                break
            if self._has_adapters(entry) and self._start(entry, admitted):
                tokens -= len(entry.sequence.prompt)
        self._background = [one for one in self._background if one.sequence.status is SequenceStatus.WAITING]
        return admitted

    def check_integrity(self) -> None:
        """Asserts that who waits holds nothing of the device and pins the host cache only for an adapter."""
        for entry in self:
            sequence = entry.sequence
            assert sequence.status is SequenceStatus.WAITING
            assert not sequence.blocks and not sequence.slots and sequence.num_computed == 0
            assert not entry.loads or entry.loads.keys() == {use.version for use in sequence.adapters}
            assert LoadState.FAILED not in entry.loads.values()
            assert entry.passed_over <= self._config.max_passed_over
        for queue in (self._queue, self._background):
            held = _held(queue)
            assert self._is_within_limits(held) or any(held.keys() == entry.loads.keys() for entry in queue)

    def _promote(self) -> None:
        """Background sequences that have waited long enough join the ordinary queue."""
        latest = self._clock() - self._config.max_background_wait_seconds
        for entry in [entry for entry in self._background if entry.sequence.arrived <= latest]:
            entry.sequence.promoted = True
            self._background.remove(entry)
            for version in entry.loads:
                self._host.unpin(version)  # among the ordinary ones it has to wait for its turn to hold anything
            self._queue.append(Waiting(entry.sequence))

    def _hold(self, queue: list[Waiting]) -> None:
        """Pins what entries of one queue need in host memory. Each queue has the whole limit: so neither waits for
        what the other holds.
        """
        held = _held(queue)
        for entry in queue:
            if entry.loads:
                continue
            wanted = self._wanted(entry.sequence)
            if not self._has_room(held, wanted):
                break
            held |= wanted
            for version in wanted:
                self._host.pin(version)  # before the request, so that what is READY stays so
                entry.loads[version] = LoadState.LOADING

    def _wanted(self, sequence: Sequence) -> dict[str, int]:
        """Bytes of each version that the sequence must hold in host memory before it can start."""
        wanted = {use.version: use.nbytes for use in sequence.adapters}
        if len(wanted) == 1 and all(self._slots.lookup(version) is not None for version in wanted):
            return {}
        return wanted

    def _has_room(self, held: Mapping[str, int], wanted: Mapping[str, int]) -> bool:
        """Whether these may be held as well; whatever one sequence needs may always be held by itself."""
        together = {**held, **wanted}
        return self._is_within_limits(together) or together.keys() == wanted.keys() or not wanted

    def _is_within_limits(self, held: Mapping[str, int]) -> bool:
        config = self._config
        return len(held) <= config.max_prefetch and sum(held.values()) <= config.max_prefetch_bytes

    def _has_adapters(self, entry: Waiting) -> bool:
        """Whether all it needs can be had without waiting for the disk."""
        if entry.loads and all(state is LoadState.READY for state in entry.loads.values()):
            return True
        return not self._wanted(entry.sequence)

    def _reason(self, entry: Waiting) -> str:
        failed = [version for version, state in entry.loads.items() if state is LoadState.FAILED]
        return self._host.failure(failed[0]) or "its adapter cannot be read"

    def _start(self, entry: Waiting, admitted: Admitted) -> bool:
        """Gives the sequence all it needs, or nothing. Host pins are handed on to the slot loads, or given back."""
        sequence = entry.sequence
        blocks = self._allocate(sequence)
        if blocks is None:
            return False
        acquired = self._slots.acquire_all({use.version: use.rank for use in sequence.adapters})
        if acquired is None:
            self._blocks.free(blocks)
            return False
        sequence.slots = tuple(ScaledSlot(acquired[use.version].slot, use.scale) for use in sequence.adapters)
        for version, got in acquired.items():
            if got.is_new:
                admitted.slot_loads.append(SlotLoad(got.slot, version))
            elif version in entry.loads:
                self._host.unpin(version)
        sequence.blocks = blocks
        sequence.num_computed = sequence.num_cached
        sequence.status = SequenceStatus.RUNNING
        admitted.sequences.append(sequence)
        return True

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
        """Takes entries out of the queue without starting them."""
        sequences = []
        for entry in leaving:
            for version in entry.loads:
                self._host.unpin(version)
            entry.sequence.status = SequenceStatus.FINISHED
            sequences.append(entry.sequence)
        for queue in (self._queue, self._background) if leaving else ():
            queue[:] = [entry for entry in queue if entry.sequence.status is SequenceStatus.WAITING]
        return sequences


def _held(queue: list[Waiting]) -> dict[str, int]:
    """Bytes of each version that somebody in the queue pins in host memory, or has asked for there."""
    return {use.version: use.nbytes for entry in queue if entry.loads for use in entry.sequence.adapters}
