"""Grammars for tests: which token may come next is a table, and what the engine says to it is kept."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import numpy as np
import numpy.typing as npt

from loramux_server.errors import GrammarFailed, MaskLate
from loramux_server.kernels.compiled.logit_changes import bits_of


class FakeGrammar:
    """A reply goes on with the tokens that stand in `after` for its last one, None at its beginning.

    Attributes:
        heard: the tokens that it was told of.
    """

    is_slow = False
    mask_seconds = 0.0

    def __init__(
        self,
        vocabulary: int,
        after: Mapping[int | None, Collection[int]],
        *,
        ends_with: Collection[int] = (),
        words: int | None = None,
        refuses: Collection[int] = (),
    ) -> None:
        """
        Args:
            ends_with: behind these tokens the reply is complete.
            words: of its masks, where they are not as many as the vocabulary has.
            refuses: tokens that it fails at.
        """
        self.heard: list[int] = []
        self._vocabulary, self._after, self._ends_with = vocabulary, after, ends_with
        self._words, self._refuses = words, refuses

    @property
    def ended(self) -> bool:
        return self.heard[-1:] != [] and self.heard[-1] in self._ends_with

    def advance(self, token: int) -> None:
        if token in self._refuses:
            raise GrammarFailed(f"the grammar refuses {token}")
        self.heard.append(token)

    @property
    def is_ready(self) -> bool:
        return True

    def on_ready(self, call: Callable[[], None]) -> None:
        call()

    def mask(self, patience: float | None = None) -> npt.NDArray[np.uint32]:
        last = self.heard[-1] if self.heard else None
        allowed = self._after.get(last)
        if allowed is None:
            raise GrammarFailed(f"the grammar has come to a dead end behind {last}")
        bits = bits_of(allowed, self._vocabulary)
        return bits if self._words is None else np.resize(np.append(bits, [0] * self._words), self._words)


class LateGrammar(FakeGrammar):
    """One whose masks are there when a test says so: `is_open` lets all that are asked for be made.

    Attributes:
        late: how often a mask was asked for that was not there.
    """

    def __init__(self, vocabulary: int, *, slow: bool = False, ends_with: Collection[int] = ()) -> None:
        super().__init__(vocabulary, {}, ends_with=ends_with)
        self.is_slow = slow
        self.late = 0
        self.is_open = False
        self._calls: list[Callable[[], None]] = []

    @property
    def is_ready(self) -> bool:
        return self.is_open

    def on_ready(self, call: Callable[[], None]) -> None:
        self._calls.append(call)
        if self.is_open:
            call()

    def open(self) -> None:
        self.is_open = True
        for call in self._calls:
            call()

    def mask(self, patience: float | None = None) -> npt.NDArray[np.uint32]:
        if not self.is_open:
            self.late += 1
            raise MaskLate
        return bits_of(range(self._vocabulary), self._vocabulary)
