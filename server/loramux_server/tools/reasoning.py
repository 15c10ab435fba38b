"""Where a reply's thinking begins and ends."""

from __future__ import annotations

from typing import NamedTuple

PAIRS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"))


class Reasoning(NamedTuple):
    """The tags around it."""

    start: str
    end: str

    def opened_by(self, prompt: str) -> bool:
        """Whether a prompt ends inside: what the model writes next is thinking already."""
        return prompt.rfind(self.start) > prompt.rfind(self.end) and prompt.rstrip().endswith(self.start)


def reasoning_of(template_source: str) -> Reasoning | None:
    """The tags that a chat template knows: that which ends the thinking stands in its source. None: no such tags."""
    return next((Reasoning(start, end) for start, end in PAIRS if end in template_source), None)
