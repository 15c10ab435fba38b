"""The slot table: placement, pins, eviction."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from loramux_adapters.lora.slots import Acquired, Slot, SlotTable, bucket_of
from support.lines_run import lines_run
from support.plain_slots import PlainSlotTable, state_of


def acquired(table: SlotTable, version: str, rank: int) -> Acquired:
    result = table.acquire(version, rank)
    assert result is not None
    table.check_integrity()
    return result


def place(table: SlotTable, version: str, rank: int) -> Slot:
    """Makes a version resident without a pin."""
    slot = acquired(table, version, rank).slot
    table.release(version)
    return slot


@pytest.mark.parametrize(("rank", "bucket"), [(1, 8), (7, 8), (8, 8), (9, 16), (16, 16), (17, 32), (256, 256)])
def test_a_bucket_is_the_next_power_of_two_and_at_least_eight(rank: int, bucket: int) -> None:
    assert bucket_of(rank) == bucket


def test_a_rank_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        bucket_of(0)


def test_a_negative_arena_is_refused() -> None:
    with pytest.raises(ValueError, match="-8 rows"):
        SlotTable(-8)


def test_fits_asks_about_an_empty_table() -> None:
    table = SlotTable(40)
    acquired(table, "a", 32)
    assert table.fits(32) and table.fits(17)
    assert not table.fits(33)
    assert not SlotTable(0).fits(1)


def test_several_fit_if_their_buckets_together_do() -> None:
    table = SlotTable(56)
    assert table.fits(32, 9, 8) and table.fits(8, 32, 16) and table.fits(*[8] * 7) and table.fits()
    assert not table.fits(32, 32) and not table.fits(*[8] * 8)


def test_a_new_version_must_be_loaded_and_a_resident_one_need_not() -> None:
    table = SlotTable(16)
    assert acquired(table, "a", 4) == Acquired(Slot(0, 8), is_new=True)
    assert acquired(table, "a", 4) == Acquired(Slot(0, 8), is_new=False)
    assert table.lookup("a") == Slot(0, 8)
    assert table.lookup("b") is None


def test_a_released_version_stays_resident() -> None:
    table = SlotTable(16)
    place(table, "a", 8)
    assert table.resident == ["a"] and table.pinned == [] and table.rows_used == 8
    assert not acquired(table, "a", 8).is_new


def test_a_version_is_pinned_until_its_last_release() -> None:
    table = SlotTable(8)
    acquired(table, "a", 8)
    acquired(table, "a", 8)
    table.release("a")
    assert table.acquire("b", 8) is None
    table.release("a")
    assert acquired(table, "b", 8).evicted == ("a",)


def test_releasing_more_often_than_acquiring_is_a_bug() -> None:
    table = SlotTable(8)
    place(table, "a", 8)
    with pytest.raises(AssertionError, match="more often"):
        table.release("a")


def test_windows_are_aligned_to_their_rank() -> None:
    table = SlotTable(64)
    assert acquired(table, "small", 8).slot == Slot(0, 8)
    assert acquired(table, "large", 32).slot == Slot(32, 32)
    assert acquired(table, "middle", 16).slot == Slot(16, 16)


def test_a_small_slot_goes_where_it_breaks_no_large_window() -> None:
    table = SlotTable(64)
    acquired(table, "a", 8)
    acquired(table, "b", 16)  # rows 16..32
    assert acquired(table, "c", 8).slot == Slot(8, 8)
    assert acquired(table, "d", 32).slot == Slot(32, 32)


def test_rows_that_fill_no_window_are_used_by_smaller_ones_first() -> None:
    table = SlotTable(40)
    assert acquired(table, "a", 8).slot == Slot(32, 8)
    assert acquired(table, "b", 32).slot == Slot(0, 32)


def test_rows_below_the_smallest_window_stay_unused() -> None:
    table = SlotTable(20)
    assert acquired(table, "a", 8).slot == Slot(0, 8)
    assert acquired(table, "b", 8).slot == Slot(8, 8)
    assert table.acquire("c", 8) is None


def test_a_free_window_is_taken_before_anyone_is_evicted() -> None:
    table = SlotTable(16)
    place(table, "a", 8)
    assert acquired(table, "b", 8) == Acquired(Slot(8, 8), is_new=True)


def test_the_least_recently_used_leaves_first() -> None:
    table = SlotTable(24)
    for version in "abc":
        place(table, version, 8)
    place(table, "a", 8)  # used again
    assert acquired(table, "d", 8).evicted == ("b",)
    assert sorted(table.resident) == ["a", "c", "d"]
    assert table.evictions == 1


def test_a_large_slot_evicts_every_resident_below_it() -> None:
    table = SlotTable(64)
    for version in "abcdefgh":
        place(table, version, 8)
    for version in "abcd":
        place(table, version, 8)  # rows 0..32 were used last
    assert acquired(table, "large", 32) == Acquired(Slot(32, 32), is_new=True, evicted=("e", "f", "g", "h"))
    assert table.evictions == 4


def test_a_window_is_as_recent_as_its_most_recent_resident() -> None:
    table = SlotTable(32)
    for version in "abcd":
        place(table, version, 8)
    place(table, "a", 8)  # rows 0..16 hold the oldest left, b, but also the newest
    assert acquired(table, "large", 16).evicted == ("c", "d")


def test_a_small_slot_evicts_the_unpinned_large_one_around_it() -> None:
    table = SlotTable(16)
    place(table, "large", 16)
    assert acquired(table, "a", 8) == Acquired(Slot(0, 8), is_new=True, evicted=("large",))
    assert acquired(table, "b", 8) == Acquired(Slot(8, 8), is_new=True)


def test_a_pinned_slot_blocks_the_windows_above_and_below_it() -> None:
    table = SlotTable(32)
    acquired(table, "a", 16)
    acquired(table, "b", 16)
    assert table.acquire("c", 8) is None
    assert table.acquire("c", 32) is None
    assert table.resident == ["a", "b"]


def test_room_is_found_again_after_a_release() -> None:
    table = SlotTable(32)
    acquired(table, "a", 16)
    acquired(table, "b", 16)
    assert table.acquire("c", 16) is None
    table.release("b")
    assert table.acquire("c", 32) is None
    assert acquired(table, "c", 16).evicted == ("b",)


def test_dropping_forgets_an_unpinned_version_and_nothing_else() -> None:
    table = SlotTable(16)
    place(table, "a", 8)
    acquired(table, "b", 8)
    for version in ("a", "b", "absent"):
        table.drop(version)
    table.check_integrity()
    assert table.resident == ["b"]
    assert table.evictions == 0
    assert acquired(table, "c", 8).slot == Slot(0, 8)


def test_several_versions_are_placed_together_or_not_at_all() -> None:
    table = SlotTable(32)
    acquired(table, "busy", 8)
    place(table, "idle", 16)
    assert table.acquire_all({"a": 16, "b": 16}) is None
    table.check_integrity()
    assert table.resident == ["busy", "idle"] and table.evictions == 0, "nothing is evicted in vain"
    got = table.acquire_all({"a": 8, "b": 16})
    assert got == {"a": Acquired(Slot(8, 8), is_new=True), "b": Acquired(Slot(16, 16), is_new=True, evicted=("idle",))}
    assert table.pinned == ["busy", "a", "b"]


def test_what_is_resident_stays_where_it_is_if_the_rest_finds_room() -> None:
    table = SlotTable(32)
    place(table, "a", 8)
    got = table.acquire_all({"b": 16, "a": 8})
    assert got is not None
    assert got["a"] == Acquired(Slot(0, 8), is_new=False) and got["b"].slot == Slot(16, 16)


def test_residents_in_each_others_way_are_placed_anew_so_that_what_fits_is_never_stuck() -> None:
    table = SlotTable(32)
    for version in ("a", "x", "b"):
        place(table, version, 8)
    assert [table.lookup(version) for version in "ab"] == [Slot(0, 8), Slot(16, 8)]
    got = table.acquire_all({"a": 8, "b": 8, "wide": 16})
    table.check_integrity()
    assert got is not None and all(one.is_new for one in got.values())
    assert table.evictions == 1, "only x has left"


def test_a_resident_that_another_uses_is_not_moved() -> None:
    table = SlotTable(32)
    acquired(table, "x", 8), place(table, "y", 8), acquired(table, "b", 8)
    assert table.lookup("b") == Slot(16, 8)
    assert table.acquire_all({"b": 8, "wide": 16}) is None
    table.release("b"), table.release("x")
    got = table.acquire_all({"b": 8, "wide": 16})
    assert got is not None and got["b"] == Acquired(Slot(16, 8), is_new=False) and got["wide"].slot == Slot(0, 16)


class Slots(RuleBasedStateMachine):
    """Acquire, release and drop in any order, against the plainest description of what must hold."""

    def __init__(self) -> None:
        super().__init__()
        self.table = SlotTable(72)
        self.pins: dict[str, int] = {}
        self.arena: list[str | None] = [None] * 72  # who was last written to each row

    @staticmethod
    def rank_of(version: str) -> int:
        return {"a": 1, "b": 8, "c": 8, "d": 13, "e": 16, "f": 16, "g": 32, "h": 20, "i": 64, "j": 5, "k": 8}[version]

    @rule(version=st.sampled_from("abcdefghijk"))
    def acquire(self, version: str) -> None:
        resident_before = self.table.lookup(version)
        result = self.table.acquire(version, self.rank_of(version))
        if result is None:
            assert resident_before is None and not self.some_window_is_unpinned(bucket_of(self.rank_of(version)))
            return
        assert result.is_new == (resident_before is None)
        assert not any(self.pins.get(evicted) for evicted in result.evicted)
        if result.is_new:
            self.arena[result.slot.offset : result.slot.offset + result.slot.rank] = [version] * result.slot.rank
        self.pins[version] = self.pins.get(version, 0) + 1

    @rule(versions=st.sets(st.sampled_from("abcdefghijk"), min_size=2, max_size=4))
    def acquire_all(self, versions: set[str]) -> None:
        before = self.table.resident
        result = self.table.acquire_all({version: self.rank_of(version) for version in sorted(versions)})
        pinned = [self.table.lookup(version) for version, pins in self.pins.items() if pins]
        if result is None:
            rows = {row for slot in pinned if slot for row in range(slot.offset, slot.offset + slot.rank)}
            free = [version for version in versions if not self.pins.get(version)]
            assert not can_place([bucket_of(self.rank_of(version)) for version in free], rows)
            assert self.table.resident == before
            return
        assert result.keys() == versions
        for version, got in result.items():
            assert not any(self.pins.get(evicted) for evicted in got.evicted)
            assert version in before or got.is_new
            if got.is_new:
                assert not self.pins.get(version), "moved while in use"
                self.arena[got.slot.offset : got.slot.offset + got.slot.rank] = [version] * got.slot.rank
            self.pins[version] = self.pins.get(version, 0) + 1

    def some_window_is_unpinned(self, size: int) -> bool:
        taken = [self.table.lookup(version) for version, pins in self.pins.items() if pins]
        rows = {row for slot in taken if slot for row in range(slot.offset, slot.offset + slot.rank)}
        return any(rows.isdisjoint(range(offset, offset + size)) for offset in range(0, 72 - size + 1, size))

    @rule(version=st.sampled_from("abcdefghijk"))
    def release(self, version: str) -> None:
        if self.pins.get(version):
            self.pins[version] -= 1
            self.table.release(version)

    @rule(version=st.sampled_from("abcdefghijk"))
    def drop(self, version: str) -> None:
        self.table.drop(version)
        assert (self.table.lookup(version) is None) or self.pins[version] > 0

    @invariant()
    def every_resident_is_whole(self) -> None:
        self.table.check_integrity()
        assert set(self.table.pinned) == {version for version, pins in self.pins.items() if pins}
        for version in self.table.resident:
            slot = self.table.lookup(version)
            assert slot is not None
            assert set(self.arena[slot.offset : slot.offset + slot.rank]) == {version}


def can_place(sizes: list[int], taken: set[int]) -> bool:
    """By trying everything: whether windows of these sizes fit beside the rows that are taken."""
    if not sizes:
        return True
    windows = [range(offset, offset + sizes[0]) for offset in range(0, 72 - sizes[0] + 1, sizes[0])]
    return any(taken.isdisjoint(window) and can_place(sizes[1:], taken | set(window)) for window in windows)


TestSlots = Slots.TestCase
TestSlots.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_retired_version_leaves_at_once_or_with_its_last_pin() -> None:
    table = SlotTable(16)
    place(table, "idle", 8)
    acquired(table, "busy", 8)
    acquired(table, "busy", 8)
    for version in ("idle", "busy", "unknown"):
        table.retire(version)
    assert table.resident == ["busy"] and len(table) == 1
    table.release("busy")
    assert table.resident == ["busy"]
    table.release("busy")
    assert table.resident == [] and table.evictions == 0
    table.check_integrity()


def test_a_retired_version_that_is_acquired_again_stays() -> None:
    table = SlotTable(16)
    acquired(table, "a", 8)
    table.retire("a")
    acquired(table, "a", 8)
    table.release("a")
    table.release("a")
    assert table.resident == ["a"]


def test_a_kept_version_is_not_evicted_while_there_is_another_way() -> None:
    table = SlotTable(24)
    for version in "abc":
        place(table, version, 8)
    table.keep({"a"})
    assert acquired(table, "d", 8).evicted == ("b",)
    assert acquired(table, "e", 8).evicted == ("c",)
    assert table.acquire("f", 8) is None, "d and e will end; a stays meanwhile"
    table.release("d")
    assert acquired(table, "f", 8).evicted == ("d",)
    assert table.lookup("a") is not None
    table.keep(())
    assert acquired(table, "g", 8).evicted == ("a",)


def test_a_kept_version_gives_way_to_one_that_has_no_window_without_it() -> None:
    table = SlotTable(32)
    place(table, "a", 8)
    table.keep({"a"})
    assert acquired(table, "wide", 32).evicted == ("a",)


def test_found_and_missing_versions_are_counted() -> None:
    table = SlotTable(16)
    place(table, "a", 8)
    place(table, "a", 8)
    place(table, "b", 8)
    assert (table.hits, table.misses) == (1, 2)


WIDE = {f"{rank}-{number}": rank for rank in (1, 8, 9, 16, 20, 32, 60, 100) for number in range(4)}


class AgainstPlain(RuleBasedStateMachine):
    """Whatever is asked, the table does what the plain one does in the same state."""

    @initialize(rows=st.sampled_from([8, 40, 64, 72, 128, 200, 256]))
    def begin(self, rows: int) -> None:
        self.table = SlotTable(rows)

    def both(self, ask: Callable[[SlotTable | PlainSlotTable], object]) -> None:
        plain = PlainSlotTable.like(self.table)
        assert ask(self.table) == ask(plain)
        assert state_of(self.table) == state_of(plain)

    @rule(version=st.sampled_from(sorted(WIDE)), pinned=st.booleans())
    def acquire(self, version: str, pinned: bool) -> None:
        self.both(lambda table: table.acquire(version, WIDE[version]))
        if not pinned and version in self.table.pinned:
            self.both(lambda table: table.release(version))

    @rule(versions=st.sets(st.sampled_from(sorted(WIDE)), min_size=2, max_size=5), pinned=st.booleans())
    def acquire_all(self, versions: set[str], pinned: bool) -> None:
        """Not the same windows always: what one of them evicted is room for the next here. But as often as there."""
        plain, before = PlainSlotTable.like(self.table), self.table.pinned
        held = {version: self.table.lookup(version) for version in before}
        wanted = {version: WIDE[version] for version in sorted(versions)}
        got = self.table.acquire_all(wanted)
        if got is None:
            assert state_of(self.table) == state_of(PlainSlotTable.like(self.table))
            assert plain.acquire_all(wanted) is None or self.table._kept
            if not before:
                assert not self.table.fits(*wanted.values())
            return
        assert plain.acquire_all(wanted) is not None or self.table._kept
        assert not {name for one in got.values() for name in one.evicted} & set(before)
        assert {version: self.table.lookup(version) for version in before} == held
        for version in versions if not pinned else ():
            self.table.release(version)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if pinned := self.table.pinned:
            version = data.draw(st.sampled_from(pinned))
            self.both(lambda table: table.release(version))

    @rule(version=st.sampled_from(sorted(WIDE)), retired=st.booleans())
    def leave(self, version: str, retired: bool) -> None:
        self.both(lambda table: table.retire(version) if retired else table.drop(version))

    @rule(versions=st.sets(st.sampled_from(sorted(WIDE)), max_size=6))
    def keep(self, versions: set[str]) -> None:
        self.both(lambda table: table.keep(versions))

    @invariant()
    def is_whole(self) -> None:
        self.table.check_integrity()


TestAgainstPlain = AgainstPlain.TestCase
TestAgainstPlain.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)


def test_who_is_found_does_not_depend_on_how_many_rows_there_are() -> None:
    """Steps of the interpreter in a call, with a full table of 2^6 and of 2^13 slots: by their logarithms."""
    steps = []
    for slots in (1 << 6, 1 << 13):
        table = SlotTable(slots * 8)
        for number in range(slots):
            table.acquire(str(number), 8)
            table.release(str(number))
        steps.append(lines_run(partial(table.acquire, "new", 64)))
        assert table.evictions == 8
    assert steps[1] < 5 * steps[0]


def test_who_takes_too_much_beside_the_arena_has_others_leave_and_waits_for_those_that_are_pinned() -> None:
    gone: list[str] = []
    table = SlotTable(64, beside=10, on_gone=gone.append)
    for version, nbytes in (("a", 4), ("b", 5), ("plain", 0)):
        assert table.acquire_all({version: 8}, {version: nbytes})
    assert table.acquire_all({"c": 8}, {"c": 2}) is None, "both are pinned"
    assert table.resident == ["a", "b", "plain"] and not gone
    for version in ("b", "a", "plain"):
        table.release(version)
    table.keep(["b"])
    assert table.acquire_all({"c": 8}, {"c": 2}) and gone == ["a"], "b is kept, though it was used before a"
    assert table.acquire_all({"d": 8, "b": 8}, {"d": 4}) is None, "b's own and c's are too much with it"
    table.release("c")
    assert table.acquire_all({"d": 8, "b": 8}, {"d": 5}) and gone == ["a", "c"]
    assert not table.fits_beside(6, 5) and table.fits_beside(5, 5)
    for version in ("d", "b"):
        table.release(version)
    table.retire("b")
    assert gone == ["a", "c", "b"] and table.evictions == 2
    assert table.acquire_all({"e": 32, "f": 32}, {"e": 9, "f": 1}) and set(gone[3:]) == {"d", "plain"}
    table.check_integrity()


def test_one_that_is_placed_anew_takes_as_much_beside_as_before_and_is_told_of() -> None:
    gone: list[str] = []
    table = SlotTable(32, beside=10, on_gone=gone.append)
    assert table.acquire_all({"pinned": 8}) and table.acquire_all({"a": 8}, {"a": 7})
    assert table.acquire_all({"other": 16})
    for version in ("a", "pinned", "other"):
        table.release(version)
    acquired = table.acquire_all({"a": 8, "b": 16, "c": 8}, {"b": 3})
    assert acquired is not None
    table.check_integrity()
    if acquired["a"].is_new:
        assert "a" in gone
    for version in acquired:
        table.release(version)
    assert table.acquire_all({"d": 8}, {"d": 1}) is not None and ("a" in gone or "b" in gone)
