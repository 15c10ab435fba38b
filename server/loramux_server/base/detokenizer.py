"""A stream of tokens -> text that may be shown: whole characters, nothing of a stop string, O(1) per token."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are not (yet) a character
_MAX_INCOMPLETE = 3  # bytes, and so tokens, of a character that is not complete
_MAX_WINDOW = 24  # tokens; reached only by text that never ends on a whole character
_KEPT_WINDOW = 8


class Detokenizer:
    """One sequence's reply as text.

    `add` returns what became certain with a token: a character whose bytes are spread over tokens appears once it is
    complete, and text that could still turn out to be a stop string is held back. After `stopped` nothing more comes.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        *,
        stop: Sequence[str] = (),
        skip: frozenset[int] = frozenset(),
        context: Sequence[int] = (),
        min_tokens: int = 0,
        include_stop: bool = False,
    ) -> None:
        """
        Args:
            decode: token ids -> text, without any clean-up of spaces.
            stop: strings that end the reply. The first to be complete counts; of those that end together, the longest.
            skip: ids that never show (special tokens).
            context: last tokens of the text that the reply continues. With a SentencePiece-like tokenizer the first
                word then keeps its leading space. Empty for a reply that stands alone.
            min_tokens: a string that is complete in the text of so many first tokens does not end the reply.
            include_stop: the text ends with the string that ended it, not before it.
        """
        self._skip = skip
        self._may_not_stop = min_tokens  # for so many tokens more
        self._text = _TextWindow(decode, [token for token in context if token not in skip][-_KEPT_WINDOW:])
        self._stop = _StopMatcher(stop, include_stop)

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self._stop.found is not None

    @property
    def stopped_by(self) -> str | None:
        """The stop string that was found."""
        return self._stop.found

    @property
    def position(self) -> int:
        """Characters decoded so far, held back or not; once stopped, those of the text that is given out."""
        return self._stop.position

    @property
    def held(self) -> int:
        """Characters decoded but held back."""
        return self._stop.held

    def add(self, token: int) -> str:
        """The text that this token makes certain; often one token's, sometimes none or several tokens'."""
        if self.stopped:
            return ""
        may_stop, self._may_not_stop = not self._may_not_stop, max(0, self._may_not_stop - 1)
        return "" if token in self._skip else self._stop.add(self._text.add(token), may_stop)

    def flush(self) -> str:
        """The rest, at the end of the reply: incomplete bytes as U+FFFD, and text that only looked like a stop."""
        if self.stopped:
            return ""
        return self._stop.add(self._text.flush(), not self._may_not_stop) + self._stop.flush()


class _TextWindow:
    """Decodes only the last few tokens. A token's text depends on its neighbours: leading spaces, split characters.

    `_window` holds tokens whose text is out already (the context) and then `_fresh` tokens whose text is not, or only
    in part; `_emitted` counts the characters of decode(_window) that are out.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], context: list[int]) -> None:
        self._decode = decode
        self._window = context
        self._fresh = 0
        self._emitted = len(decode(context).rstrip(_REPLACEMENT)) if context else 0

    def add(self, token: int) -> str:
        self._window.append(token)
        self._fresh += 1
        text = self._decode(self._window)
        whole = not text.endswith(_REPLACEMENT)
        if not whole and len(self._window) < _MAX_WINDOW:
            return ""
        incomplete = 0 if whole else min(len(text) - len(text.rstrip(_REPLACEMENT)), _MAX_INCOMPLETE)
        end = len(text) - incomplete
        new = text[self._emitted : end]
        self._emitted = max(self._emitted, end)
        if new or len(self._window) >= _MAX_WINDOW:
            self._shorten(self._fresh if whole else _KEPT_WINDOW, incomplete)
        return new

    def flush(self) -> str:
        text = self._decode(self._window) if self._window else ""
        new = text[self._emitted :]
        self._emitted = max(self._emitted, len(text))
        return new

    def _shorten(self, keep: int, incomplete: int) -> None:
        """Keep the last tokens as context; the last `incomplete` characters of their text are not out yet."""
        self._window = self._window[-min(keep, _KEPT_WINDOW) :]
        self._fresh = 0 if incomplete == 0 else min(self._fresh, len(self._window))
        self._emitted = max(0, len(self._decode(self._window)) - incomplete)


class _StopMatcher:
    """Finds the first of several strings in a text that arrives in pieces, whatever the pieces.

    One Knuth-Morris-Pratt automaton per string, so each character costs O(strings) amortised. The text held back is as
    long as the longest beginning of a stop string that the text so far ends with.
    """

    def __init__(self, stops: Sequence[str], include: bool) -> None:
        """`include`: the string that is found is part of the text."""
        self._include = include
        self._stops = [(stop, _failure_table(stop)) for stop in stops]
        self._matched = [0] * len(self._stops)  # characters of each stop that the text ends with
        self._held = ""
        self.position = 0
        self.found: str | None = None

    @property
    def held(self) -> int:
        return len(self._held)

    def add(self, text: str, may_stop: bool = True) -> str:
        """The text that can be given out. What is complete within `text` counts only where it `may_stop`."""
        if not self._stops or not text:
            self.position += len(text)
            return text
        buffer = self._held + text
        for index in range(len(self._held), len(buffer)):
            longest = self._advance(buffer[index])
            if longest and may_stop:
                end = index + 1 - longest
                self.found = buffer[end : index + 1]
                released = buffer[: index + 1 if self._include else end]
                self.position += len(released) - len(self._held)
                self._held = ""
                return released
        self.position += len(text)
        cut = len(buffer) - max(self._matched)
        self._held = buffer[cut:]
        return buffer[:cut]

    def flush(self) -> str:
        rest, self._held = self._held, ""
        return rest

    def _advance(self, character: str) -> int:
        """Feed one character; the length of the longest stop string that is complete now, else 0."""
        longest = 0
        for index, (stop, failure) in enumerate(self._stops):
            matched = self._matched[index]
            while matched and stop[matched] != character:
                matched = failure[matched - 1]
            if stop[matched] == character:
                matched += 1
            if matched == len(stop):
                longest = max(longest, matched)
                matched = failure[-1]  # goes on, where it may not stop
            self._matched[index] = matched
        return longest


def _failure_table(stop: str) -> list[int]:
    """For each prefix of `stop`, the length of its longest proper prefix that is also its suffix."""
    if not stop:
        raise ValueError("a stop string must not be empty")
    table = [0] * len(stop)
    matched = 0
    for index in range(1, len(stop)):
        while matched and stop[matched] != stop[index]:
            matched = table[matched - 1]
        if stop[matched] == stop[index]:
            matched += 1
        table[index] = matched
    return table
