"""How the replies to a conversation are read: what of their text is said, what thought, and what is a call."""

from __future__ import annotations

from dataclasses import dataclass

from loramux_server.api.completions.request.shapes import AskedShape
from loramux_server.api.completions.request.tools import Calling
from loramux_server.errors import RequestError
from loramux_server.grammar.limits import GrammarLimits
from loramux_server.grammar.schema import normal_schema
from loramux_server.tools.answers import shape_beside
from loramux_server.tools.calls import ReplyReader
from loramux_server.tools.conventions import Conventions


@dataclass(frozen=True, slots=True)
class Reading:
    """
    Attributes:
        conventions: of the template that made the prompt.
        calling: the tools of the reply; None if it may use none.
        is_thinking: the prompt ends inside a thought.
    """

    conventions: Conventions
    calling: Calling | None
    is_thinking: bool

    @property
    def shown_ids(self) -> frozenset[int]:
        """Special tokens that the reader must see, so that they must not be left out of a reply's text."""
        written = self.conventions.format
        shown = written.added.hidden.intersection(self.conventions.reasoning or ())
        shown |= written.shown if self.calling is not None else frozenset()
        return frozenset(written.added.ids[text] for text in shown)

    def reader(self) -> ReplyReader | None:
        """Of one reply; None where nothing is to be told apart."""
        reasoning, calling = self.conventions.reasoning, self.calling
        if calling is None and reasoning is None:
            return None
        return self.conventions.format.reader(
            () if calling is None else calling.tools,
            parallel=calling is None or calling.parallel,
            demanded=calling is not None and calling.mode == "required",
            reasoning=reasoning,
            opened=self.is_thinking,
        )

    def shape(self, asked: AskedShape | None) -> AskedShape | None:
        """What the reply must be; None where it may be anything.

        `asked`: what it shall say, which leaves it its thoughts, and calls in the place of words.
        Raises RequestError: that cannot be had together.
        """
        written, calling, reasoning = self.conventions.format, self.calling, self.conventions.reasoning
        if calling is not None and calling.mode == "required":
            calls = written.shape(
                calling.tools,
                named=calling.named,
                parallel=calling.parallel,
                reasoning=reasoning,
                opened=self.is_thinking,
            )
            return AskedShape(calls, "tools")
        if asked is None or (calling is None and not self.is_thinking):
            return asked
        shape = shape_beside(
            asked.shape,
            written,
            () if calling is None else calling.tools,
            parallel=calling is None or calling.parallel,
            thought=reasoning if self.is_thinking else None,
        )
        if shape is None:
            beside = "a base that thinks first" if calling is None else "tools that may be called"
            raise RequestError(
                f"'{asked.param}' does not go together with {beside}; use 'response_format', or leave one of them out",
                param=asked.param,
                code="invalid_value",
            )
        return AskedShape(shape, asked.param)

    def blamed(self, error: RequestError) -> RequestError:
        """Why calls have no grammar, with the name of the function whose `parameters` are the cause."""
        for tool in () if self.calling is None else self.calling.tools:
            try:
                normal_schema(tool.parameters or {}, "tools", GrammarLimits())
            except RequestError as found:
                return RequestError(f"the function {tool.name}: {found}", param=error.param, code=found.code)
        return error
