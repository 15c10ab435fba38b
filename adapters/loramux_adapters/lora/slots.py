"""Which adapter version sits where in the device's adapter memory: pins, placement, eviction. Policy only, no torch.

Device memory for adapters is one arena per linear layer: `rows` rank rows, shared by all adapters. A slot is an aligned
window of it. Windows of one rank never straddle each other, and a window of a larger rank is exactly the union of the
windows of a smaller one below it, as in a buddy allocator:

    rows        0       8       16      24      32
    rank 8      |-------|-------|-------|-------|
    rank 16     |---------------|---------------|
    rank 32     |-------------------------------|
"""

from __future__ import annotations

from collections.abc import Callable, Collection, KeysView, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from loramux_adapters.lora.windows import UNTOUCHABLE, Windows, key_of

UNBOUNDED = 2**63
SMALLEST_RANK = 8  # rows of the smallest slot; every slot's rank is this times a power of two


@dataclass(frozen=True, slots=True, order=True)
class Slot:
    """A window of the arena: rows [offset, offset + rank), with `offset` a multiple of `rank`."""

    offset: int
    rank: int

    def overlaps(self, other: Slot) -> bool:
        return self.offset < other.offset + other.rank and other.offset < self.offset + self.rank


@dataclass(frozen=True, slots=True, order=True)
class ScaledSlot:
    """An adapter's part in a token row: where it sits, and the factor of its delta."""

    slot: Slot
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Acquired:
    """What `SlotTable.acquire` gave.

    Attributes:
        slot: pinned for the caller until it calls `release`.
        is_new: True if the version has to be copied into the slot before it is used.
        evicted: versions that were resident there and are no longer.
    """

    slot: Slot
    is_new: bool
    evicted: tuple[str, ...] = ()


@dataclass(slots=True)
class _Resident:
    slot: Slot
    pins: int
    used: int  # the table's clock at the last acquire or release
    retired: bool = False  # leaves with its last pin
    beside: int = 0  # bytes that it takes beside the arena


def bucket_of(rank: int) -> int:
    """Rows of the slot that holds an adapter of this rank: the next power of two, at least `SMALLEST_RANK`."""
    if rank < 1:
        raise ValueError(f"a rank is at least 1, got {rank}")
    return max(SMALLEST_RANK, 1 << (rank - 1).bit_length())


