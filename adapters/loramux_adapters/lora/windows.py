"""Windows of the arena, by size: which are free, and which of the others was used longest ago. A buddy allocator.

Windows nest: one of a size is two of the next smaller. Each has a key, and for each size the window of the least key is
at hand in a tree of least keys, the lowest window of several:

    FREE        free, and the window around it is not: so this is a whole free block
    a moment    when somebody who lies in it, or around it, was last used; with flags for pinned and kept
    NOTHING     part of a free block that is larger, or of somebody larger, who has his key at his lowest window alone

A change of one window is a change of one key for each size, and of what lies above it in that size's tree.
"""

from __future__ import annotations

FREE = -1
_KEPT, _PINNED = 1 << 62, 1 << 61
NOTHING = 1 << 63 | _PINNED
UNTOUCHABLE = _KEPT | _PINNED  # is not to be taken, and keeps nobody from taking a kept one


def key_of(used: int, *, pinned: bool, kept: bool) -> int:
    """Orders windows by whom to evict first: longest unused; then, once there are no others at all, kept ones.

    A pinned window comes before the kept ones and can never be taken: it will be free by itself, a kept one will not.
    """
    return used | (_PINNED if pinned else 0) | (_KEPT if kept else 0)


class Windows:
    """All windows of an arena of `units` of the smallest size; one is named by its level and its number.

    Level 0 is the smallest size, and each level has twice the size of the one below. O(levels) sizes change with a
    window, and in each the tree above it as far as its least key changes.
    """

    def __init__(self, units: int) -> None:
        self._levels = [_LeastKey(units >> level) for level in range(units.bit_length())]
        start = 0
        for level in reversed(range(len(self._levels))):
            if units >> level & 1:  # no window is wider here: it would reach over the end
                self._levels[level].set(start >> level, FREE)
                start += 1 << level

    def best(self, level: int) -> int | None:
        """The window of this size that is to be taken; None if all of them are in use.

        A free one, from the smallest block that holds one, so that large blocks stay whole, the lowest of those; else
        the one of the least key.
        """
        for wider in range(level, len(self._levels)):
            if self._levels[wider].least == FREE:
                return self._levels[wider].lowest() << (wider - level)
        if level >= len(self._levels) or self._levels[level].least & _PINNED:
            return None
        return self._levels[level].lowest()

    def is_held(self, level: int, number: int) -> bool:
        """Whether somebody lies in this window, who is not larger than it."""
        return FREE < self._levels[level][number] < NOTHING

    def occupy(self, level: int, number: int, key: int) -> None:
        """Somebody lies in this free window from now on."""
        block, inside = level, number
        while self._levels[block][inside] != FREE:
            block, inside = block + 1, inside >> 1
        self._levels[block].set(inside, NOTHING)
        for half in range(level, block):
            self._levels[half].set((number >> (half - level)) ^ 1, FREE)
        self.change(level, number, key)

    def change(self, level: int, number: int, key: int) -> None:
        """Whoever lies in this window has another key."""
        for smaller in range(level + 1):
            self._levels[smaller].set(number << (level - smaller), key)
        self._renew_above(level, number)

    def vacate(self, level: int, number: int) -> None:
        """Nobody lies in this window any more."""
        for smaller in range(level):
            self._levels[smaller].set(number << (level - smaller), NOTHING)
        while self._exists(level + 1, number >> 1) and self._levels[level][number ^ 1] == FREE:
            self._levels[level].set(number, NOTHING)
            self._levels[level].set(number ^ 1, NOTHING)
            level, number = level + 1, number >> 1
        self._levels[level].set(number, FREE)
        self._renew_above(level, number)

    def keys(self) -> list[list[int]]:
        """All of them, level by level; for tests."""
        return [[level[number] for number in range(level.count)] for level in self._levels]

    def _renew_above(self, level: int, number: int) -> None:
        while self._exists(level + 1, number >> 1):
            below = self._levels[level]
            key = _joined(below[number], below[number ^ 1])
            level, number = level + 1, number >> 1
            self._levels[level].set(number, key)

    def _exists(self, level: int, number: int) -> bool:
        return level < len(self._levels) and number < self._levels[level].count


class _LeastKey:
    """Keys of the windows of one size; `least` is the least of them, and `lowest` says where."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._leaves = 1 << (count - 1).bit_length()
        self._least = [NOTHING] * (2 * self._leaves)  # [1] the root, [n] over [2n] and [2n + 1], then the keys

    @property
    def least(self) -> int:
        return self._least[1]

    def __getitem__(self, number: int) -> int:
        return self._least[self._leaves + number]

    def set(self, number: int, key: int) -> None:
        least, node = self._least, self._leaves + number
        least[node] = key
        while node > 1:
            key = min(key, least[node ^ 1])
            node >>= 1
            if least[node] == key:
                return
            least[node] = key

    def lowest(self) -> int:
        node = 1
        while node < self._leaves:
            node *= 2
            if self._least[node] != self._least[1]:
                node += 1
        return node - self._leaves


def _joined(a: int, b: int) -> int:
    """The key of a window from those of its halves: as recent as the more recent, and pinned or kept if one is."""
    if a == FREE or b == FREE:
        return max(a, b)
    flags = (a | b) & UNTOUCHABLE
    return flags | max(a & ~UNTOUCHABLE, b & ~UNTOUCHABLE)
