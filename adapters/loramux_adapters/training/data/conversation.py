"""What one example is, and what is said when a line cannot be one."""

from __future__ import annotations

from dataclasses import dataclass

from loramux_adapters.errors import DataError

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; `role` is one of ROLES."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation that ends with the assistant's answer.

    Attributes:
        line: where it starts in its file, from 1.
        is_pair: it was given as prompt and completion, so that a base without a chat template can learn it too.
    """

    messages: tuple[Message, ...]
    line: int
    is_pair: bool = False

    @property
    def prompt(self) -> tuple[Message, ...]:
        """What the last answer answers."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        """The text of the last answer."""
        return self.messages[-1].content


@dataclass(frozen=True, slots=True)
class Skipped:
    """A line that was left out; `reason` follows on the words "line 7 "."""

    line: int
    reason: str

    def __str__(self) -> str:
        return f"line {self.line} {self.reason}"


class LineError(DataError):
    """One line cannot be used. `reason` follows on the words "line 7 "."""

    def __init__(self, line: int, reason: str) -> None:
        self.line = line
        self.reason = reason
        super().__init__(f"line {line} {reason}")
