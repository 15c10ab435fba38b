"""What the engine asks of a grammar that holds a reply: `grammar/` makes them, and the engine knows no other side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt


class Grammar(Protocol):
    """What one sequence's reply may be, followed token by token."""

    @property
    def ended(self) -> bool:
        """Nothing but the reply's end could follow what was chosen so far."""

    @property
    def is_ready(self) -> bool:
        """`mask` gives an answer at once, or raises GrammarFailed."""

    @property
    def is_slow(self) -> bool:
        """Its masks are likely to take longer than a step: a step is not begun for it before its mask is there."""

    @property
    def mask_seconds(self) -> float:
        """From asking for the last mask that was made to having it."""

    def on_ready(self, call: Callable[[], None]) -> None:
        """Calls it once the mask that is being made is there, on any thread; at once if there is none."""

    def advance(self, token: int) -> None:
        """Engine thread: this token was chosen. The mask of the next is made on another thread from now on.

        Raises GrammarFailed.
        """

    def mask(self, patience: float | None = None) -> npt.NDArray[np.uint32]:
        """[ceil(vocabulary / 32)]: bit i of word w is token 32 w + i, 1 where that may come next.

        Tokens that end a reply may come where what was chosen so far is complete.

        Args:
            patience: seconds to wait for it at most; None: as long as a mask may take.
        Raises:
            GrammarFailed: nothing may come, or it takes too long to say what.
            MaskLate: it is not there yet.
        """
