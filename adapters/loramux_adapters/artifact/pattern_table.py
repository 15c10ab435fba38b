"""Values by module pattern, as in a PEFT `rank_pattern`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

from loramux_adapters.artifact.patterns import Budget, PatternRefused, compiled

MAX_KINDS = 32
_PLAIN_KEY = re.compile(r"(\^?)((?:[A-Za-z0-9_.]|\\\.)+)\$?")  # one way through it: `re` is safe here

V = TypeVar("V")


class PatternTable(Mapping[str, V], Generic[V]):
    """Values by module pattern, as in a PEFT `rank_pattern`: the first key that matches the end of a path counts.

    Matching is `(.*\\.)?(key)$` on the whole path. Plain keys, names with dots, are looked up: real tables name a
    thousand modules one by one. All other keys are one expression. Not thread-safe.
    """

    def __init__(self, entries: Mapping[str, V], budget: Budget | None = None, *, name: str = "the table") -> None:
        """Raises `PatternRefused`, whose message names the key. `name`: the table's, for messages."""
        self._budget = budget or Budget()
        self._name = name
        self._entries = dict(entries)
        self._values = list(self._entries.values())
        # Length -> places of the dots that stand for any character -> text with dots there -> place in the table.
        self._plain: dict[int, dict[tuple[int, ...], dict[str, int]]] = {}
        kinds, options = 0, []
        for order, key in enumerate(self._entries):
            plain = _PLAIN_KEY.fullmatch(key)
            try:
                if plain is None:
                    self._budget.check(key)  # by itself: parentheses cannot pair up with others around it
                    options.append(rf"(?:.*\.)?(?:{key})$(?P<_{order}>)")
                    continue
                kinds += self._add_plain(order, plain[2], anchor=plain[1])
                if kinds > MAX_KINDS:
                    raise PatternRefused(f"is of more than {MAX_KINDS} kinds of plain keys by length and place of dots")
            except PatternRefused as error:
                raise PatternRefused(f"key {ascii(key)[:120]} {error}") from error
        self._expressions = compiled("|".join(options)) if options else None

    def match(self, module: str, default: V) -> V:
        """The value of the first key that matches this module path, else `default`.

        Raises `AdapterRejected`; see `Budget`.
        """
        orders = [*self._plain_matches(module)]
        if self._expressions is not None:
            found = self._budget.match(self._expressions, module, self._name)
            if found is not None and found.lastgroup is not None:
                orders.append(int(found.lastgroup[1:]))
        return self._values[min(orders)] if orders else default

    def __getitem__(self, key: str) -> V:
        return self._entries[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def _add_plain(self, order: int, key: str, *, anchor: str) -> bool:
        """Whether no key had this length and these places of dots before."""
        text = key.replace("\\.", "\0")
        dots = tuple(i for i, char in enumerate(text) if char == ".")
        kinds = self._plain.setdefault(len(text), {})
        is_new = dots not in kinds
        kinds.setdefault(dots, {}).setdefault(anchor + text.replace("\0", "."), order)
        return is_new

    def _plain_matches(self, module: str) -> Iterator[int]:
        """The first place in the table of each kind of plain key, for each end of the path."""
        for start in (0, *(i + 1 for i, char in enumerate(module) if char == ".")):
            end = module[start:]
            for dots, orders in self._plain.get(len(end), {}).items():
                chars = list(end)
                for i in dots:
                    chars[i] = "."
                text = "".join(chars)
                for found in (orders.get(text), orders.get("^" + text) if start == 0 else None):
                    if found is not None:
                        yield found
