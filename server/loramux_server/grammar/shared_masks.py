"""Masks that replies held to the same pattern share: made once for each thing that the next token can see.

llguidance makes each mask by walking the tokens, and knows only the last one again. `([a-z]{2,9} ){500}` has some 5,000
places, one mask for each; but what a token of at most 15 bytes can see there are 9 things, until the end is near.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from loramux_server.grammar.pattern_reading import ReadPattern, read_pattern
from loramux_server.grammar.residuals import Term, Terms, Unclear
from loramux_server.grammar.vocabulary import TokenTexts

_MOST_HELD = 20_000  # terms, derivatives and moves of one pattern, some 150 bytes each
_MOST_WORK = 2_000  # terms that are looked at for one token: a millisecond or two
_WORK_TO_READ = 20_000  # and for a whole pattern
_TRIAL = 64  # moves, after which a pattern whose masks are hardly used is given up
_MOST_PATTERNS = 16
_MOST_MASK_BYTES = 2 * 1024 * 1024  # of one pattern


class PatternPlace(NamedTuple):
    """Where a reply stands within its pattern.

    Attributes:
        rest: what may follow.
        seen: what of it the next token can see: it alone decides on the mask.
    """

    rest: Term
    seen: Term


class Mask(NamedTuple):
    """
    Attributes:
        bits: [ceil(vocabulary / 32)] what may come next, not to be written to.
        may_end: an end token may.
    """

    bits: npt.NDArray[np.uint32]
    may_end: bool


class SharedMasks:
    """Of one pattern. `moved` and `known` may be called by any thread at any time and wait for nobody; `move` waits for
    other threads that do the same.
    """

    def __init__(self, pattern: str, texts: TokenTexts) -> None:
        """Raises Unclear: the pattern cannot be followed here. `texts`: of the tokens."""
        self._lock = threading.Lock()
        self._terms = Terms(_MOST_HELD, _WORK_TO_READ)
        self._pattern: ReadPattern = read_pattern(pattern, self._terms)
        self._reach = max(1, texts.longest(self._pattern.inside, self._pattern.beside))
        self._moves: dict[tuple[Term, bytes], PatternPlace | None] = {}
        self._masks: dict[Term, Mask] = {}
        self._mask_bytes = 0
        self._is_wrong = False
        self._uses = 0  # of masks; a few may be missed where threads count at once
        self.start = self._place(self._pattern.term)

    @property
    def is_worn(self) -> bool:
        """It holds all it may, and was worth it: replies that begin now are better off with one that begins anew."""
        return self._is_full and self._uses > len(self._moves)

    @property
    def _is_full(self) -> bool:
        return self._terms.count + len(self._moves) > _MOST_HELD - _MOST_WORK

    @property
    def _is_vain(self) -> bool:
        return len(self._moves) >= _TRIAL and 4 * self._uses < len(self._moves)

    def moved(self, place: PatternPlace, text: bytes) -> tuple[PatternPlace | None] | None:
        """Where this text leads, None for where it cannot be told, if somebody has gone there before; else None."""
        try:
            return (self._moves[place.rest, text.translate(self._pattern.classes)],)
        except KeyError:
            return None

    def move(self, place: PatternPlace, text: bytes) -> PatternPlace | None:
        """Where this text leads, which has come behind `place`; None: it cannot be told, or not soon."""
        alike = text.translate(self._pattern.classes)
        with self._lock:
            known = self._moves.get((place.rest, alike), place)
            if known is not place:
                return known
            if self._is_full or self._is_vain or self._is_wrong:
                return None
            found: PatternPlace | None
            try:
                found = self._moved(place.rest, alike)
            except (Unclear, RecursionError):
                found = None
            self._moves[place.rest, alike] = found
            return found

    def _moved(self, rest: Term, text: bytes) -> PatternPlace:
        """Raises Unclear."""
        self._terms.work = _MOST_WORK
        for byte in text:
            rest = self._terms.after(rest, byte)
        if rest is self._terms.nothing:  # though the text has come: the pattern has been read wrongly
            self._is_wrong = True
            raise Unclear
        return self._place(rest)

    def known(self, place: PatternPlace) -> Mask | None:
        if self._is_wrong or (mask := self._masks.get(place.seen)) is None:
            return None
        self._uses += 1
        return mask

    def keep(self, place: PatternPlace, mask: Mask) -> None:
        """llguidance's, at this place."""
        with self._lock:
            if mask.may_end != place.rest.nullable:
                self._is_wrong = True
            elif place.seen not in self._masks and self._mask_bytes + mask.bits.nbytes <= _MOST_MASK_BYTES:
                mask.bits.flags.writeable = False
                self._masks[place.seen] = mask
                self._mask_bytes += mask.bits.nbytes

    def _place(self, rest: Term) -> PatternPlace:
        return PatternPlace(rest, self._terms.cut(rest, self._reach))


class PatternMasks:
    """Of the patterns that were asked for last. Any number of threads may call its methods."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._patterns: OrderedDict[str, SharedMasks | None] = OrderedDict()

    def of(self, pattern: str, texts: TokenTexts) -> SharedMasks | None:
        """None: this pattern's masks are not shared. `texts`: of the tokens."""
        with self._lock:
            if pattern in self._patterns:
                self._patterns.move_to_end(pattern)
                there = self._patterns[pattern]
                if there is None or not there.is_worn:
                    return there
                del self._patterns[pattern]
        made: SharedMasks | None
        try:
            made = SharedMasks(pattern, texts)
        except Unclear:
            made = None
        with self._lock:
            kept = self._patterns.setdefault(pattern, made)
            while len(self._patterns) > _MOST_PATTERNS:
                self._patterns.popitem(last=False)
            return kept
