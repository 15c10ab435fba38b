"""The slot table in its plainest form, which `SlotTable` is held against: the same decisions by looking everywhere."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from loramux_adapters.lora.slots import SMALLEST_RANK, Acquired, Slot, SlotTable, _Resident, bucket_of


class PlainSlotTable:
    """As `SlotTable`. It looks at every window, several times."""

    def __init__(self, rows: int) -> None:
        """`rows`: rank rows of the arena; what exceeds a multiple of SMALLEST_RANK stays unused."""
        if rows < 0:
            raise ValueError(f"the arena cannot have {rows} rows")
        self.rows = rows
        self.evictions = 0  # since the start, as are these two: acquired versions that were resident, and that were not
        self.hits = self.misses = 0
        self._kept: frozenset[str] = frozenset()  # not evicted as long as there is another way
        self._residents: dict[str, _Resident] = {}
        self._units: list[str | None] = [None] * (rows // SMALLEST_RANK)  # who holds each SMALLEST_RANK rows
        self._clock = 0

    @classmethod
    def like(cls, table: SlotTable) -> PlainSlotTable:
        """One in the same state."""
        plain = cls(table.rows)
        plain.evictions, plain.hits, plain.misses = table.evictions, table.hits, table.misses
        plain._kept, plain._clock = table._kept, table._clock
        for version, resident in table._residents.items():
            plain._residents[version] = replace(resident)
            plain._fill(resident.slot, version)
        return plain

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
        size = bucket_of(rank)
        resident = self._residents.get(version)
        if resident is not None:
            assert resident.slot.rank == size, f"{version} is resident with another rank"
            return self._pin(version)
        slot = self._free_window(size) or self._stalest_window(size)
        if slot is None:
            return None
        return self._place(version, slot)

    def acquire_all(self, wanted: Mapping[str, int]) -> dict[str, Acquired] | None:
        """Pins a slot for each of these versions (version -> rank), or changes nothing and returns None.

        A version of theirs that is resident stays where it is if the others find room around it. Else those of them
        that nobody pins are placed anew with the rest, and are `is_new` again: so whatever `fits` is placed as soon as
        nobody else pins anything, wherever its parts were left lying.
        """
        if len(wanted) == 1:
            ((version, rank),) = wanted.items()
            only = self.acquire(version, rank)
            return None if only is None else {version: only}
        present = [version for version in wanted if version in self._residents]
        pinned = [version for version in present if self._residents[version].pins]
        plan = self._plan(wanted, present)
        if plan is None and len(pinned) < len(present):
            plan = self._plan(wanted, pinned)
        if plan is None:
            return None
        for version in plan.keys() & self._residents.keys():
            self._remove(version)
        acquired = {version: self._place(version, slot) for version, slot in plan.items()}
        return acquired | {version: self._pin(version) for version in wanted if version not in plan}

    def release(self, version: str) -> None:
        """Takes one pin back. The version stays resident; without pins it may be evicted, least recently used first."""
        resident = self._residents[version]
        assert resident.pins > 0, f"{version} is released more often than acquired"
        resident.pins -= 1
        self._touch(resident)
        if resident.retired and not resident.pins:
            self._remove(version)

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
        self._kept = frozenset(versions)

    def drop(self, version: str) -> None:
        """Forgets an unpinned resident (its copy failed, or it was deleted). No-op if it is pinned or not resident."""
        resident = self._residents.get(version)
        if resident is not None and resident.pins == 0:
            self._remove(version)

    def __len__(self) -> int:
        """How many versions are resident."""
        return len(self._residents)

    @property
    def resident(self) -> list[str]:
        """Versions on the device, by offset."""
        return sorted(self._residents, key=lambda version: self._residents[version].slot)

    @property
    def pinned(self) -> list[str]:
        """Resident versions that may not be evicted now, by offset."""
        return [version for version in self.resident if self._residents[version].pins]

    @property
    def rows_used(self) -> int:
        """Rows held by residents, pinned or not."""
        return sum(resident.slot.rank for resident in self._residents.values())

    def check_integrity(self) -> None:
        """Asserts that slots are aligned, inside the arena and disjoint, and that the map of units agrees with them."""
        expected: list[str | None] = [None] * len(self._units)
        for version, resident in self._residents.items():
            slot = resident.slot
            assert slot.rank == bucket_of(slot.rank) and slot.offset % slot.rank == 0, f"{slot} is not aligned"
            assert 0 <= slot.offset and slot.offset + slot.rank <= self.rows, f"{slot} is outside the arena"
            assert resident.pins >= 0 and 0 < resident.used <= self._clock
            for unit in _units_of(slot):
                assert expected[unit] is None, f"{version} and {expected[unit]} overlap"
                expected[unit] = version
        assert expected == self._units, "the map of units is out of date"

    def _pin(self, version: str) -> Acquired:
        resident = self._residents[version]
        resident.pins += 1
        resident.retired = False
        self.hits += 1
        self._touch(resident)
        return Acquired(resident.slot, is_new=False)

    def _place(self, version: str, slot: Slot) -> Acquired:
        """Puts a version that is not resident into a window in which nobody is pinned."""
        evicted = tuple(self._holders(slot))
        for name in evicted:
            self._remove(name)
        self.evictions += len(evicted)
        self.misses += 1
        resident = _Resident(slot, pins=1, used=0)
        self._touch(resident)
        self._residents[version] = resident
        self._fill(slot, version)
        return Acquired(slot, is_new=True, evicted=evicted)

    def _plan(self, wanted: Mapping[str, int], staying: Collection[str]) -> dict[str, Slot] | None:
        """A window for each version but those that stay, touching no pinned slot, none that stays, and no other.

        The largest are placed first. Of one size, every window that is left is as good as the next for what follows:
        each holds as many smaller ones. So there is a plan if there is any way to place them.
        """
        sizes = {version: bucket_of(rank) for version, rank in wanted.items() if version not in staying}
        taken = {unit for version in staying for unit in _units_of(self._residents[version].slot)}
        plan: dict[str, Slot] = {}
        for version, size in sorted(sizes.items(), key=lambda item: -item[1]):
            window = self._free_window(size, taken) or self._stalest_window(size, taken)
            if window is None:
                return None
            plan[version] = window
            taken.update(_units_of(window))
        return plan

    def _free_window(self, size: int, taken: Collection[int] = ()) -> Slot | None:
        """The free window whose free neighbourhood is smallest, so that big windows stay whole; then the lowest."""
        free = [window for window in self._windows(size, taken) if not self._holders(window)]
        return min(free, key=lambda window: (self._free_around(window), window.offset), default=None)

    def _free_around(self, window: Slot) -> int:
        """Rank of the largest free window around this free one."""
        while True:
            size = 2 * window.rank
            wider = Slot(window.offset // size * size, size)
            if wider.offset + size > self.rows or self._holders(wider):
                return window.rank
            window = wider

    def _stalest_window(self, size: int, taken: Collection[int] = ()) -> Slot | None:
        """Among the windows that touch no pinned slot, the one whose last use is longest ago; then the lowest.

        Windows with a kept version count only where there is no other, pinned ones included: those come free again.
        """
        windows = self._windows(size, taken)
        stalest: tuple[int, Slot] | None = None
        for window in [one for one in windows if not self._kept & self._holders(one).keys()] or windows:
            holders = [self._residents[version] for version in self._holders(window)]
            if any(holder.pins for holder in holders):
                continue
            last_used = max(holder.used for holder in holders)
            if stalest is None or last_used < stalest[0]:
                stalest = last_used, window
        return None if stalest is None else stalest[1]

    def _windows(self, size: int, taken: Collection[int] = ()) -> list[Slot]:
        """All windows of this size without a unit that is taken."""
        windows = [Slot(offset, size) for offset in range(0, self.rows - size + 1, size)]
        return [one for one in windows if not any(unit in taken for unit in _units_of(one))] if taken else windows

    def _holders(self, window: Slot) -> dict[str, None]:
        """Residents that overlap the window, in order of offset."""
        return {version: None for unit in _units_of(window) if (version := self._units[unit]) is not None}

    def _touch(self, resident: _Resident) -> None:
        self._clock += 1
        resident.used = self._clock

    def _remove(self, version: str) -> None:
        self._fill(self._residents.pop(version).slot, None)

    def _fill(self, slot: Slot, version: str | None) -> None:
        for unit in _units_of(slot):
            self._units[unit] = version


def _units_of(slot: Slot) -> range:
    return range(slot.offset // SMALLEST_RANK, (slot.offset + slot.rank) // SMALLEST_RANK)


def state_of(table: SlotTable | PlainSlotTable) -> tuple[object, ...]:
    """All that decides what it does next, and what it counts."""
    counts = (table.evictions, table.hits, table.misses, table.rows_used)
    return table._residents, table._kept, table._clock, counts
