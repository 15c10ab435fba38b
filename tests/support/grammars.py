"""Grammars for tests: which token may come next is a table, and what the engine says to it is kept."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import numpy.typing as npt

from loramux_server.errors import GrammarFailed
from loramux_server.kernels.compiled.logit_changes import bits_of


class FakeGrammar:
    """A reply goes on with the tokens that stand in `after` for its last one, None at its beginning.

    Attributes:
        heard: the tokens that it was told of.
    """

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

    def mask(self) -> npt.NDArray[np.uint32]:
        last = self.heard[-1] if self.heard else None
        allowed = self._after.get(last)
        if allowed is None:
            raise GrammarFailed(f"the grammar has come to a dead end behind {last}")
        bits = bits_of(allowed, self._vocabulary)
        return bits if self._words is None else np.resize(np.append(bits, [0] * self._words), self._words)
