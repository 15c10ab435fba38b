"""A reply's text, bit by bit, into what is said, what is thought and what is called."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from loramux_server.tools.call_bodies import calls
from loramux_server.tools.calls import CallPart, ReplyPart, Tool
from loramux_server.tools.json_pieces import SPACE, Unexpected
from loramux_server.tools.reasoning import Reasoning

_LOOKED_THROUGH_AGAIN = 32  # characters: so the work stays in proportion to the reply

_BRACKETS = ("{", "[")


class Marks(NamedTuple):
    """Texts in a reply that are more than text.

    Attributes:
        opens: what opens a call -> what closes it, or nothing.
        bare: an object at the beginning of a line, or a list of them, may be a call.
        between: characters that may stand between calls.
        hidden: special tokens that are shown to a reader, and never content.
    """

    opens: Mapping[str, str] = {}
    bare: bool = False
    between: str = ""
    hidden: frozenset[str] = frozenset()


class TextReader:
    """Reads one reply (a ReplyReader). Where the text is cut into pieces changes nothing of the sum.

    A call is one as soon as the name of a tool and the beginning of its arguments are read. Whatever looked like one
    before that is content, nothing of it lost; so are names that are no tool's. From then on it stays a call: what does
    not fit any more ends its arguments there and is content.
    White space between calls, and around thinking, is nobody's.

    Attributes:
        num_calls: that have begun.
        tools: by name.
    """

    def __init__(
        self,
        marks: Marks,
        tools: Sequence[Tool],
        new_id: Callable[[], str],
        *,
        parallel: bool = True,
        demanded: bool = False,
        reasoning: Reasoning | None = None,
        opened: bool = False,
    ) -> None:
        """
        Args:
            new_id: makes the id of a call.
            parallel: give all calls, not only the first.
            demanded: the reply is bound to calls, so what was cut before it was one is no content either.
            opened: the prompt ends inside the thinking.
        """
        self.num_calls = 0
        self.tools: Mapping[str, Tool] = {tool.name: tool for tool in tools}
        self._marks = marks
        self._new_id = new_id
        self._parallel = parallel
        self._demanded = demanded
        self._reasoning = reasoning
        opens = tuple(marks.opens) if tools else ()
        tags = {*opens, *marks.hidden, *((reasoning.start,) if reasoning is not None else ())}
        bare = _BRACKETS if marks.bare and tools else ()
        self._special = re.compile("|".join(map(re.escape, (*tags, *bare))) or r"(?!)")
        self._tag_begins = _Beginnings(tags)
        self._thinking_ends = _Beginnings(reasoning or ())
        self._state: Literal["content", "reasoning", "call", "behind a call"] = "content"
        self._rest = ""  # may be the beginning of a tag
        self._space = ""  # white space that is content if content follows
        self._fresh = True  # nothing was said since the beginning, a call or the end of thinking
        self._said = False  # there is content
        self._behind: Literal["", "call", "reasoning"] = ""
        self._thought = False
        self._reading: Generator[None, str, None] | None = None
        self._opener = ""
        self._held: list[str] = []  # read of what may yet be no call
        self._begun = False  # what was opened is a call
        self._muted = False
        self._out = _Out()
        if opened and reasoning is not None:
            self._state = "reasoning"

    @property
    def thinking(self) -> bool:
        """Whether what comes next is thinking, as far as is known."""
        return self._state == "reasoning"

    def add(self, text: str) -> ReplyPart:
        """What became certain with this piece."""
        self._out = _Out()
        text, self._rest = self._rest + text, ""
        while text:
            if self._state == "content":
                text = self._content(text)
            elif self._state == "reasoning":
                text = self._thinking(text)
            elif self._state == "call":
                text = self._call(text)
            else:
                text = self._behind_call(text)
        return self._out.part()

    def end(self) -> ReplyPart:
        """The rest."""
        self._out = _Out()
        rest, self._rest = self._rest, ""
        if self._state == "reasoning":
            self._think(rest)
        elif self._state == "call" and not self._begun:
            self._say("" if self._demanded else self._no_call())
        elif self._state == "content":
            self._say("" if self._demanded else rest)
        if not self._behind and self._state != "reasoning":
            self._out.content.append(self._space)
        self._space = ""
        return self._out.part()

    # what a text is made of: each takes some of it and gives what is left

    def _content(self, text: str) -> str:
        found = self._special.search(text)
        if found is None:
            keep = self._tag_begins.at_end_of(text)
            self._say(text[: len(text) - keep])
            self._rest = text[len(text) - keep :]
            return ""
        self._say(text[: found.start()])
        mark, left = found[0], text[found.end() :]
        if self._reasoning is not None and mark == self._reasoning.start and self._fresh:
            self._state, self._space = "reasoning", ""
        elif mark not in self._marks.opens and not (mark in _BRACKETS and (self._fresh or "\n" in self._space)):
            if mark not in self._marks.hidden:
                self._say(mark)
        else:
            self._opener, self._held, self._begun = mark, [], False
            self._reading = calls(self, mark if mark in _BRACKETS else "")
            next(self._reading)
            self._state = "call"
        return left

    def _thinking(self, text: str) -> str:
        assert self._reasoning is not None
        start, end = self._reasoning
        tags = (end,) if self._thought else (end, start)
        found = min(((at, tag) for tag in tags if (at := text.find(tag)) >= 0), default=None)
        if found is None:
            keep = self._thinking_ends.at_end_of(text)
            self._think(text[: len(text) - keep])
            self._rest = text[len(text) - keep :]
            return ""
        at, tag = found
        self._think(text[:at])
        if tag == start:  # the model opens again what the prompt has opened
            if self._thought:
                self._think(tag)
        else:
            self._state, self._fresh, self._behind, self._space = "content", True, "reasoning", ""
            self._thought = False
        return text[at + len(tag) :]

    def _call(self, text: str) -> str:
        assert self._reading is not None
        for at, character in enumerate(text):
            self._held.append(character)
            try:
                self._reading.send(character)
            except StopIteration:
                self._state = "behind a call"
                return text[at + 1 :]
            except Unexpected:
                del self._held[-1:]
                self._state = "behind a call" if self._begun and not self._held else "content"
                return self._no_call() + text[at:]
        return ""

    def _behind_call(self, text: str) -> str:
        close = self._marks.opens.get(self._opener, "")
        behind = text.lstrip(SPACE)
        if close and close.startswith(behind):
            if close == behind:
                self._state = "content"
            else:
                self._rest = text
            return ""
        self._state = "content"
        return behind.removeprefix(close) if close and behind.startswith(close) else text

    # where it goes

    def _say(self, text: str) -> None:
        blank = SPACE + (self._marks.between if self._fresh and self._behind == "call" else "")
        if not text.strip(blank):
            self._space += text
            return
        if self._behind and not self._said:
            self._out.content.append((self._space + text.rstrip(SPACE)).lstrip(SPACE))
        else:
            self._out.content.append(self._space + text.rstrip(SPACE))
        self._space = text[len(text.rstrip(SPACE)) :]
        self._fresh, self._said, self._behind = False, True, ""

    def _think(self, text: str) -> None:
        if not text.strip(SPACE):
            self._space += text if self._thought else ""
            return
        kept = text.rstrip(SPACE)
        self._out.reasoning.append(self._space + kept if self._thought else kept.lstrip(SPACE))
        self._space = text[len(kept) :]
        self._thought = True

    def _no_call(self) -> str:
        """What was held is content after all; a short one is looked through again, as a call may begin in it."""
        if not self._begun and self._opener not in self._marks.hidden:
            self._say(self._opener)
        held, self._held = "".join(self._held), []
        if len(held) > _LOOKED_THROUGH_AGAIN:
            self._say(held)
            return ""
        return held

    # a CallSink

    def begin(self, name: str) -> None:
        self._held, self._begun = [], True
        self._space, self._fresh, self._behind = "", True, "call"
        self._muted = not self._parallel and self.num_calls > 0
        if not self._muted:
            self._out.begin(self.num_calls, self._new_id(), name)
            self.num_calls += 1

    def take(self, text: str) -> None:
        self._held.clear()
        if not self._muted:
            self._out.take(self.num_calls - 1, text)

    def done(self) -> None:
        self._held = []


class _Out:
    """What one piece of text gives."""

    def __init__(self) -> None:
        self.content: list[str] = []
        self.reasoning: list[str] = []
        self._calls: dict[int, tuple[str | None, str | None, list[str]]] = {}

    def begin(self, index: int, call_id: str, name: str) -> None:
        self._calls[index] = (call_id, name, [])

    def take(self, index: int, text: str) -> None:
        if index not in self._calls:
            self._calls[index] = (None, None, [])
        self._calls[index][2].append(text)

    def part(self) -> ReplyPart:
        return ReplyPart(
            "".join(self.content),
            "".join(self.reasoning),
            tuple(
                CallPart(index, call_id, name, "".join(text)) for index, (call_id, name, text) in self._calls.items()
            ),
        )


class _Beginnings:
    """Finds out whether a text ends in what may become a tag."""

    def __init__(self, tags: Iterable[str]) -> None:
        self._beginnings = frozenset(tag[:size] for tag in tags for size in range(1, len(tag)))
        self._longest = max(map(len, self._beginnings), default=0)

    def at_end_of(self, text: str) -> int:
        """How many characters."""
        for size in range(min(self._longest, len(text)), 0, -1):
            if text[-size:] in self._beginnings:
                return size
        return 0
