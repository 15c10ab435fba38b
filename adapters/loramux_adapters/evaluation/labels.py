"""The labels of a task whose answers are chosen from a few."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from loramux_adapters.errors import DataError
from loramux_adapters.training.data.conversation import Example

MOST_LABELS = 20  # distinct answers that are still taken for labels
LONGEST_LABEL = 40  # characters
REPEATS = 3  # examples of each answer, on average, that make answers look like labels


def labels_of(examples: Sequence[Example], named: Sequence[str] = ()) -> tuple[str, ...]:
    """The labels of these examples' answers; none if the answers are free text.

    Args:
        named: the labels, where the user names them; else they are inferred: at most 20 short answers that come up
            again and again.
    Raises:
        DataError: there are labels, and an answer is none of them; or all answers are the same.
    """
    found = Counter(example.answer.strip() for example in examples)
    if not named:
        repeated = len(examples) >= REPEATS * len(found)
        if len(found) > MOST_LABELS or not repeated or max(map(len, found)) > LONGEST_LABEL:
            return ()
        labels = tuple(sorted(found))
    else:
        labels = tuple(label.strip() for label in named)
        if len(set(labels)) != len(labels) or not all(labels):
            raise DataError(f"--labels must be different and not empty, got {', '.join(named)}")
        if len(labels) < 2:
            raise DataError("--labels must name at least two labels")
        strange = [example for example in examples if example.answer.strip() not in labels]
        if strange:
            shown = ", ".join(f"line {each.line} {_short(each.answer)}" for each in strange[:5])
            raise DataError(
                f"{len(strange)} of {len(examples)} answers are none of the labels {', '.join(labels)}: {shown}; "
                "name every label in --labels, or repair the file"
            )
    if len(found) == 1:
        raise DataError(
            f"all {len(examples)} answers are {_short(next(iter(found)))}: one class alone cannot be evaluated; "
            "add examples of the others"
        )
    return labels


def truth_of(examples: Sequence[Example], labels: Sequence[str]) -> list[int]:
    """The index of each example's label."""
    return [labels.index(example.answer.strip()) for example in examples]


def majority_of(examples: Sequence[Example], labels: Sequence[str]) -> int:
    """The index of the commonest label."""
    counts = Counter(example.answer.strip() for example in examples)
    return max(range(len(labels)), key=lambda index: counts[labels[index]])


def _short(text: str) -> str:
    plain = re.sub(r"\s+", " ", text.strip())
    return f'"{plain if len(plain) <= LONGEST_LABEL else plain[: LONGEST_LABEL - 1] + "…"}"'
