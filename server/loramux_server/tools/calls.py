"""What tools and calls are, whatever the format they are written in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol


class Tool(NamedTuple):
    """A function that a caller offers.

    Attributes:
        parameters: JSON schema of its arguments, parsed; None where it takes none.
        strict: arguments must match it.
    """

    name: str
    description: str = ""
    parameters: dict[str, Any] | None = None
    strict: bool = False


class WrittenCall(NamedTuple):
    """A call of an earlier turn. `arguments` is the JSON text of an object."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class CallPart:
    """A piece of one call.

    Attributes:
        index: which call of the reply.
        id, name: in the first piece of a call only.
        arguments: a piece of its JSON text.
    """

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


class ReplyPart(NamedTuple):
    """What became certain of a reply with a piece of its text."""

    content: str = ""
    reasoning: str = ""
    calls: tuple[CallPart, ...] = ()


class ReplyReader(Protocol):
    """Reads one reply; its text comes in pieces, whatever the pieces.

    Attributes:
        num_calls: that have begun.
    """

    num_calls: int

    def add(self, text: str) -> ReplyPart: ...

    def end(self) -> ReplyPart:
        """The rest, at the end of the reply. A call that was cut keeps its arguments as they came."""


class AddedTokens(NamedTuple):
    """The tokens that a tokenizer has beside its vocabulary of pieces.

    Attributes:
        ids: by their text.
        hidden: texts of those that a detokenizer leaves out unless it is told to show them.
    """

    ids: Mapping[str, int] = {}
    hidden: frozenset[str] = frozenset()