class SlotTable:
    """Residents of the arena. Owner: the engine thread (`fits` and `residents`: any thread).

    A call takes time by the logarithm of the rows, and for each adapter that it moves; never by how many there are.
    """

    def __init__(
        self, rows: int, beside: int = UNBOUNDED, on_gone: Callable[[str], None] = lambda version: None
    ) -> None:
        """
        Args:
            rows: rank rows of the arena; what exceeds a multiple of SMALLEST_RANK stays unused.
            beside: bytes that residents may take together beside the arena (lora/token_rows.py).
            on_gone: is told of each resident that leaves, and of each that is placed anew.
        """
        if rows < 0:
            raise ValueError(f"the arena cannot have {rows} rows")
        self.rows = rows
        self.beside = beside
        self._on_gone = on_gone
        self._beside: dict[str, int] = {}  # what residents take there, of those that take something
        self.rows_used = 0  # held by residents, pinned or not
        self.evictions = 0  # since the start, as are these two: acquired versions that were resident, and that were not
        self.hits = self.misses = 0
        self._kept: frozenset[str] = frozenset()  # not evicted as long as there is another way
        self._residents: dict[str, _Resident] = {}
        self._at: dict[int, str] = {}  # offset -> who begins there
        self._windows = Windows(rows // SMALLEST_RANK)
        self._clock = 0

    def fits(self, *ranks: int) -> bool:
        """True if adapters of these ranks could be placed together in an empty table. Reads constants only."""
        # Aligned windows, placed from the largest to the smallest, leave no gap between them.
        return sum(bucket_of(rank) for rank in ranks) <= self.rows // SMALLEST_RANK * SMALLEST_RANK

    def lookup(self, version: str) -> Slot | None:
        """Where the version is resident, without touching it; None if it is not."""
        resident = self._residents.get(version)
        return None if resident is None else resident.slot

    def acquire(self, version: str, rank: int) -> Acquired | None:
        """Pins the version's slot, placing it first if it is not resident.

        None means that every window of its size holds a pinned slot (or lies in one) now: try again after a release.
        Calls for one version name one rank. The caller copies the weights if `is_new`; if that fails, it calls
        `release` and then `drop`.
        """
        return None if (acquired := self.acquire_all({version: rank})) is None else acquired[version]

    def fits_beside(self, *nbytes: int) -> bool:
        """True if adapters that take so much beside the arena could be resident together. Reads constants only."""
        return sum(nbytes) <= self.beside

    def acquire_all(
        self, wanted: Mapping[str, int], beside: Mapping[str, int] = MappingProxyType({})
    ) -> dict[str, Acquired] | None:
        """Pins a slot for each of these versions (version -> rank), or changes nothing and returns None.

        `beside`: bytes that those that are not resident take beside the arena. Where there are too many, who nobody
        pins leaves, least recently used first.

        A version of theirs that is resident stays where it is if the others find room around it. Else those of them
        that nobody pins are placed anew with the rest, and are `is_new` again: so whatever `fits` is placed as soon as
        nobody else pins anything, wherever its parts were left lying.
        """
        present = [version for version in wanted if version in self._residents]
        for version in present:
            rank = self._residents[version].slot.rank
            assert rank == bucket_of(wanted[version]), f"{version} is resident with another rank"
        if len(present) == len(wanted):
            return {version: self._pin(version) for version in wanted}
        takes = {version: self._beside.get(version, beside.get(version, 0)) for version in wanted}
        pinned_beside = sum(
            nbytes
            for version, nbytes in self._beside.items()
            if version not in wanted and self._residents[version].pins
        )
        if not self.fits_beside(pinned_beside, *takes.values()):
            return None
        pinned = [version for version in present if self._residents[version].pins]
        placed = self._place_beside(present, wanted)
        if placed is None and len(pinned) < len(present):
            placed = self._place_beside(pinned, wanted)
        if placed is None:
            return None
        for version in placed:
            self._residents[version].beside = takes[version]
            if takes[version]:
                self._beside[version] = takes[version]
        self._make_room_beside(wanted)
        return placed | {version: self._pin(version) for version in wanted if version not in placed}

    def release(self, version: str) -> None:
        """Takes one pin back. The version stays resident; without pins it may be evicted, least recently used first."""
        resident = self._residents[version]
        assert resident.pins > 0, f"{version} is released more often than acquired"
        resident.pins -= 1
        self._touch(version)
        if resident.retired and not resident.pins:
            self._remove(version)
            self._on_gone(version)

    def retire(self, version: str) -> None:
        """Nobody will ask for this version again: it leaves now, or with its last pin. Acquiring it takes that back."""
        resident = self._residents.get(version)
        if resident is not None and resident.pins:
            resident.retired = True
        else:
            self.drop(version)

    def keep(self, versions: Collection[str]) -> None:
        """Evict these only for a version that has no window without one of them; replaces what was said before.

        So they never keep another version out for good, however they lie.
        """
        before, self._kept = self._kept, frozenset(versions)
        for version in before ^ self._kept:
            if version in self._residents:
                self._renew(version)

    def drop(self, version: str) -> None:
        """Forgets an unpinned resident (its copy failed, or it was deleted). No-op if it is pinned or not resident."""
        resident = self._residents.get(version)
        if resident is not None and resident.pins == 0:
            self._remove(version)
            self._on_gone(version)

    def __len__(self) -> int:
        """How many versions are resident."""
        return len(self._residents)

    @property
    def residents(self) -> KeysView[str]:
        """Versions on the device, as they are at any moment: other threads may look one up or count, but not iterate.

        A version is here from when its slot is acquired, a step before it is copied.
        """
        return self._residents.keys()

    @property
    def resident(self) -> list[str]:
        """Versions on the device, by offset; a copy, for tests."""
        return sorted(self._residents, key=lambda version: self._residents[version].slot)

    @property
    def pinned(self) -> list[str]:
        """Resident versions that may not be evicted now, by offset; for tests."""
        return [version for version in self.resident if self._residents[version].pins]

    def check_integrity(self) -> None:
        """Asserts that slots are aligned, inside the arena and disjoint, and that the windows agree with them."""
        taken: dict[int, str] = {}  # the first row of each unit -> who holds it
        windows = Windows(self.rows // SMALLEST_RANK)
        for version, resident in self._residents.items():
            slot = resident.slot
            assert slot.rank == bucket_of(slot.rank) and slot.offset % slot.rank == 0, f"{slot} is not aligned"
            assert 0 <= slot.offset and slot.offset + slot.rank <= self.rows, f"{slot} is outside the arena"
            assert resident.pins >= 0 and 0 < resident.used <= self._clock
            for row in range(slot.offset, slot.offset + slot.rank, SMALLEST_RANK):
                assert row not in taken, f"{version} and {taken[row]} overlap"
                taken[row] = version
            windows.occupy(*_window_of(slot), self._key(version))
        assert {resident.slot.offset: version for version, resident in self._residents.items()} == self._at
        assert len(taken) * SMALLEST_RANK == self.rows_used
        beside = {version: resident.beside for version, resident in self._residents.items() if resident.beside}
        assert beside == self._beside and sum(beside.values()) <= self.beside
        assert windows.keys() == self._windows.keys(), "the windows are out of date"

    def _place_beside(self, staying: Collection[str], wanted: Mapping[str, int]) -> dict[str, Acquired] | None:
        """Places what is wanted and does not stay, moving nobody who stays; or changes nothing and returns None.

        The largest are placed first. Of one size, every window that is left is as good as the next for what follows:
        each holds as many smaller ones. So there is a way to place them if there is any.
        """
        for version in staying:
            self._windows.change(*_window_of(self._residents[version].slot), UNTOUCHABLE)
        sizes = {version: bucket_of(rank) for version, rank in wanted.items() if version not in staying}
        removed = {version: self._remove(version) for version in sizes if version in self._residents}
        moved = len(removed)
        placed: dict[str, Acquired] = {}
        for version, size in sorted(sizes.items(), key=lambda item: -item[1]):
            number = self._windows.best(_level_of(size))
            if number is None:
                break
            slot = Slot(number * size, size)
            evicted = tuple(self._holders(slot))
            removed |= {name: self._remove(name) for name in evicted}
            self._put(version, _Resident(slot, pins=1, used=0), UNTOUCHABLE)
            placed[version] = Acquired(slot, is_new=True, evicted=evicted)
        is_complete = len(placed) == len(sizes)
        if not is_complete:
            for version in placed:
                self._remove(version)
            for version, resident in removed.items():
                self._put(version, resident)
        for version in staying:
            self._renew(version)
        if not is_complete:
            return None
        for version in removed:
            self._on_gone(version)
        for version in placed:
            self._touch(version)
        self.evictions += len(removed) - moved
        self.misses += len(placed)
        return placed

    def _make_room_beside(self, staying: Collection[str]) -> None:
        """Removes who takes bytes beside the arena, until there are few enough; those kept only if it must be."""
        if sum(self._beside.values()) <= self.beside:
            return
        free = [version for version in self._beside if version not in staying and not self._residents[version].pins]
        free.sort(key=lambda version: (version in self._kept, self._residents[version].used))
        for version in free:
            self._remove(version)
            self._on_gone(version)
            self.evictions += 1
            if sum(self._beside.values()) <= self.beside:
                return

    def _pin(self, version: str) -> Acquired:
        resident = self._residents[version]
        resident.pins += 1
        resident.retired = False
        self.hits += 1
        self._touch(version)
        return Acquired(resident.slot, is_new=False)

    def _holders(self, window: Slot) -> list[str]:
        """Residents that overlap the window, in order of offset."""
        around = window
        while around.rank <= self.rows:
            if (holder := self._resident_at(around)) is not None:
                return [holder]
            size = 2 * around.rank
            around = Slot(around.offset // size * size, size)
        found, parts = list[str](), [window]
        while parts:
            part = parts.pop()
            if (holder := self._resident_at(part)) is not None:
                found.append(holder)
            elif self._windows.is_held(*_window_of(part)):
                half = part.rank // 2
                parts += [Slot(part.offset + half, half), Slot(part.offset, half)]
        return found

    def _resident_at(self, slot: Slot) -> str | None:
        """Who has exactly this slot."""
        version = self._at.get(slot.offset)
        return version if version is not None and self._residents[version].slot.rank == slot.rank else None

    def _touch(self, version: str) -> None:
        self._clock += 1
        self._residents[version].used = self._clock
        self._renew(version)

    def _key(self, version: str) -> int:
        resident = self._residents[version]
        return key_of(resident.used, pinned=resident.pins > 0, kept=version in self._kept)

    def _renew(self, version: str) -> None:
        self._windows.change(*_window_of(self._residents[version].slot), self._key(version))

    def _put(self, version: str, resident: _Resident, key: int | None = None) -> None:
        self._residents[version] = resident
        self._at[resident.slot.offset] = version
        if resident.beside:
            self._beside[version] = resident.beside
        self.rows_used += resident.slot.rank
        self._windows.occupy(*_window_of(resident.slot), self._key(version) if key is None else key)

    def _remove(self, version: str) -> _Resident:
        resident = self._residents.pop(version)
        self._beside.pop(version, None)
        del self._at[resident.slot.offset]
        self.rows_used -= resident.slot.rank
        self._windows.vacate(*_window_of(resident.slot))
        return resident


def _level_of(size: int) -> int:
    return (size // SMALLEST_RANK).bit_length() - 1


def _window_of(slot: Slot) -> tuple[int, int]:
    """Its level and number."""
    return _level_of(slot.rank), slot.offset // slot.rank
