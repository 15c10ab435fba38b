"""What may still follow within a pattern, byte by byte, and what of that the next token can see.

A pattern is a term. Brzozowski's derivative of a term by a byte is the term of what may follow that byte (Derivatives
of regular expressions, JACM 11, 1964). Two places of a pattern that differ only further ahead than the longest token
reaches have the same cut term (`Terms.cut`), and so the same mask.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

Ranges = tuple[tuple[int, int], ...]  # of code points, both ends included, in order, apart from each other
LAST_CODE_POINT = 0x10FFFF
_SURROGATES = (0xD800, 0xDFFF)
_PARTS = 8  # of a term, that take as much memory as a term
_SMALLEST = {1: 0, 2: 0x80, 3: 0x800, 4: 0x10000}  # code point, by bytes in UTF-8


class Unclear(Exception):
    """It cannot be told, or not soon, what may follow here. Not a failure: llguidance is asked instead."""


@dataclass(frozen=True, slots=True, eq=False)
class Term:
    """Of its `Terms` alone: two that are written alike are one object.

    Attributes:
        kind: nothing: no text at all. empty: the text without bytes. anything: whatever; of cut terms only.
            characters: one character of `parts[0]`; `parts[1]` names a class of which the ASCII part alone is known,
            which `parts[0]` is. partial: the rest of a character of `parts[0]` whose first bytes are `parts[1]`. then:
            `parts[0]`, which is no "then" itself, and `parts[1]` after it. either: one of `parts`. repeat: `parts[0]`,
            at least `parts[1]` times and at most `parts[2]` times (None: without end).
        nullable: the text without bytes is one of its texts.
        least: bytes of its shortest text.
    """

    kind: Literal["nothing", "empty", "anything", "characters", "partial", "then", "either", "repeat"]
    parts: tuple[Any, ...]
    nullable: bool
    least: int


class Terms:
    """All terms of one pattern. One thread at a time.

    Attributes:
        count: of terms and derivatives that are held; one with many parts counts as several.
        work: terms that may still be looked at, about a microsecond each; when it is used up, Unclear is raised.
    """

    def __init__(self, most: int, work: int) -> None:
        """`most`: that may be held; Unclear is raised where more would be."""
        self.count = 0
        self.work = work
        self._most = most
        self._terms: dict[tuple[Any, ...], Term] = {}
        self._derivatives: dict[tuple[Term, int], Term] = {}
        self.nothing = self._term("nothing", (), False, 0)
        self.empty = self._term("empty", (), True, 0)
        self.anything = self._term("anything", (), True, 0)

    def characters(self, ranges: Ranges, unknown: str = "") -> Term:
        """One character. `unknown`: the name of a class whose characters beyond ASCII are not known; `ranges` has the
        others. Raises Unclear.
        """
        if unknown and not ranges:
            raise Unclear  # perhaps there is no such character
        if not ranges:
            return self.nothing
        return self._term("characters", (ranges, unknown), False, 1 if unknown else len(chr(ranges[0][0]).encode()))

    def then(self, first: Term, rest: Term) -> Term:
        """Raises Unclear, as all that makes terms."""
        heads = []
        while first.kind == "then":
            heads.append(first.parts[0])
            first = first.parts[1]
        self._look(1 + len(heads))
        for head in (first, *reversed(heads)):
            if head is self.nothing or rest is self.nothing:
                return self.nothing
            if rest is self.empty:
                rest = head
            elif head is not self.empty:
                rest = self._term("then", (head, rest), head.nullable and rest.nullable, head.least + rest.least)
        return rest

    def either(self, terms: Iterable[Term]) -> Term:
        found: dict[Term, None] = {}
        for term in terms:
            self._look(len(term.parts) if term.kind == "either" else 1)
            if term.kind == "either":
                found.update(dict.fromkeys(term.parts))
            elif term is not self.nothing:
                found[term] = None
        if len(found) < 2:
            return next(iter(found), self.nothing)
        parts = tuple(sorted(found, key=id))
        return self._term("either", parts, any(it.nullable for it in parts), min(it.least for it in parts))

    def repeat(self, term: Term, least: int, most: int | None) -> Term:
        """`most`: None for without end."""
        if term.nullable:
            least = 0
        if term is self.empty or most == 0 or (term is self.nothing and not least):
            return self.empty
        if term is self.nothing or (least, most) == (1, 1):
            return term
        return self._term("repeat", (term, least, most), not least, least * term.least)

    def after(self, term: Term, byte: int) -> Term:
        """What may follow this byte in texts of the term; `nothing`: none has it there.

        Raises Unclear: the byte begins a character of a class that is not known.
        """
        if not term.parts:
            return self.nothing
        known = self._derivatives.get((term, byte))
        if known is None:
            known = self._after(term, byte)
            self._hold()
            self._derivatives[term, byte] = known
        return known

    def _after(self, term: Term, byte: int) -> Term:
        parts = term.parts
        if term.kind == "characters":
            if byte < 0x80:
                return self.empty if _has(parts[0], byte, byte) else self.nothing
            if parts[1]:
                raise Unclear
            return self._begun(parts[0], bytes([byte]))
        if term.kind == "partial":
            return self._begun(parts[0], parts[1] + bytes([byte]))
        if term.kind == "then":
            followed = self.then(self.after(parts[0], byte), parts[1])
            return self.either((followed, self.after(parts[1], byte))) if parts[0].nullable else followed
        if term.kind == "either":
            return self.either([self.after(part, byte) for part in parts])
        more = self.repeat(parts[0], max(0, parts[1] - 1), None if parts[2] is None else parts[2] - 1)
        return self.then(self.after(parts[0], byte), more)

    def _begun(self, ranges: Ranges, begun: bytes) -> Term:
        """The rest of a character whose first bytes are these."""
        lead = begun[0]
        length = 2 if 0xC2 <= lead < 0xE0 else 3 if 0xE0 <= lead < 0xF0 else 4 if 0xF0 <= lead < 0xF5 else 0
        if not length or any(byte & 0xC0 != 0x80 for byte in begun[1:]):
            return self.nothing
        first = lead & (0x7F >> length)
        for byte in begun[1:]:
            first = first << 6 | byte & 0x3F
        missing = length - len(begun)
        lowest = max(first << 6 * missing, _SMALLEST[length])
        highest = min(((first + 1) << 6 * missing) - 1, LAST_CODE_POINT)
        if lowest > highest or not _has(ranges, lowest, highest):
            return self.nothing
        return self._term("partial", (ranges, begun), False, missing) if missing else self.empty

    def cut(self, term: Term, length: int) -> Term:
        """A term with the same texts shorter than this many bytes, and the same beginnings of texts up to that length.

        Why: let the two terms be alike up to n, a ~n b, if both hold. What begins a text of `first rest` within n bytes
        begins one of `first`, or is one that is shorter than n and then a beginning in `rest` within what is left; so
        `rest` counts up to n - first.least alone. Of a repetition, c = ceil(n / least of one) are n bytes long or
        longer: what follows c is never seen, so that more than c are c, and a bound above is none.
        """
        self._look(1)
        if length <= 0:
            return self.anything
        if term.kind == "then":
            heads = []
            while term.kind == "then" and length > 0:
                heads.append(self.cut(term.parts[0], length))
                length -= term.parts[0].least
                term = term.parts[1]
            rest = self.cut(term, length)
            for head in reversed(heads):
                rest = self.then(head, rest)
            return rest
        if term.kind == "either":
            return self.either([self.cut(part, length) for part in term.parts])
        if term.kind != "repeat":
            return term
        once, least, most = term.parts
        if once.least:
            seen = -(-length // once.least)
            if least >= seen:
                least = most = seen
            elif most is not None and most >= seen:
                most = None
        return self.repeat(self.cut(once, length), least, most)

    def _term(self, kind: Any, parts: tuple[Any, ...], nullable: bool, least: int) -> Term:
        known = self._terms.get((kind, *parts))
        if known is None:
            self._hold(1 + len(parts) // _PARTS)
            known = self._terms[(kind, *parts)] = Term(kind, parts, nullable, least)
        return known

    def _hold(self, terms: int = 1) -> None:
        if self.count + terms > self._most:
            raise Unclear
        self.count += terms
        self._look(1)

    def _look(self, terms: int) -> None:
        self.work -= terms
        if self.work < 0:
            raise Unclear


def ranges_of(pairs: Iterable[tuple[int, int]]) -> Ranges:
    """In order, joined, without surrogates, which no text has."""
    joined: list[tuple[int, int]] = []
    for low, high in sorted(pairs):
        if joined and low <= joined[-1][1] + 1:
            joined[-1] = (joined[-1][0], max(joined[-1][1], high))
        else:
            joined.append((low, high))
    whole: list[tuple[int, int]] = []
    for low, high in joined:
        whole += [(low, min(high, _SURROGATES[0] - 1)), (max(low, _SURROGATES[1] + 1), high)]
    return tuple((low, high) for low, high in whole if low <= high)


def all_but(ranges: Ranges) -> Ranges:
    """Every character that is not in these."""
    starts = [0, *(high + 1 for _, high in ranges)]
    ends = [*(low - 1 for low, _ in ranges), LAST_CODE_POINT]
    return ranges_of((low, high) for low, high in zip(starts, ends, strict=True) if low <= high)


def _has(ranges: Ranges, lowest: int, highest: int) -> bool:
    return any(low <= highest and lowest <= high for low, high in ranges)
