"""Values by module pattern, as in a PEFT `rank_pattern`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from operator import itemgetter
from typing import Generic, TypeVar

from loramux_adapters.artifact.pattern_parser import MAX_LENGTH, parse
from loramux_adapters.artifact.patterns import Effort, PatternRefused, Program, parsed

MAX_DOTS = 32
_FIXED_KEY = re.compile(r"(\^?)((?:[A-Za-z0-9_.]|\\\.)+)\$?")  # one way through it: `re` is safe here
_ANY_PARENT = parse(r"(.*\.)?")

V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class _Shape:
    """Plain keys of one length whose dots, which stand for any character, are in the same places.

    Attributes:
        anchored: they match whole paths only, not ends of them.
        literals: the other characters of a text of that length.
        orders: these characters -> the first key that has them, by its place in the table.
    """

    anchored: bool
    literals: Callable[[str], object]
    orders: dict[object, int]


class PatternTable(Mapping[str, V], Generic[V]):
    """Values by module pattern, as in a PEFT `rank_pattern`: the first key that matches the end of a path counts.

    Matching is `(.*\\.)?(key)` on the whole path. Keys without operators are looked up: real tables name a thousand
    modules one by one. The others are followed all at once.
    """

    def __init__(self, entries: Mapping[str, V], effort: Effort | None = None) -> None:
        """Raises `PatternRefused`, whose message names the key if it is one of them that is wrong."""
        effort = effort or Effort()
        self._entries = dict(entries)
        self._values = list(self._entries.values())
        self._shapes: dict[int, dict[tuple[bool, tuple[int, ...]], _Shape]] = {}  # by length, then by kind
        self._expressions: list[int] = []  # places in the table
        nodes = []
        for order, key in enumerate(self._entries):
            try:
                fixed = _FIXED_KEY.fullmatch(key)
                if fixed:
                    self._add_fixed(order, fixed[2], bool(fixed[1]), effort)
                else:
                    nodes.append(parsed(key, effort))  # by itself: brackets cannot pair up with others around it
                    self._expressions.append(order)
            except PatternRefused as error:
                raise PatternRefused(f"key {ascii(key)[:120]} {error}") from error
        self._program = Program(nodes, effort, prefix=_ANY_PARENT) if nodes else None

    def match(self, module: str, default: V) -> V:
        """The value of the first key that matches this module path, else `default`.

        Raises `AdapterRejected`; see `Effort`.
        """
        found = self._fixed_matches(module)
        number = None if self._program is None else self._program.first(module)
        if number is not None:
            found.append(self._expressions[number])
        return self._values[min(found)] if found else default

    def __getitem__(self, key: str) -> V:
        return self._entries[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def _add_fixed(self, order: int, key: str, anchored: bool, effort: Effort) -> None:
        text = key.replace("\\.", "\0")
        if len(text) > MAX_LENGTH or text.count(".") > MAX_DOTS:
            raise PatternRefused(f"has more than {MAX_LENGTH} characters, or more than {MAX_DOTS} dots")
        wild = tuple(dot.start() for dot in re.finditer(r"\.", text))
        kinds = self._shapes.setdefault(len(text), {})
        if (anchored, wild) not in kinds:
            effort.take_shape()
            places = [i for i, char in enumerate(text) if char != "."]
            kinds[anchored, wild] = _Shape(anchored, itemgetter(*places) if places else len, {})
        shape = kinds[anchored, wild]
        shape.orders.setdefault(shape.literals(text.replace("\0", ".")), order)

    def _fixed_matches(self, module: str) -> list[int]:
        found = []
        start = 0
        while True:
            end = module[start:]
            for shape in self._shapes.get(len(end), {}).values():
                if start == 0 or not shape.anchored:
                    order = shape.orders.get(shape.literals(end))
                    if order is not None:
                        found.append(order)
            start = module.find(".", start) + 1
            if start == 0:
                return found
