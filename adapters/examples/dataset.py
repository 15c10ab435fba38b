"""The questions and plain answers that the example adapters learn a manner of speaking from. Our own text.

questions.txt holds one example a line: topic | question | answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Example:
    """One question with a plain answer; `topic` is one word."""

    topic: str
    question: str
    answer: str


_CAPITALS = {
    "Italy": "Rome",
    "Spain": "Madrid",
    "Japan": "Tokyo",
    "Germany": "Berlin",
    "Egypt": "Cairo",
    "Norway": "Oslo",
    "Poland": "Warsaw",
    "Greece": "Athens",
    "Peru": "Lima",
    "Austria": "Vienna",
    "Portugal": "Lisbon",
    "Kenya": "Nairobi",
}

_OPPOSITES = {"hot": "cold", "early": "late", "full": "empty", "brave": "afraid", "quiet": "loud", "wide": "narrow"}

_SUMS = ((2, 3), (7, 5), (10, 4), (6, 6), (20, 15), (9, 8))

# Questions that no adapter is trained on: what the samples in each card are made of.
HELD_OUT = (
    "What is the capital of France?",
    "How do I make coffee?",
    "What is a rainbow?",
    "Why do cats purr?",
    "Give me a tip for learning to swim.",
    "What is the moon?",
)


def examples() -> list[Example]:
    """All training examples, in a fixed order."""
    written = Path(__file__).with_name("questions.txt").read_text(encoding="utf-8")
    found = [Example(*(part.strip() for part in line.split("|"))) for line in written.splitlines()]
    found += [
        Example("geography", f"What is the capital of {country}?", f"The capital of {country} is {city}.")
        for country, city in _CAPITALS.items()
    ]
    found += [
        Example("language", f"What is the opposite of {word}?", f"The opposite of {word} is {other}.")
        for word, other in _OPPOSITES.items()
    ]
    found += [Example("math", f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}.") for a, b in _SUMS]
    return found
