"""Which flag, variable, key or value a mistyped one was meant to be. Imports nothing heavy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

ENV_PREFIX = "LORAMUX_"
CLOSE = 0.75  # share of two words' letters that are the same where one is taken for a slip of the other
LEAST_BEGINNING = 3  # letters that a longer word may be guessed from


def suggest(word: object, known: Iterable[str]) -> str:
    """`; did you mean X?`, or nothing when no known word is close."""
    close = closest(str(word), known)
    return f"; did you mean {close}?" if close else ""


def closest(word: str, known: Iterable[str]) -> str | None:
    """The known word that this one is a slip of the keyboard from, or the only one that it begins; None if unsure.

    What all flags or variables begin with is no likeness: `--lr` has nothing of `--rank`.
    """
    bare = {_bare(each): each for each in known}
    typed = _bare(word)
    for close in difflib.get_close_matches(typed, bare, n=1, cutoff=CLOSE):
        return bare[close]
    begun = [each for each in bare if len(typed) >= LEAST_BEGINNING and each.startswith(typed)]
    return bare[begun[0]] if len(begun) == 1 else None


def _bare(word: str) -> str:
    return word.removeprefix(ENV_PREFIX).lstrip("-").replace("_", "-").lower()
