"""Regular expressions from strangers, matched in bounded time.

`re` backtracks, so a short hostile pattern can take years. Here a pattern is compiled to a list of instructions, and
all ways through it are followed at once: a match costs at most pattern x text, whatever they hold. The subset is what
module patterns use: literals, `.`, the escapes d w s D W S b, [classes], (groups), (?:groups), |, * + ? {m,n} (and
their lazy forms, which accept the same texts), ^ and $. Look-around, backreferences and flags are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loramux_adapters.artifact.pattern_parser import (
    Alternation,
    Assertion,
    Chars,
    Node,
    PatternRefused,
    Repeat,
    Series,
    parse,
)
from loramux_adapters.errors import AdapterRejected

# Of all patterns of one config together. The costliest config within them takes less than 100 ms for 1,000 modules.
MAX_TEXT = 8192
MAX_INSTRUCTIONS = 4096
MAX_VISITS = 120_000
MAX_SHAPES = 32
_WORD = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_")

__all__ = ["Effort", "Pattern", "PatternRefused", "Program", "parsed"]


class Effort:
    """What the patterns of one config may cost together: each takes its part, and is refused when there is too little.

    Attributes:
        text: characters of regular expressions that may still be parsed.
        instructions: that may still be compiled.
        visits: of an instruction, while modules are matched. Steps that are remembered from another module are free.
        shapes: kinds of plain keys by length and place of their dots.
    """

    def __init__(self) -> None:
        self.text = MAX_TEXT
        self.instructions = MAX_INSTRUCTIONS
        self.visits = MAX_VISITS
        self.shapes = MAX_SHAPES

    def take_text(self, count: int) -> None:
        self.text -= count
        if self.text < 0:
            raise PatternRefused(f"takes the config over {MAX_TEXT:,} characters of regular expressions")

    def take_instruction(self) -> None:
        self.instructions -= 1
        if self.instructions < 0:
            raise PatternRefused(
                f"takes the config over {MAX_INSTRUCTIONS:,} steps of regular expressions, repeats written out"
            )

    def take_shape(self) -> None:
        self.shapes -= 1
        if self.shapes < 0:
            raise PatternRefused(f"takes the config over {MAX_SHAPES} kinds of plain keys by length and place of dots")

    def take_visits(self, count: int) -> None:
        """Raises AdapterRejected: this is found out only with the modules."""
        self.visits -= count
        if self.visits < 0:
            raise AdapterRejected(
                [
                    f"the config's regular expressions take more than {MAX_VISITS:,} steps to match the modules: "
                    "write fewer or simpler ones, or plain module names"
                ]
            )


@dataclass(frozen=True, slots=True)
class _Match:
    """The end of the pattern of this number."""

    number: int


@dataclass(frozen=True, slots=True)
class _Position:
    """Where all ways through a program are after some characters. `previous`: the last of them."""

    states: frozenset[int]
    previous: str


class Program:
    """Several patterns, compiled to one and followed at once. Not thread-safe: it remembers each step it has made.

    An instruction is one of: Chars (consume one character, go to the next instruction), Assertion (go on if it holds
    here), tuple of targets (go to each of them), _Match (the text may end here).
    """

    def __init__(self, nodes: Sequence[Node], effort: Effort, *, prefix: Node | None = None) -> None:
        """`prefix` comes before each of the patterns. Raises `PatternRefused`."""
        self._effort = effort
        self._instructions: list[Chars | Assertion | tuple[int, ...] | _Match] = []
        if prefix is not None:
            self._emit(prefix)
        branch = len(self._instructions)
        self._append(())
        starts = []
        for number, node in enumerate(nodes):
            starts.append(len(self._instructions))
            self._emit(node)
            self._append(_Match(number))
        self._instructions[branch] = tuple(starts)
        self._chars = {i: one for i, one in enumerate(self._instructions) if isinstance(one, Chars)}
        self._consuming = frozenset(self._chars)
        self._start = _Position(frozenset({0}), "")
        self._steps: dict[tuple[frozenset[int], str, str], frozenset[int]] = {}
        self._sets: dict[frozenset[int], frozenset[int]] = {}  # one object for equal sets, so that finding one is cheap
        self._ends: dict[tuple[frozenset[int], str], int | None] = {}
        self._parents: dict[str, _Position] = {}  # up to a path's last dot

    def first(self, text: str) -> int | None:
        """The number of the first pattern that matches the whole text; raises `AdapterRejected` if that costs too much.

        Texts that share all but what follows their last dot share that part's cost.
        """
        parent = text[: text.rfind(".") + 1]
        if parent not in self._parents:
            self._parents[parent] = self._follow(self._start, parent)
        position = self._follow(self._parents[parent], text[len(parent) :])
        if not position.states:
            return None
        key = (position.states, position.previous)
        if key not in self._ends:
            reached = (self._instructions[i] for i in self._closure(*key, ""))
            self._ends[key] = min((one.number for one in reached if isinstance(one, _Match)), default=None)
        return self._ends[key]

    def _follow(self, position: _Position, text: str) -> _Position:
        states, previous = position.states, position.previous
        for char in text:
            if not states:
                break
            key = (states, previous, char)
            following = self._steps.get(key)
            if following is None:
                reached = self._closure(states, previous, char)
                following = frozenset([i + 1 for i in reached & self._consuming if self._chars[i].matches(char)])
                following = self._steps[key] = self._sets.setdefault(following, following)
            states, previous = following, char
        return _Position(states, previous)

    def _closure(self, states: frozenset[int], previous: str, following: str) -> set[int]:
        """Every instruction reachable without consuming, between two characters ("" at an end of the text)."""
        reached = set(states)
        pending = list(states - self._consuming)
        while pending:
            index = pending.pop()
            instruction = self._instructions[index]
            targets: tuple[int, ...] = ()
            if isinstance(instruction, tuple):
                targets = instruction
            elif isinstance(instruction, Assertion) and _holds(instruction, previous, following):
                targets = (index + 1,)
            for target in targets:
                if target not in reached:
                    reached.add(target)
                    if target not in self._consuming:
                        pending.append(target)
        self._effort.take_visits(len(reached))
        return reached

    def _append(self, instruction: Chars | Assertion | tuple[int, ...] | _Match) -> None:
        self._effort.take_instruction()
        self._instructions.append(instruction)

    def _emit(self, node: Node) -> None:
        if isinstance(node, Chars | Assertion):
            self._append(node)
        elif isinstance(node, Series):
            self._effort.take_instruction()  # for itself: a repeat of nothing costs time too
            for part in node.parts:
                self._emit(part)
        elif isinstance(node, Alternation):
            self._emit_alternation(node)
        else:
            self._emit_repeat(node)

    def _emit_alternation(self, node: Alternation) -> None:
        branch = len(self._instructions)
        self._append(())
        starts: list[int] = []
        exits: list[int] = []
        for option in node.options:
            starts.append(len(self._instructions))
            self._emit(option)
            exits.append(len(self._instructions))
            self._append(())
        self._instructions[branch] = tuple(starts)
        for index in exits:
            self._instructions[index] = (len(self._instructions),)

    def _emit_repeat(self, node: Repeat) -> None:
        for _ in range(node.least):
            self._emit(node.part)
        if node.most is None:
            start = len(self._instructions)
            self._append(())
            self._emit(node.part)
            self._append((start,))
            self._instructions[start] = (start + 1, len(self._instructions))
            return
        skips: list[int] = []
        for _ in range(node.most - node.least):
            skips.append(len(self._instructions))
            self._append(())
            self._emit(node.part)
        for index in skips:
            self._instructions[index] = (index + 1, len(self._instructions))


class Pattern:
    """One pattern for whole texts. Not thread-safe."""

    def __init__(self, text: str, effort: Effort | None = None) -> None:
        """Raises `PatternRefused`, whose message says what is outside the subset or the effort."""
        effort = effort or Effort()
        self._program = Program([parsed(text, effort)], effort)

    def fullmatch(self, text: str) -> bool:
        """Whether the whole text matches, as `re.fullmatch` would say of it. Raises `AdapterRejected`; see `Effort`."""
        return self._program.first(text) is not None


def parsed(text: str, effort: Effort) -> Node:
    """The tree of a pattern. Raises `PatternRefused`."""
    effort.take_text(len(text))
    return parse(text)


def _holds(assertion: Assertion, previous: str, following: str) -> bool:
    if assertion is Assertion.START:
        return not previous
    if assertion is Assertion.END:
        return not following
    return (previous in _WORD) != (following in _WORD)
