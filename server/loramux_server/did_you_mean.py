"""Which known word was meant by an unknown one: a slip of the fingers, or another tool's word for the same thing.

Nothing is said rather than something else: `--lr` is no slip for `--rank`.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher

_ALIKE = 0.75  # two words as a whole
_PARTS_ALIKE = 0.7  # each part of `max-num-seqs`, where both words have as many
_MOST = 3

# What other tools, or other people, call it. Told where the word on the right is known.
_OTHERWISE = {
    "--admin-key": "LORAMUX_ADMIN_KEY",
    "--api-key": "LORAMUX_API_KEY",
    "--dataset": "--data",
    "--gpu-memory-utilization": "--device-memory-mib",
    "--lora-modules": "--preload",
    "--max-loras": "--adapter-memory-mib",
    "--model": "--base",
    "--model-name": "--served-model-name",
    "add": "push",
    "delete": "rm",
    "download": "pull",
    "finetune": "train",
    "info": "show",
    "load": "push",
    "ls": "list",
    "remove": "rm",
    "run": "serve",
    "start": "serve",
    "unload": "rm",
    "upload": "push",
}


def suggest(word: object, known: Iterable[str]) -> str:
    """`; did you mean X?`, or nothing when no known word is close. Flags and variables are known with their prefix."""
    meant = _meant(str(word)[:100], list(known))
    return f"; did you mean {' or '.join(meant)}?" if meant else ""


def _meant(word: str, known: list[str]) -> list[str]:
    other = _OTHERWISE.get(word)
    if other is not None:
        return [other] if other in known or other.startswith("LORAMUX_") else []
    bare = _bare(word)
    alike = sorted(((_likeness(bare, _bare(each)), each) for each in known), reverse=True)
    return [each for likeness, each in alike if likeness >= _ALIKE][:_MOST]


def _likeness(word: str, known: str) -> float:
    """From 0 to 1. A word of which the known one only has more parts counts as alike."""
    if known.startswith(f"{word}-"):
        return 1.0
    ours, theirs = word.split("-"), known.split("-")
    if len(ours) == len(theirs) and any(_ratio(*pair) < _PARTS_ALIKE for pair in zip(ours, theirs, strict=True)):
        return 0.0
    return _ratio(word, known)


def _ratio(one: str, other: str) -> float:
    return SequenceMatcher(None, one, other, autojunk=False).ratio()


def _bare(word: str) -> str:
    """Without what all flags, or all variables, begin with."""
    return word.lower().replace("_", "-").removeprefix("--").removeprefix("loramux-")
